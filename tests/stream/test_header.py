"""Safetensors headers: nothing but CheckpointError on whatever bytes, and files both sides can read."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from folders import raw_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from surgery.errors import CheckpointError
from surgery.stream.header import LONGEST_HEADER, Header, build_header, parse_header, read_header

KNOWN = {
    "F64": 8,
    "F32": 4,
    "I64": 8,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

entries = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda n: n != "__metadata__"
    ),
    st.tuples(st.sampled_from(sorted(KNOWN)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)
numbers = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, 2**63, 2**64, 10**30, -1, 0.0, 1.5, True, None, "1", [], {}])
)
fields = {
    "dtype": st.sampled_from([*KNOWN, "F4", "F6_E2M3", "F8_E8M0", "C64", "bf16", "", None, 3, []]),
    "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
    "data_offsets": st.one_of(st.lists(numbers, max_size=3), numbers),
}
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def table_of(tensors: dict[str, tuple[str, list[int]]]) -> tuple[dict[str, Any], int]:
    """A right header for these tensors, one after another, and the bytes they take."""
    table: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + KNOWN[dtype] * int(np.prod(shape, dtype=np.int64))
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return table, offset


def parse(header: Any, body: int) -> Header:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(raw, 8 + len(raw) + body, "file")


def sound(header: Header, file_size: int) -> None:
    """What a caller may rely on: entries follow one another from the header to the end of the file."""
    end = header.data_offset
    for entry in header.entries:
        assert entry.offset == end
        assert all(type(n) is int and n >= 0 for n in entry.shape)
        end += entry.nbytes
    assert end == file_size


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@given(st.binary(max_size=200))
@FUZZ
def test_random_bytes_give_an_error_of_ours(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    try:
        sound(read_header(tmp_path / "x"), len(data))
    except CheckpointError as error:
        assert str(tmp_path / "x") in error.message
        assert error.hint


@given(entries, st.data())
@FUZZ
def test_damaged_files_give_an_error_of_ours(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]], data: st.DataObject
) -> None:
    table, nbytes = table_of(tensors)
    raw = bytearray(raw_file(tmp_path / "x", table, bytes(nbytes)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "drop"]))
        if kind == "set" and at < len(raw):
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at:]
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        else:
            del raw[at : at + data.draw(st.integers(1, 8))]
    (tmp_path / "x").write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        sound(read_header(tmp_path / "x"), len(raw))


@given(entries, st.data())
@FUZZ
def test_headers_with_wrong_fields_give_an_error_of_ours(
    tensors: dict[str, tuple[str, list[int]]], data: st.DataObject
) -> None:
    table, nbytes = table_of(tensors)
    for name in list(table):
        if data.draw(st.booleans()):
            field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "whole"]))
            if field == "whole":
                table[name] = data.draw(json_values)
            else:
                table[name][field] = data.draw(fields[field])
    raw = json.dumps(table).encode()
    with contextlib.suppress(CheckpointError):
        sound(parse(raw, nbytes), 8 + len(raw) + nbytes)


def test_sizes_of_thousands_of_digits_give_an_error_of_ours() -> None:
    with pytest.raises(CheckpointError):
        parse({"a": entry("U8", [10**4000, 10**4000])}, 8)


@given(json_values)
@FUZZ
def test_any_json_gives_an_error_of_ours_or_an_empty_table(value: Any) -> None:
    with contextlib.suppress(CheckpointError):
        assert parse(value, 0).entries == ()


@given(entries)
@FUZZ
def test_right_headers_are_read_as_the_library_reads_them(tensors: dict[str, tuple[str, list[int]]]) -> None:
    table, nbytes = table_of(tensors)
    text = json.dumps(table).encode()
    theirs = dict(safetensors.deserialize(struct.pack("<Q", len(text)) + text + bytes(nbytes)))
    ours = parse(text, nbytes)
    sound(ours, 8 + len(text) + nbytes)
    assert {e.name: (e.dtype, list(e.shape)) for e in ours.entries} == {
        name: (value["dtype"], value["shape"]) for name, value in theirs.items()
    }


@given(entries, st.data())
@FUZZ
def test_what_the_library_refuses_we_refuse(
    tensors: dict[str, tuple[str, list[int]]], data: st.DataObject
) -> None:
    table, nbytes = table_of(tensors)
    for name in list(table):
        if data.draw(st.booleans()):
            field = data.draw(st.sampled_from(["shape", "data_offsets"]))
            table[name][field] = data.draw(st.lists(st.integers(-2, 40), max_size=3))
    body = max(0, nbytes + data.draw(st.integers(-2, 2)))
    text = json.dumps(table).encode()
    try:
        safetensors.deserialize(struct.pack("<Q", len(text)) + text + bytes(body))
        theirs = True
    except safetensors.SafetensorError:
        theirs = False
    try:
        sound(parse(text, body), 8 + len(text) + body)
        ours = True
    except CheckpointError:
        ours = False
    assert ours == theirs


@pytest.mark.parametrize(
    ("header", "body", "word"),
    [
        ({"a": entry(), "b": entry(begin=4, end=12)}, 12, "overlaps"),
        ({"a": entry(), "b": entry()}, 8, "overlaps"),
        ({"a": entry(), "b": entry(begin=9, end=17)}, 17, "gap"),
        ({"a": entry(begin=1, end=9)}, 9, "gap"),
        ({"a": entry()}, 7, "truncated: 1 bytes"),
        ({"a": entry()}, 9, "1 bytes too many"),
        ({"a": entry(end=9)}, 9, "takes 8 bytes, not 9"),
        ({"a": entry(begin=8, end=0)}, 8, "takes 8 bytes, not -8"),
        ({"a": entry(shape=[-2])}, 8, "whole numbers"),
        ({"a": entry(shape=[2.0])}, 8, "whole numbers"),
        ({"a": entry(shape=[True, 2])}, 8, "whole numbers"),
        ({"a": entry(begin=-8, end=0)}, 8, "whole numbers"),
        ({"a": entry(shape=[2**62, 2**62])}, 8, "takes"),
        ({"a": entry(dtype="F33")}, 8, "F33"),
        ({"a": entry(dtype=None)}, 8, "invalid"),
        ({"a": entry(dtype=["F32"])}, 8, "invalid"),
        ({"a": entry("F4", [3], 0, 2)}, 2, "whole number of bytes"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets"),
        ({"a": 3}, 0, "invalid"),
        ({"a": "dtype"}, 0, "invalid"),
        ([], 0, "not a JSON object"),
        (b"", 0, "JSON"),
        (b"\xff\xfe{}", 0, "JSON"),
        (b"{" * 100_000, 0, "JSON"),
        (b'{"a":' * 100_000, 0, "JSON"),
        (b"[" * 100_000, 0, "JSON"),
        ({"__metadata__": []}, 0, "__metadata__"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', 0, "'a' stands twice"),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "'dtype' stands twice"),
    ],
)
def test_each_fault_is_named(header: Any, body: int, word: str) -> None:
    with pytest.raises(CheckpointError, match="file is no usable safetensors file") as caught:
        parse(header, body)
    assert word in caught.value.message
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("size", range(9))
def test_files_shorter_than_a_header(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_header(tmp_path / "x")


def test_headers_longer_than_the_file_or_the_format(tmp_path: Path) -> None:
    for length, word in ((1000, "longer than the file"), (LONGEST_HEADER + 1, "more than the format")):
        (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(CheckpointError, match=word):
            read_header(tmp_path / "x")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_header(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_header(tmp_path)


def test_names_that_are_no_text_are_refused() -> None:
    with pytest.raises(CheckpointError):
        parse(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1)


def test_a_shape_that_is_no_list_is_refused() -> None:
    with pytest.raises(CheckpointError):
        parse({"a": {"dtype": "U8", "shape": "", "data_offsets": [0, 1]}}, 1)


def test_tensors_in_any_order_without_elements_and_without_dimensions() -> None:
    header = parse(
        {
            "b": entry(begin=4, end=12), "scalar": entry(shape=[], end=4), "empty": entry(shape=[0], end=0),
            "late": entry(shape=[3, 0], begin=12, end=12), "__metadata__": {"format": "pt"},
        }, 12
    )  # fmt: skip
    assert [e.name for e in header.entries] == ["empty", "scalar", "b", "late"]
    assert header.metadata == {"format": "pt"}
    assert parse({}, 0).entries == ()


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(5, 3), "b": torch.randn(7).to(torch.bfloat16), "c": torch.randn(3).half(),
        "codes": torch.randn(9, 3).to(torch.float8_e4m3fn), "e8m0": torch.ones(3).to(torch.float8_e8m0fnu),
        "i": torch.arange(5), "flag": torch.tensor([True]), "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.empty(0, 4), "e5m2": torch.randn(3).to(torch.float8_e5m2), "ö": torch.ones(1),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "note": "ü"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt", "note": "ü"}
    raw = (tmp_path / "x.safetensors").read_bytes()
    sound(header, len(raw))
    assert {e.name for e in header.entries} == set(tensors)
    for found in header.entries:
        tensor = tensors[found.name]
        assert found.shape == tuple(tensor.shape)
        want = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert raw[found.offset : found.offset + found.nbytes] == want


@given(entries)
@FUZZ
def test_headers_we_build_are_read_by_the_library_and_by_us(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]]
) -> None:
    listed = [(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    head = build_header(listed, {"format": "pt"})
    assert len(head) % 8 == 0
    body = np.random.default_rng(0).integers(0, 2, table_of(tensors)[1], dtype=np.uint8).tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(head + body)
    ours = read_header(path)
    sound(ours, len(head) + len(body))
    assert ours.metadata == {"format": "pt"}
    by_name = {e.name: e for e in ours.entries}
    theirs = load_file(path)
    assert set(theirs) == set(by_name) == set(tensors)
    for name, dtype, shape in listed:
        assert (by_name[name].dtype, by_name[name].shape) == (dtype, shape)
        assert tuple(theirs[name].shape) == shape
        begin = by_name[name].offset - len(head)
        if theirs[name].numel():
            data = theirs[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            assert data == body[begin : begin + by_name[name].nbytes]
