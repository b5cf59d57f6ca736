"""FP8 blocks against the oracle: every code, ragged edges, rounding, extremes, and the way there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.codecs.fp8_block import BLOCK, Fp8Block, scale_shape

PLAIN = Fp8Block()
POWERS = Fp8Block("F32", ue8m0=True)
STORED_POWERS = Fp8Block("F8_E8M0", ue8m0=True)
CODECS = [PLAIN, POWERS, STORED_POWERS]
SHAPES = [(1, 1), (1, 300), (128, 128), (129, 127), (192, 256), (256, 320), (300, 130), (384, 256)]

codecs = pytest.mark.parametrize("codec", CODECS, ids=["fp32", "ue8m0 in F32", "ue8m0 in F8_E8M0"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
Array = npt.NDArray[Any]


def normal(shape: tuple[int, int], scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def stored_scales(codec: Fp8Block, scales: torch.Tensor) -> Array:
    """float32 scales as the codec stores them."""
    flat = scales.reshape(-1).numpy()
    if codec.scale_dtype == "F32":
        return flat.view(np.uint8)
    return (np.frexp(flat)[1] + 126).astype(np.uint8)


def same_as_oracle(codec: Fp8Block, weight: torch.Tensor) -> dict[str, Array]:
    codes, scales = oracle.encode_fp8_block(weight, ue8m0=codec.ue8m0)
    found = codec.encode(weight.clone())
    np.testing.assert_array_equal(found["scale"], stored_scales(codec, scales))
    np.testing.assert_array_equal(found["weight"].reshape(codes.shape), codes.numpy())
    return found


def decoded(codec: Fp8Block, shape: tuple[int, int], raw: dict[str, Array]) -> torch.Tensor:
    return codec.decode(shape, 0, shape[0], {key: data.copy() for key, data in raw.items()})


@pytest.mark.parametrize("scale", [1.0, 0.1, 2.0**-120, 3.0e-42, 1.0e35, 7.0 / 448])
def test_every_code_decodes_as_the_oracle_does(scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    scales = torch.tensor([[scale]])
    raw = {"weight": codes.view(-1).numpy(), "scale": stored_scales(PLAIN, scales)}
    found = PLAIN.decode((2, 128), 0, 2, raw)
    want = oracle.decode_fp8_block(codes, scales)
    assert torch.equal(found.isnan(), want.isnan())
    kept = ~want.isnan()
    assert torch.equal(found[kept].view(torch.int32), want[kept].view(torch.int32))


@pytest.mark.parametrize("last", [254, 255])
def test_every_e8m0_scale_decodes_as_the_oracle_does(last: int) -> None:
    raw = np.arange(last + 1, dtype=np.uint8)
    codes = torch.full((1, (last + 1) * BLOCK), 0x38, dtype=torch.uint8)
    found = STORED_POWERS.decode(tuple(codes.shape), 0, 1, {"weight": codes.view(-1).numpy(), "scale": raw})
    want = oracle.decode_e8m0(torch.from_numpy(raw)).repeat_interleave(BLOCK)[None]
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found[~want.isnan()], want[~want.isnan()])


@codecs
@shapes
def test_decoding_is_the_oracles_in_whole_and_ragged_blocks(codec: Fp8Block, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E
    scales = torch.exp2(torch.randint(-20, 5, scale_shape(shape), generator=generator).float())
    if not codec.ue8m0:
        scales = scales * torch.rand(scales.shape, generator=generator)
    found = decoded(codec, shape, {"weight": codes.view(-1).numpy(), "scale": stored_scales(codec, scales)})
    assert torch.equal(found, oracle.decode_fp8_block(codes, scales))


@codecs
@shapes
@pytest.mark.parametrize("magnitude", [1.0, 0.02, 1e-30, 1e30])
def test_encoding_is_the_oracles(codec: Fp8Block, shape: tuple[int, int], magnitude: float) -> None:
    same_as_oracle(codec, normal(shape, magnitude))


@codecs
def test_blocks_of_zeros_keep_their_signs_and_get_scale_one(codec: Fp8Block) -> None:
    weight = normal((300, 260))
    weight[128:256, 128:256] = 0.0
    weight[256:, 128:256] = -0.0
    weight[256:, 256:] = 0.0
    weight[299, 259] = -0.0
    found = same_as_oracle(codec, weight)
    codes = found["weight"].reshape(300, 260)
    assert (codes[256:, 128:256] == 0x80).all()
    assert (codes[299, 259], codes[298, 259]) == (0x80, 0)
    values = decoded(codec, (300, 260), found)
    assert torch.equal(torch.signbit(values[256:]), torch.signbit(weight[256:]))


@codecs
def test_values_on_codes_on_midpoints_and_beside_them(codec: Fp8Block) -> None:
    """One block whose scale is exactly 1: w is then what is rounded, subnormal codes included."""
    values = oracle.decode_e4m3(torch.arange(0x7F, dtype=torch.uint8))
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    points = torch.cat([points, points.nextafter(torch.tensor(1e9)), points.nextafter(torch.tensor(-1e9))])
    points = torch.cat([points, -points]).clamp(-448, 448)
    weight = torch.zeros(BLOCK * BLOCK)
    weight[: points.numel()] = points
    weight[-1] = 448.0
    found = same_as_oracle(codec, weight.view(BLOCK, BLOCK))
    assert np.unique(found["weight"]).size == 254


@codecs
@pytest.mark.parametrize("largest", [1e-45, 7e-44, 448 * 2.0**-149, 672 * 2.0**-149, 448 * 2.0**-126, 6e-36])
def test_blocks_so_small_that_scales_are_subnormal_or_vanish(codec: Fp8Block, largest: float) -> None:
    weight = normal((130, 130))
    weight = weight / weight.abs().max() * largest
    weight[0, 0] = -largest
    same_as_oracle(codec, weight)


@codecs
def test_the_largest_floats_get_the_oracles_scale(codec: Fp8Block) -> None:
    weight = torch.full((128, 128), torch.finfo(torch.float32).max)
    weight[::2] *= -1
    same_as_oracle(codec, weight)


@codecs
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=24),
    cols=st.integers(1, 6),
)
def test_encoding_any_finite_floats_is_the_oracles(codec: Fp8Block, values: list[float], cols: int) -> None:
    rows = -(-len(values) // cols)
    weight = torch.zeros(rows * cols)
    weight[: len(values)] = torch.tensor(values, dtype=torch.float32)
    same_as_oracle(codec, weight.view(rows, cols))


def test_quotients_just_above_the_largest_code_saturate() -> None:
    """amax / 448 rounds, so that amax / scale can come out above 448 by a bit: never NaN."""
    generator = np.random.default_rng(5)
    bits = generator.integers(0x3F80_0000, 0x4080_0000, 4096, dtype=np.int64).astype(np.int32)
    weight = torch.zeros(1, bits.size * BLOCK)
    weight[0, ::BLOCK] = torch.from_numpy(bits).view(torch.float32)
    codes = PLAIN.encode(weight)["weight"]
    assert set(np.unique(codes)) == {0, 0x7E}


@shapes
def test_decoding_and_encoding_again_gives_the_same_codes_and_scales(shape: tuple[int, int]) -> None:
    for number, magnitude in enumerate((1e-20, 1e-3, 0.02, 1.0, 1e6)):
        raw = same_as_oracle(PLAIN, normal(shape, magnitude, seed=number))
        again = PLAIN.encode(decoded(PLAIN, shape, raw))
        for key, data in raw.items():
            np.testing.assert_array_equal(again[key], data)


def test_every_kind_of_scale_that_amax_over_448_gives_survives() -> None:
    """Random amax over three binades, one block each: 448 · scale / 448 must round to the scale again."""
    generator = np.random.default_rng(6)
    bits = generator.integers(0x3E00_0000, 0x3F80_0000, 1 << 12, dtype=np.int64).astype(np.int32)
    amax = torch.from_numpy(bits).view(torch.float32)
    weight = torch.rand(1, amax.numel(), 128, generator=torch.Generator().manual_seed(7)) * 1.8 - 0.9
    weight *= amax[:, None]
    weight[0, :, 5] = amax
    weight = weight.view(1, -1)
    raw = PLAIN.encode(weight)
    again = PLAIN.encode(decoded(PLAIN, (1, weight.shape[1]), raw))
    np.testing.assert_array_equal(again["scale"], raw["scale"])
    np.testing.assert_array_equal(again["weight"], raw["weight"])


@pytest.mark.parametrize("codec", [POWERS, STORED_POWERS], ids=["F32", "F8_E8M0"])
def test_powers_of_two_scales_give_back_the_same_values(codec: Fp8Block) -> None:
    raw = codec.encode(normal((300, 260), 0.02))
    values = decoded(codec, (300, 260), raw)
    assert torch.equal(decoded(codec, (300, 260), codec.encode(values.clone())), values)


def test_both_storages_of_powers_of_two_mean_the_same() -> None:
    weight = normal((300, 260), 0.02)
    left, right = POWERS.encode(weight.clone()), STORED_POWERS.encode(weight.clone())
    np.testing.assert_array_equal(left["weight"], right["weight"])
    assert torch.equal(decoded(POWERS, (300, 260), left), decoded(STORED_POWERS, (300, 260), right))


@codecs
@shapes
def test_tiles_of_whole_blocks_are_the_whole(codec: Fp8Block, shape: tuple[int, int]) -> None:
    weight = normal(shape)
    raw = codec.encode(weight.clone())
    specs = {spec.key: spec for spec in codec.parts(shape)}
    assert raw["weight"].size == shape[0] * shape[1]
    assert raw["scale"].size == np.prod(specs["scale"].shape) * (4 if codec.scale_dtype == "F32" else 1)
    whole = decoded(codec, shape, raw)
    for start in range(0, shape[0], BLOCK):
        stop = min(start + BLOCK, shape[0])
        spans = codec.spans(shape, start, stop)
        part = {key: raw[key][first:last].copy() for key, (first, last) in spans.items()}
        assert torch.equal(codec.decode(shape, start, stop, part), whole[start:stop])
        for key, data in codec.encode(weight[start:stop].clone()).items():
            np.testing.assert_array_equal(data, part[key])


def test_encoding_leaves_its_input_alone() -> None:
    for shape in ((128, 128), (130, 5)):
        weight = normal(shape)
        before = weight.clone()
        PLAIN.encode(weight)
        assert torch.equal(weight, before)


@codecs
@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("size", [1, 1000, (1 << 18) + 5])
def test_nan_codes_are_found_at_any_position(codec: Fp8Block, code: int, size: int) -> None:
    clean = np.resize(np.array([*range(0x7F), *range(0x80, 0xFF)], np.uint8), size)
    assert codec.finite("weight", clean)
    for position in {0, size // 2, size - 1, min(size - 1, 1 << 18)}:
        data = clean.copy()
        data[position] = code
        assert not codec.finite("weight", data)


def test_broken_scales_are_found() -> None:
    for special in (np.nan, np.inf, -np.inf):
        scales = np.array([1.0, special, 2.0], np.float32)
        assert not PLAIN.finite("scale", scales.view(np.uint8))
        assert not POWERS.finite("scale", scales.view(np.uint8))
    assert PLAIN.finite("scale", np.array([0.0, 1e-45, 3e38], np.float32).view(np.uint8))
    assert not STORED_POWERS.finite("scale", np.array([0, 127, 255], np.uint8))
    assert STORED_POWERS.finite("scale", np.arange(255, dtype=np.uint8))


def test_a_nan_that_is_allowed_stays_alone() -> None:
    """`allow_nonfinite` lets a NaN through; the rest of its block must keep its values."""
    weight = normal((128, 128), 0.0005)
    weight[3, 4] = torch.nan
    found = decoded(PLAIN, (128, 128), PLAIN.encode(weight.clone()))
    rest = torch.ones(128, 128, dtype=torch.bool)
    rest[3, 4] = False
    assert bool(found[3, 4].isnan())
    assert float((found - weight)[rest].abs().max()) < 0.0005 * 0.3
