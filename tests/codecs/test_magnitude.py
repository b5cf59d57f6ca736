"""The largest magnitude of stored bytes, against numpy's own floats and a count in Python, on every path."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from kernel_sets import SETS, device, kernels, loops

from surgery.codecs import native
from surgery.codecs.magnitude import BITS, all_finite, largest_bits, largest_magnitude
from surgery.errors import UsageError

COUNTS = (1, 2, 7, 64, 129, 4099, 100_003)
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def noise(dtype: str, count: int) -> np.ndarray:
    """Bytes of any pattern, NaN and infinity among them."""
    return np.random.default_rng().integers(0, 256, count * BITS[dtype].nbytes, dtype=np.uint8)


def numbers(dtype: str, raw: np.ndarray) -> list[int]:
    size = BITS[dtype].nbytes
    data = raw.tobytes()
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]


def expected(dtype: str, raw: np.ndarray) -> int:
    sign = 0 if dtype == "F8_E8M0" else 1 << 8 * BITS[dtype].nbytes - 1
    return max(number & ~sign for number in numbers(dtype, raw))


@pytest.mark.parametrize("kernel", [pytest.param("cpu", marks=kernels), "off"])
@pytest.mark.parametrize("dtype", BITS)
def test_any_bytes(dtype: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_KERNELS", kernel)
    for count in COUNTS:
        raw = noise(dtype, count)
        into = np.zeros_like(raw)
        assert largest_bits(dtype, raw) == expected(dtype, raw)
        assert largest_bits(dtype, raw, into, threads=3) == expected(dtype, raw)
        assert into.tobytes() == raw.tobytes()
        if dtype in DTYPES:
            values = torch.from_numpy(raw.copy()).view(DTYPES[dtype]).to(torch.float64)
            assert all_finite(dtype, raw) == bool(values.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_that_is_none_is_found_wherever_it_is(dtype: str) -> None:
    for count in (1, 33, 5000):
        for odd in (float("nan"), *(() if dtype == "F8_E4M3" else (float("inf"), -float("inf")))):
            values = torch.rand(count, dtype=torch.float64).to(DTYPES[dtype])
            assert all_finite(dtype, values.view(torch.uint8).numpy())
            values[torch.randint(0, count, ()).item()] = odd
            assert not all_finite(dtype, values.view(torch.uint8).numpy())


def test_nothing_is_finite_and_zero() -> None:
    assert all_finite("BF16", np.empty(0, np.uint8)) and largest_bits("F64", np.empty(0, np.uint8)) == 0


@kernels
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set(name: str) -> None:
    chosen, library = loops(name), native.cpu().library
    for dtype, bits in BITS.items():
        raw, found = noise(dtype, 4099), ctypes.c_uint64()
        place = raw.ctypes.data
        library.surgery_cpu_largest(
            chosen, place, None, bits.nbytes, bits.magnitude, 4099, ctypes.byref(found), 2
        )
        assert found.value == expected(dtype, raw)


@device
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors(device: str, dtype: str) -> None:
    for count in COUNTS:
        for skipped in (0, 1):
            raw = noise(dtype, count + skipped)[skipped * BITS[dtype].nbytes :]
            held = torch.from_numpy(noise(dtype, skipped + count)).to(device).view(DTYPES[dtype])
            values = held[skipped:]
            values.view(torch.uint8).copy_(torch.from_numpy(raw.copy()))
            into = torch.zeros_like(values)
            found = largest_magnitude(values, into)
            assert found.device.type == device and int(found) == expected(dtype, raw)
            assert torch.equal(into.view(torch.uint8), values.view(torch.uint8))
            assert int(largest_magnitude(values)) == int(found)


def test_other_tensors_are_refused() -> None:
    with pytest.raises(UsageError, match="int32"):
        largest_magnitude(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(UsageError, match="into"):
        largest_magnitude(torch.zeros(3), torch.zeros(4))
    with pytest.raises(UsageError, match="contiguous"):
        largest_magnitude(torch.zeros(4, 4).T)
