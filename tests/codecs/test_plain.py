"""Plain dtypes against NumPy and rounding worked out in float64, and the check for NaN and infinity."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.codecs.plain import Opaque, Plain
from surgery.errors import CheckpointError

NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
# bits of the mantissa (the hidden one included) and exponent of the smallest normal number
PRECISION = {"BF16": (8, -126), "F16": (11, -14)}
SHAPES: list[tuple[int, ...]] = [(), (1,), (300,), (300, 7), (1, 1), (4, 3, 5), (2, 3, 4, 5)]

Array = npt.NDArray[Any]


def encode(dtype: str, values: Array) -> Array:
    return Plain(dtype).encode(torch.from_numpy(np.array(values, np.float32)))["weight"]


def decode(dtype: str, raw: Array, shape: tuple[int, ...] | None = None) -> Array:
    itemsize = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}[dtype]
    shape = (raw.size // itemsize,) if shape is None else shape
    rows = shape[0] if shape else 1
    return Plain(dtype).decode(shape, 0, rows, {"weight": raw.copy()}).numpy()


def nearest_even(dtype: str, values: Array) -> Array:
    """float64 values rounded to the nearest of `dtype`, ties to even, in float64."""
    mantissa, smallest = PRECISION[dtype]
    _, exponent = np.frexp(values.astype(np.float64))
    spacing = np.ldexp(1.0, np.maximum(exponent - 1, smallest) - (mantissa - 1))
    rounded: Array = np.rint(values.astype(np.float64) / spacing) * spacing
    return rounded


def patterns(unit: type[np.unsignedinteger[Any]]) -> Array:
    return np.arange(1 << 16, dtype=unit)


def test_every_bf16_pattern_decodes_to_its_bits_and_back() -> None:
    raw = patterns(np.uint16)
    values = decode("BF16", raw.view(np.uint8))
    np.testing.assert_array_equal(values.view(np.uint32), raw.astype(np.uint32) << 16)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(encode("BF16", values[finite]).view(np.uint16), raw[finite])


def test_every_f16_pattern_decodes_as_numpy_does_and_back() -> None:
    raw = patterns(np.uint16)
    values = decode("F16", raw.view(np.uint8))
    np.testing.assert_array_equal(values, raw.view(np.float16).astype(np.float32))
    finite = np.isfinite(values)
    np.testing.assert_array_equal(encode("F16", values[finite]).view(np.uint16), raw[finite])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounding_is_to_nearest_even_at_every_value_midpoint_and_neighbour(dtype: str) -> None:
    bits = np.arange(0x7F80 if dtype == "BF16" else 0x7C00, dtype=np.uint16)
    codes = decode(dtype, bits.view(np.uint8)).astype(np.float64)
    middle = ((codes[1:] + codes[:-1]) / 2).astype(np.float32)
    points = np.concatenate([codes.astype(np.float32), middle])
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, -np.float32(1))]
    )
    points = np.concatenate([points, -points])
    want = nearest_even(dtype, points)
    np.testing.assert_array_equal(decode(dtype, encode(dtype, points)), want.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(decode(dtype, encode(dtype, points))), np.signbit(points))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_rounding_is_to_nearest_even_anywhere(dtype: str, values: list[float]) -> None:
    largest = float(
        decode(dtype, np.array([0x7F7F if dtype == "BF16" else 0x7BFF], np.uint16).view(np.uint8))[0]
    )
    points = np.clip(np.array(values), -largest, largest).astype(np.float32)
    want = nearest_even(dtype, points).astype(np.float32)
    np.testing.assert_array_equal(decode(dtype, encode(dtype, points)), want)


def test_f32_passes_bit_for_bit_and_f64_is_rounded_once() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 4096, dtype=np.uint32)
    bits = bits[np.isfinite(bits.view(np.float32))]
    np.testing.assert_array_equal(decode("F32", bits.view(np.uint8)).view(np.uint32), bits)
    np.testing.assert_array_equal(encode("F32", bits.view(np.float32)), bits.view(np.uint8))
    wide = generator.standard_normal(4096) * np.exp2(generator.integers(-140, 120, 4096))
    np.testing.assert_array_equal(decode("F64", wide.view(np.uint8)), wide.astype(np.float32))
    np.testing.assert_array_equal(
        encode("F64", wide.astype(np.float32)).view(np.float64), wide.astype(np.float32)
    )


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_of_rows_are_the_rows_of_the_whole(dtype: str, shape: tuple[int, ...]) -> None:
    codec = Plain(dtype)
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    raw = codec.encode(torch.from_numpy(values.reshape(-1)))["weight"]
    rows = shape[0] if shape else 1
    whole = codec.decode(shape, 0, rows, {"weight": raw})
    assert whole.dtype is torch.float32
    assert tuple(whole.shape) == ((rows,) if len(shape) < 2 else (rows, values[0].size))
    for start in range(0, rows, 128):
        stop = min(start + 128, rows)
        first, last = codec.spans(shape, start, stop)["weight"]
        tile = codec.decode(shape, start, stop, {"weight": raw[first:last].copy()})
        assert torch.equal(tile, whole[start:stop])
        np.testing.assert_array_equal(codec.encode(tile)["weight"], raw[first:last])


@pytest.mark.parametrize("shape", [(0,), (5, 0), (0, 5)], ids=str)
def test_tensors_without_elements_have_rows_without_values(shape: tuple[int, ...]) -> None:
    values = Plain("BF16").decode(shape, 0, shape[0], {"weight": np.empty(0, np.uint8)})
    assert tuple(values.shape) == shape
    assert Plain("BF16").encode(values)["weight"].size == 0


SPECIALS = {
    "BF16": (np.uint16, [0x7F80, 0xFF80, 0x7F81, 0xFFFF, 0x7FC0], [0x7F7F, 0xFF7F, 0x8000, 0x0001]),
    "F16": (np.uint16, [0x7C00, 0xFC00, 0x7C01, 0xFFFF], [0x7BFF, 0xFBFF, 0x8000, 0x0001]),
    "F32": (np.uint32, [0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF], [0x7F7FFFFF, 0xFF7FFFFF, 1 << 31]),
    "F64": (np.uint64, [0x7FF0 << 48, 0xFFF0 << 48, (0x7FF0 << 48) + 1], [(0x7FF0 << 48) - 1, 1 << 63]),
}


@pytest.mark.parametrize("dtype", SPECIALS)
def test_nan_and_infinity_are_found_at_any_position_and_nothing_else_is(dtype: str) -> None:
    unit, broken, fine = SPECIALS[dtype]
    codec = Plain(dtype)
    run = (1 << 18) // np.dtype(unit).itemsize
    for size in (1, 7, run - 1, run, 2 * run + 3):
        clean = np.resize(np.array(fine, unit), size)
        assert codec.finite("weight", clean.view(np.uint8))
        for position in {0, size // 2, size - 1, min(run, size) - 1, min(run, size - 1)}:
            for special in broken:
                data = clean.copy()
                data[position] = special
                assert not codec.finite("weight", data.view(np.uint8)), (size, position, hex(special))
    assert codec.finite("weight", np.empty(0, np.uint8))


def test_the_check_takes_bytes_that_are_not_aligned_in_memory() -> None:
    """Copies check slices of one buffer, which begin wherever the tensor before them ended."""
    buffer = np.zeros(4 * 10 + 1, np.uint8)
    data = buffer[1:]
    assert Plain("F32").finite("weight", data)
    data[-4:] = np.array([np.nan], np.float32).view(np.uint8)
    assert not Plain("F32").finite("weight", data)


def test_opaque_bytes_are_copied_only() -> None:
    codec = Opaque("MXFP4")
    assert codec.name == "MXFP4"
    assert not codec.decodable
    assert codec.finite("blocks", np.full(4, 0xFF, np.uint8))
    for refused in (
        lambda: codec.parts((1, 1)),
        lambda: codec.spans((1, 1), 0, 1),
        lambda: codec.decode((1, 1), 0, 1, {}),
        lambda: codec.encode(torch.zeros(1, 1)),
    ):
        with pytest.raises(CheckpointError, match="MXFP4") as caught:
            refused()
        assert caught.value.hint
