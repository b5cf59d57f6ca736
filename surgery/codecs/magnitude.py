"""The largest magnitude among stored values, which says their amax and whether all are finite.

The bits of floats, sign aside, are in the order of their magnitudes, with infinity and NaN above every
number. So one pass that may copy on the way finds both.
"""

from __future__ import annotations

from ctypes import byref, c_uint64
from typing import TYPE_CHECKING, Any, NamedTuple

from surgery.codecs import native
from surgery.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

RUN = 1 << 18
"""Bytes that numpy looks at together: what it makes on the way stays in the cache."""


class Bits(NamedTuple):
    """Of a stored dtype: its width, the bits of the magnitude, and the least that is not a number."""

    nbytes: int
    magnitude: int
    limit: int


BITS = {
    "F8_E4M3": Bits(1, 0x7F, 0x7F),
    "F8_E8M0": Bits(1, 0xFF, 0xFF),
    "BF16": Bits(2, 0x7FFF, 0x7F80),
    "F16": Bits(2, 0x7FFF, 0x7C00),
    "F32": Bits(4, 0x7FFF_FFFF, 0x7F80_0000),
    "F64": Bits(8, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}


TORCH_NAMES = {
    "uint8": "F8_E4M3",
    "float8_e4m3fn": "F8_E4M3",
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}


def all_finite(dtype: str, raw: np.ndarray[Any, Any]) -> bool:
    """Whether stored bytes of this dtype (uint8) hold neither NaN nor infinity."""
    return largest_bits(dtype, raw) < BITS[dtype].limit


def largest_bits(
    dtype: str, raw: np.ndarray[Any, Any], into: np.ndarray[Any, Any] | None = None, threads: int = 1
) -> int:
    """Bits of the largest magnitude among stored bytes of this dtype (uint8), 0 where there are none.

    The bytes are copied `into` an array of that size.
    """
    if not raw.size:
        return 0
    bits = BITS[dtype]
    library = native.cpu().library
    if library is None or not raw.flags.c_contiguous or not (into is None or into.flags.c_contiguous):
        return _by_numpy(bits, raw, into)
    found = c_uint64()
    places = (raw.ctypes.data, None if into is None else into.ctypes.data)
    count = raw.size // bits.nbytes
    library.surgery_cpu_largest(None, *places, bits.nbytes, bits.magnitude, count, byref(found), threads)
    return found.value


def largest_magnitude(values: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """Bits of the largest magnitude among contiguous values (uint8: e4m3 codes), int64 [1] on their device.

    They are copied `into` a tensor of that form. Raises UsageError for other dtypes.
    """
    import torch

    from surgery.codecs.dispatch import call, check, library_for, place

    dtype = TORCH_NAMES.get(str(values.dtype).removeprefix("torch."))
    if dtype is None or not values.is_contiguous():
        raise UsageError(f"no largest magnitude of {values.dtype}, or of what is not contiguous")
    if into is not None:
        check("into", into, values.shape, (values.dtype,), values)
        if not into.is_contiguous():
            raise UsageError("into must be contiguous")
    found, bits = library_for(values), BITS[dtype]
    if values.is_cuda and found.library is not None:
        made = torch.empty(1, dtype=torch.int64, device=values.device)
        job = (place(values), place(into), bits.nbytes, bits.magnitude, values.numel(), place(made))
        call(found, "largest", values.device, *job)
        return made
    raw = values.view(-1).view(torch.uint8).cpu().numpy()
    if into is not None:
        into.copy_(values)
    largest = largest_bits(dtype, raw, threads=torch.get_num_threads())
    return torch.tensor([largest], device=values.device)


def _by_numpy(bits: Bits, raw: np.ndarray[Any, Any], into: np.ndarray[Any, Any] | None) -> int:
    import numpy as np

    if into is not None:
        into[...] = raw
    values = raw.view(f"uint{8 * bits.nbytes}")
    run = RUN // bits.nbytes
    mask = values.dtype.type(bits.magnitude)
    scratch = np.empty(min(run, values.size), values.dtype)
    largest = 0
    for begin in range(0, values.size, run):
        piece = values[begin : begin + run]
        largest = max(largest, int(np.bitwise_and(piece, mask, out=scratch[: piece.size]).max()))
    return largest
