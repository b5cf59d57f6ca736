"""GPTQ in both versions: against words put together bit by bit, and against GPTQModel's own files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_codes import random_codes
from safetensors.torch import load_file

from surgery.codecs.codec import IntCodec
from surgery.codecs.gptq import BITS, Gptq
from surgery.codecs.grid import Quantized
from surgery.codecs.schemes import IntScheme
from surgery.errors import CheckpointError

GOLDEN = Path(__file__).parent.parent / "golden" / "gptqmodel.safetensors"


def words_of(columns: np.ndarray, bits: int) -> np.ndarray:
    """[n·b/32] words of one stream of codes, bit by bit."""
    stream = sum(int(code) << index * bits for index, code in enumerate(columns))
    return np.array([stream >> 32 * k & 0xFFFF_FFFF for k in range(len(columns) * bits // 32)], np.uint32)


def bits_of(raw: np.ndarray) -> np.ndarray:
    return raw.view(np.uint32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "cols", "group"), [(32, 64, 32), (64, 96, 0), (32, 32, 32), (96, 160, 16)])
def test_every_part_bit_by_bit_and_back(bits: int, symmetric: bool, rows: int, cols: int, group: int) -> None:
    scheme = IntScheme(bits, group, symmetric)
    want = random_codes(scheme, rows, cols, bits * rows + cols)
    groups, shape = scheme.groups(cols), (rows, cols)
    for version in (1, 2):
        codec = Gptq(scheme, version)
        assert isinstance(codec, IntCodec)
        raw = codec.pack(want) | codec.constants(shape)
        assert {key: data.nbytes for key, data in raw.items()} == {
            key: stop for key, (_, stop) in codec.spans(shape, 0, rows).items()
        }
        found = bits_of(raw["qweight"]).reshape(-1, rows)
        for r in range(0, rows, 7):
            assert (found[:, r] == words_of(want.codes[r].numpy(), bits)).all()
        zeros = bits_of(raw["qzeros"]).reshape(groups, -1)
        for g in range(groups):
            column = want.zeros[:, g].numpy()
            words = words_of(column, bits)
            if version == 1 and bits == 3:
                words = words_of((column - 1) & 7, bits)
            elif version == 1:
                ones = sum(1 << place for place in range(0, 32, bits))
                words = (words.astype(np.int64) - ones & 0xFFFF_FFFF).astype(np.uint32)
            assert (zeros[g] == words).all()
        back = codec.quantized(shape, raw)
        assert all(torch.equal(a, b) for a, b in zip(back, want, strict=True))
        assert torch.equal(codec.decode(shape, 0, rows, raw), want.values())


def test_the_words_of_symmetric_zero_points() -> None:
    for version, word in ((1, 0x7777_7777), (2, 0x8888_8888)):
        scheme = IntScheme(4, 32)
        raw = Gptq(scheme, version).pack(random_codes(scheme, 32, 32, 0))
        assert (bits_of(raw["qzeros"]) == word).all()


@pytest.mark.parametrize("case", [f"{b} {64 if b == 8 else 32} {s}" for b in BITS for s in ("sym", "asym")])
def test_what_gptqmodel_writes_and_reads(case: str) -> None:
    bits, group, kind = case.split()
    golden = {
        name.removeprefix(f"gptq {case}|"): tensor
        for name, tensor in load_file(GOLDEN).items()
        if name.startswith(f"gptq {case}|")
    }
    scheme = IntScheme(int(bits), int(group), kind == "sym")
    mine = Quantized(golden["codes"], golden["scales"], golden["zeros"])
    shape = (32, 64)
    for version in (1, 2):
        stored = {part: golden[f"v2|{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        stored["qzeros"] = golden[f"v{version}|qzeros"]
        raw = {key: part.view(-1).view(torch.uint8).numpy() for key, part in stored.items()}
        codec = Gptq(scheme, version)
        written = codec.pack(mine) | codec.constants(shape)
        assert {key: data.tobytes() for key, data in written.items()} == {
            key: data.tobytes() for key, data in raw.items()
        }
        specs = {part.key: part for part in codec.parts(shape)}
        assert {key: specs[key].shape for key in stored} == {
            key: tuple(part.shape) for key, part in stored.items()
        }
        assert torch.equal(codec.decode(shape, 0, 32, raw).half(), golden["values"])


def test_act_order_is_decoded_by_its_groups_and_goes_nowhere_else() -> None:
    scheme = IntScheme(4, 16, symmetric=False)
    want, shape = random_codes(scheme, 32, 64, 5), (32, 64)
    codec = Gptq(scheme, act_order=True)
    group = torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 16
    raw = codec.pack(want) | {"g_idx": group.to(torch.int32).view(torch.uint8).numpy()}
    found = codec.decode(shape, 0, 32, raw)
    for c in range(64):
        g = int(group[c])
        column = (want.codes[:, c].float() - want.zeros[:, g].float()) * want.scales[:, g]
        assert torch.equal(found[:, c], column)
    with pytest.raises(CheckpointError, match="act-order") as caught:
        codec.quantized(shape, raw)
    assert "bf16" in caught.value.hint
    group[0] = 4
    raw["g_idx"] = group.to(torch.int32).view(torch.uint8).numpy()
    with pytest.raises(CheckpointError, match="names groups outside"):
        codec.decode(shape, 0, 32, raw)


def test_a_config_that_lies_about_symmetry_is_caught() -> None:
    asymmetric = IntScheme(4, 16, symmetric=False)
    raw = Gptq(asymmetric).pack(random_codes(asymmetric, 32, 64, 2)) | Gptq(asymmetric).constants((32, 64))
    with pytest.raises(CheckpointError, match="zero points other than 8"):
        Gptq(IntScheme(4, 16)).quantized((32, 64), raw)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_to_nearest(bits: int) -> None:
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    for symmetric in (True, False):
        codec = Gptq(IntScheme(bits, 32, symmetric))
        raw = codec.encode(values) | codec.constants((64, 96))
        found = codec.quantized((64, 96), raw)
        assert torch.equal(found.scales, found.scales.half().float())
        steps = ((found.values() - values).view(64, 3, 32).abs() / found.scales[..., None]).amax()
        assert steps <= 0.5 + 2.0**-9 * 2**bits
        assert codec.finite("scales", raw["scales"])
    values[3, 5] = torch.nan
    raw = codec.encode(values)
    assert not codec.finite("scales", raw["scales"]) and codec.finite("qweight", raw["qweight"])


@pytest.mark.parametrize(
    ("shape", "bits", "group", "words"),
    [((33, 64), 4, 32, "33 rows"), ((32, 60), 4, 0, "60 columns"), ((32, 64), 3, 48, "groups of 48"),
     ((48, 64), 3, 32, "48 rows"), ((32, 0), 4, 0, "0 columns")],
)  # fmt: skip
def test_shapes_without_such_a_form(shape: tuple[int, int], bits: int, group: int, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        Gptq(IntScheme(bits, group)).parts(shape)
