"""Safetensors headers: read, check and build them without touching a tensor.

A file is `u64 little-endian n | n bytes of JSON | tensor bytes`. Everything in the JSON is checked
before it is believed: dtypes, shapes, byte ranges against shapes, gaps and overlaps, and the end of
the last tensor against the size of the file, so that a truncated shard is found at plan time.

Format: https://github.com/huggingface/safetensors (read as a specification).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from surgery.errors import CheckpointError

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


LARGEST_SIZE = 1 << 64
"""No dimension and no offset is larger."""


class Entry(NamedTuple):
    """One tensor of a header; `offset` counts from the start of the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header(NamedTuple):
    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_offset: int
    raw: bytes
    """The JSON bytes as they stand in the file; their hash identifies the layout of the shard."""


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; raises KeyError for an unknown dtype, ValueError for a broken last byte."""
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{bits} bits are no whole number of bytes")
    return bits // 8


def read_header(path: Path) -> Header:
    """The checked header of a local file."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = header_length(head, size, str(path))
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}", hint="check the path and its permissions"
        ) from error
    return parse_header(raw, size, str(path))


def header_length(head: bytes, file_size: int, label: str) -> int:
    """Bytes of JSON that the first 8 bytes `head` of a file announce."""
    if len(head) < 8:
        raise _broken(label, f"the file has {len(head)} bytes, less than a safetensors header needs")
    length = int.from_bytes(head, "little")
    if length > LONGEST_HEADER:
        raise _broken(label, f"it announces a header of {length} bytes, more than the format allows")
    if 8 + length > file_size:
        raise _broken(label, f"its header of {length} bytes is longer than the file ({file_size} bytes)")
    return length


def parse_header(raw: bytes, file_size: int, label: str) -> Header:
    """Check header bytes `raw` of a file of `file_size` bytes; `label` names the file in errors."""
    data_offset = 8 + len(raw)
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _broken(label, f"its header is not the JSON the format asks for ({error})") from error
    if not isinstance(parsed, dict):
        raise _broken(label, "its header is not a JSON object")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(label, "its __metadata__ is not a map of strings")
    entries = sorted(
        (_entry(name, value, data_offset, label) for name, value in parsed.items()),
        key=lambda entry: (entry.offset, entry.nbytes),
    )
    end = data_offset
    for entry in entries:
        if entry.offset != end:
            kind = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise _broken(label, f"tensor {entry.name} {kind} (byte {entry.offset}, expected {end})")
        end = entry.offset + entry.nbytes
    if end != file_size:
        missing = end - file_size
        what = (
            f"it is truncated: {missing} bytes are missing" if missing > 0 else f"{-missing} bytes too many"
        )
        raise _broken(label, f"its header describes {end} bytes but the file has {file_size} ({what})")
    return Header(tuple(entries), metadata, data_offset, raw)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} stands twice")
    return result


def _entry(name: str, value: Any, data_offset: int, label: str) -> Entry:
    try:
        if not isinstance(value["shape"], list):
            raise TypeError("its shape is no list")
        name.encode()
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if max((*shape, start, stop)) > LARGEST_SIZE:
            raise ValueError("a size or offset is beyond all files")
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError("sizes and offsets must be whole numbers of at least 0")
        nbytes = tensor_nbytes(dtype, shape)
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(label, f"the entry of tensor {name!r} is invalid ({error})") from error
    if stop - start != nbytes:
        raise _broken(
            label, f"tensor {name} of {dtype} {list(shape)} takes {nbytes} bytes, not {stop - start}"
        )
    return Entry(name, dtype, shape, data_offset + start, nbytes)


def _broken(label: str, why: str) -> CheckpointError:
    return CheckpointError(f"{label} is no usable safetensors file: {why}", hint="fetch this file again")


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Length and JSON for tensors stored one after another in this order, padded to 8 bytes."""
    table: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + tensor_nbytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
