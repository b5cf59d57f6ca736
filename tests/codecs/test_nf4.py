"""bitsandbytes' 4-bit forms: against a formula, its golden files, and itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from surgery.codecs.nf4 import LEVELS, Bnb4, encode_nf4
from surgery.errors import CheckpointError

GOLDEN = Path(__file__).parent.parent / "golden" / "bitsandbytes.safetensors"
STATE = "quant_state.bitsandbytes__"


def raw_parts(stored: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """uint8 parts by the keys of the codec."""
    keys = {key: "quant_state" if key.startswith(STATE) else key for key in stored}
    return {keys[key]: part.reshape(-1).view(torch.uint8).numpy() for key, part in stored.items()}


def golden(case: str) -> tuple[dict[str, torch.Tensor], Bnb4, tuple[int, ...]]:
    found = {
        name.removeprefix(f"{case}|"): tensor
        for name, tensor in load_file(GOLDEN).items()
        if name.startswith(f"{case}|")
    }
    state = json.loads(bytes(next(v for k, v in found.items() if k.startswith(STATE)).tolist()))
    codec = Bnb4(state["quant_type"], state["blocksize"], state["dtype"], "nested_absmax" in found)
    return found, codec, tuple(state["shape"])


CASES = sorted({name.partition("|")[0] for name in load_file(GOLDEN)})


@pytest.mark.parametrize("case", CASES)
def test_what_bitsandbytes_wrote_is_read_as_it_reads_it(case: str) -> None:
    found, codec, shape = golden(case)
    stored = {k: v for k, v in found.items() if k not in ("values", "read")}
    names = {f".{key}" if key != "weight" else "": part for key, part in stored.items()}
    for part in codec.parts(shape):
        if part.key != "quant_state" or not codec.nested:
            assert part.shape == tuple(names[part.suffix].shape)
    decoded = codec.decode(shape, 0, shape[0], raw_parts(stored))
    assert torch.equal(decoded.to(torch.bfloat16), found["read"])


@pytest.mark.parametrize("case", [case for case in CASES if "nested" not in case and "fp4" not in case])
def test_our_bytes_are_those_of_bitsandbytes(case: str) -> None:
    found, codec, shape = golden(case)
    stored = raw_parts({k: v for k, v in found.items() if k not in ("values", "read")})
    written = codec.encode(found["values"].float()) | codec.constants(shape)
    assert {key: part.tobytes() for key, part in written.items()} == {
        key: part.tobytes() for key, part in stored.items()
    }


def test_against_bitsandbytes_itself() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    generator = torch.Generator().manual_seed(11)
    for shape in ((64, 64), (3, 50), (7, 33), (1, 1), (128, 192)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            values = torch.randn(shape, generator=generator).to(dtype)
            values[0, : shape[1] // 2] = 0
            for block in (32, 64, 128):
                packed, state = functional.quantize_4bit(values, blocksize=block, quant_type="nf4")
                codec = Bnb4(blocksize=block, dtype=str(dtype).removeprefix("torch."))
                want = raw_parts({"weight": packed, **state.as_dict(packed=True)})
                made = codec.encode(values.float()) | codec.constants(shape)
                assert {k: v.tobytes() for k, v in made.items()} == {k: v.tobytes() for k, v in want.items()}


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 640, 1001])
def test_codes_are_the_nearest_levels(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator)
    packed, absmax = encode_nf4(values)
    assert packed.numel() == -(-count // 2) and absmax.numel() == -(-count // 64)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)
    for index in range(count):
        scale = values[index // 64 * 64 : index // 64 * 64 + 64].abs().max().item()
        assert absmax[index // 64] == scale
        gaps = [abs(level - values[index].item() / scale) for level in LEVELS]
        assert gaps[int(codes[index])] <= min(gaps) + 1e-7
    if count % 2:
        assert codes[count] == 7


def test_ties_go_to_the_lower_level_and_zero_blocks_stay_zero() -> None:
    levels = torch.tensor(LEVELS)
    middles = (levels[:-1] + levels[1:]) / 2
    above = torch.nextafter(middles, torch.tensor(2.0))
    values = torch.cat((middles, above, levels, torch.ones(2)))
    packed, _ = encode_nf4(values, blocksize=len(values))
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1).tolist()
    assert codes == [*range(15), *range(1, 16), *range(16), 15, 15]
    packed, absmax = encode_nf4(torch.zeros(128))
    assert packed.eq(0x77).all() and absmax.eq(0).all()


@pytest.mark.parametrize("nested", [False, True])
def test_rows_by_themselves(nested: bool) -> None:
    found, codec, shape = golden("nf4 32 nested 265x32" if nested else "nf4 64 6x128")
    raw = raw_parts({k: v for k, v in found.items() if k not in ("values", "read")})
    if not nested:
        shape = (12, 64)
        raw["quant_state"] = codec.constants(shape)["quant_state"]
    whole = codec.decode(shape, 0, shape[0], raw)
    for start, stop in ((0, 3), (32, shape[0]), (64, 65), (256, 265)):
        if start >= shape[0]:
            continue
        spans = codec.spans(shape, start, stop)
        cut = {
            key: part[slice(*spans[key])] if key in ("weight", "absmax") else part
            for key, part in raw.items()
        }
        assert torch.equal(codec.decode(shape, start, stop, raw | cut), whole[start:stop])


def test_tiles_are_encoded_as_the_whole() -> None:
    values = torch.randn(200, 37, generator=torch.Generator().manual_seed(2))
    codec = Bnb4()
    whole = codec.encode(values)
    for start, stop in ((0, 128), (128, 200)):
        spans = codec.spans((200, 37), start, stop)
        for key, part in codec.encode(values[start:stop]).items():
            assert part.tobytes() == whole[key][slice(*spans[key])].tobytes()


def test_what_is_not_finite_shows() -> None:
    values = torch.ones(64, 2)
    values[1, 1] = torch.nan
    raw = Bnb4().encode(values)
    assert not Bnb4().finite("absmax", raw["absmax"]) and Bnb4().finite("weight", raw["weight"])
    assert Bnb4(nested=True).finite("absmax", np.full(8, 255, np.uint8))


@pytest.mark.parametrize("codec", [Bnb4(nested=True), Bnb4("fp4"), Bnb4(json_bytes=90)])
def test_forms_that_are_only_read(codec: Bnb4) -> None:
    assert not codec.encodable and Bnb4().encodable
    with pytest.raises(CheckpointError, match="not written"):
        codec.encode(torch.ones(2, 64))
