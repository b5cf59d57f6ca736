"""MXFP4 against its definition: every code with every exponent, ties, edges, and values that come back."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch

from surgery.codecs.mxfp4 import Mxfp4Blocks, decode_mxfp4, e2m1_codes, encode_mxfp4
from surgery.errors import CheckpointError

LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(value: float) -> int:
    """The code of the nearest level by exact arithmetic, the even code of two."""
    magnitude = abs(value)
    code = min(range(8), key=lambda each: (abs(LEVELS[each] - magnitude), each % 2))
    return code | (8 if math.copysign(1.0, value) < 0 else 0)


def group_of(*values: float) -> torch.Tensor:
    return torch.tensor([[*values, *[0.0] * (32 - len(values))]])


def test_every_code_with_every_exponent() -> None:
    nibbles = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    for exponent in range(255):
        scales = torch.full((256, 1), exponent, dtype=torch.uint8)
        found = decode_mxfp4(nibbles, scales).view(256, 16, 2)[:, 0].double()
        power = math.ldexp(1.0, exponent - 127)
        for byte in range(256):
            for place, code in enumerate((byte & 15, byte >> 4)):
                want = LEVELS[code & 7] * power * (-1 if code & 8 else 1)
                fits = abs(want) < 2.0**128
                assert found[byte, place] == (want if fits else math.copysign(math.inf, want))
    assert decode_mxfp4(nibbles, torch.full((256, 1), 255, dtype=torch.uint8)).isnan().all()


def test_codes_are_the_nearest_and_ties_are_even() -> None:
    middles = [(low + high) / 2 for low, high in pairwise(LEVELS)]
    edges = [np.nextafter(np.float32(m), np.float32(to)) for m in middles for to in (0, 10)]
    points = [float(v) for v in (*LEVELS, *middles, *edges, 6.5, 7.9, *np.linspace(0, 8, 997))]
    values = torch.tensor([*points, *(-p for p in points)])
    assert e2m1_codes(values).tolist() == [nearest(v) for v in values.tolist()]


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (3, 2), (17, 5), (0, 3), (4, 0)])
def test_exponents_codes_and_order(rows: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(rows * 31 + groups)
    values = torch.randn(rows, groups * 32, generator=generator) * torch.exp2(
        torch.randint(-20, 20, (rows, groups * 32), generator=generator).float()
    )
    nibbles, exponents = encode_mxfp4(values)
    assert nibbles.shape == (rows, groups * 16) and exponents.shape == (rows, groups)
    for r in range(rows):
        for g in range(groups):
            group = values[r, g * 32 : g * 32 + 32].double()
            mantissa, power = math.frexp(group.abs().max().item())
            exponent = power - 1 - 2 + (mantissa >= 0.875)
            assert exponents[r, g] == exponent + 127
            codes = [nearest(v / 2.0**exponent) for v in group.tolist()]
            packed = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
            assert nibbles[r, g * 16 : g * 16 + 16].tolist() == packed
    decoded = decode_mxfp4(nibbles, exponents)
    if values.numel():
        # A step is at most 2 of the 4 to 7 powers that the maximum of a group has; below 7 it clips by 1.
        error = (decoded - values).view(rows, groups, 32).abs().amax(-1)
        assert (error <= values.view(rows, groups, 32).abs().amax(-1) / 4).all()


def test_edges_of_the_exponent() -> None:
    cases = {0.0: 127, 7.0: 128, np.nextafter(np.float32(7), np.float32(0)): 127, 8.0: 128, 4.0: 127}
    for value, exponent in cases.items():
        assert encode_mxfp4(group_of(float(value)))[1].item() == exponent
    tiny = group_of(1e-45, -1e-40, 2.0**-127, 6 * 2.0**-127)
    nibbles, exponents = encode_mxfp4(tiny)
    assert exponents.item() == 0
    assert decode_mxfp4(nibbles, exponents)[0, :4].tolist() == [0.0, -0.0, 2.0**-127, 6 * 2.0**-127]
    largest = torch.finfo(torch.float32).max
    nibbles, exponents = encode_mxfp4(group_of(largest, -(2.0**127)))
    assert decode_mxfp4(nibbles, exponents)[0, :2].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_group_nan(value: float) -> None:
    values = torch.ones(2, 64)
    values[1, 40] = value
    raw = Mxfp4Blocks().encode(values)
    decoded = Mxfp4Blocks().decode((2, 64), 0, 2, raw)
    assert decoded[1, 32:].isnan().all() and decoded[0].eq(1).all() and decoded[1, :32].eq(1).all()
    assert not Mxfp4Blocks().finite("scales", raw["scales"]) and Mxfp4Blocks().finite("blocks", raw["blocks"])


def test_values_come_back_and_bytes_where_a_group_uses_its_range() -> None:
    generator = torch.Generator().manual_seed(5)
    nibbles = torch.randint(0, 256, (40, 48), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(3, 250, (40, 3), generator=generator, dtype=torch.uint8)
    nibbles[:20] &= 0xBB  # magnitudes up to 1.5: these groups could have a smaller exponent
    values = decode_mxfp4(nibbles, exponents)
    again = encode_mxfp4(values)
    assert torch.equal(decode_mxfp4(*again).view(torch.int32), values.view(torch.int32))
    assert torch.equal(again[0][20:], nibbles[20:]) and torch.equal(again[1][20:], exponents[20:])
    assert not torch.equal(again[1][:20], exponents[:20])


def test_the_codec_agrees_with_the_oracle_by_rows() -> None:
    generator = np.random.default_rng(3)
    rows, groups = 7, 3
    blocks = generator.integers(0, 256, rows * groups * 16, dtype=np.uint8)
    scales = generator.integers(100, 140, rows * groups, dtype=np.uint8)
    codec, shape = Mxfp4Blocks(), (rows, groups * 32)
    assert [part.shape for part in codec.parts(shape)] == [(7, 3, 16), (7, 3)]
    want = oracle.decode_mxfp4(
        torch.from_numpy(blocks).view(rows, groups, 16), torch.from_numpy(scales).view(rows, groups)
    ).view(shape)
    for start, stop in ((0, rows), (2, 5), (6, 7)):
        spans = codec.spans(shape, start, stop)
        raw = {
            "blocks": blocks[slice(*spans["blocks"])],
            "scales": scales[slice(*spans["scales"])],
        }
        assert torch.equal(codec.decode(shape, start, stop, raw), want[start:stop])


def test_columns_that_32_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="40 columns"):
        encode_mxfp4(torch.zeros(2, 40))
    with pytest.raises(CheckpointError, match="groups of 32"):
        Mxfp4Blocks().parts((2, 40))
