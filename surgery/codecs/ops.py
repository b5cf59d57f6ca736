"""The codec operations on tensors: the native kernel of the operands' device, or the torch reference.

FP8 codes travel as uint8. All operands of a call lie on one device and are contiguous matrices; results
are the reference's to the last bit (payloads of NaN aside; sums of squares on CUDA, whose order is another,
agree to 1e-12). On the CPU a call uses `torch.get_num_threads()` threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from surgery.codecs import native, reference
from surgery.codecs.reference import BLOCK
from surgery.errors import SurgeryError, UsageError

_KINDS = {torch.uint8: native.FP8_BLOCK, torch.bfloat16: native.BF16, torch.float32: native.F32}


@dataclass(frozen=True)
class Operand:
    """A parent or a result: uint8 codes with `scales`, or bf16 or float32 values without."""

    values: torch.Tensor
    scales: torch.Tensor | None = None

    def decoded(self) -> torch.Tensor:
        """float32 values, by the reference."""
        if self.scales is None:
            return self.values.to(torch.float32)
        return reference.decode_fp8_block(self.values, self.scales, torch.float32)


def library_for(tensor: torch.Tensor) -> native.Native:
    """The native library that serves this tensor's device."""
    if tensor.device.type == "cuda":
        return native.cuda(_capability(tensor.device))
    if tensor.device.type == "cpu":
        return native.cpu()
    return native.Native(None, "reference")


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def scale_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Blocks down and across of a [rows, cols] matrix."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def decode_fp8_block(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 codes [R, C] · float32 scales [⌈R/128⌉, ⌈C/128⌉] as float32, bf16 or fp16 [R, C]; fp16 by the
    reference."""
    _check(Operand(codes, scales), codes)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"FP8 blocks decode to float32, bfloat16 or float16, not {dtype}")
    found = library_for(codes)
    if found.library is None or dtype == torch.float16 or not codes.numel():
        return reference.decode_fp8_block(codes, scales, dtype)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows, cols = codes.shape
    places = (codes.data_ptr(), scales.data_ptr(), out.data_ptr(), _KINDS[dtype], rows, cols)
    if codes.device.type == "cuda":
        with torch.cuda.device(codes.device):
            status = found.library.surgery_cuda_decode(*places, torch.cuda.current_stream().cuda_stream)
        _raise(found, status)
    else:
        found.library.surgery_cpu_decode(None, *places, torch.get_num_threads())
    return out


def encode_fp8_block(values: torch.Tensor, *, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 codes [R, C], float32 scales [⌈R/128⌉, ⌈C/128⌉]) of float32 or bf16 values [R, C]."""
    values = values.contiguous()
    found = library_for(values)
    if found.library is None or not values.numel():
        return reference.encode_fp8_block(values, ue8m0=ue8m0)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    scales = torch.empty(scale_shape(values.shape), dtype=torch.float32, device=values.device)
    _combine(found, [Operand(values)], (1.0,), Operand(codes, scales), None, ue8m0)
    return codes, scales


def assemble(
    parents: Sequence[Operand], weights: Sequence[float], dtype: torch.dtype, *, squares: bool, ue8m0: bool
) -> tuple[Operand, torch.Tensor | None]:
    """Σ weights[i] · parents[i] in float32, stored as `dtype` (uint8 for FP8 blocks), in one pass.

    With `squares`, also ‖p₀‖², ‖p₀ − p₁‖², … by block: float64 [blocks, parents].
    """
    first = parents[0].values
    check(parents)
    found = library_for(first)
    if not any(weights):
        raise ValueError("every weight is 0")
    if found.library is None or not first.numel():
        return _assemble_by_reference(parents, weights, dtype, squares, ue8m0)
    out = empty_result(first, dtype)
    sums = _empty_sums(first, len(parents)) if squares else None
    _combine(found, parents, weights, out, sums, ue8m0)
    return out, sums


def block_squares(base: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """‖base‖² and ‖base − other‖² of float32 matrices by block: float64 [blocks, 1 + others]."""
    found = library_for(base)
    if found.library is None or not base.numel():
        return reference.block_squares(base, others)
    sums = _empty_sums(base, 1 + len(others))
    operands = [Operand(each.contiguous()) for each in (base, *others)]
    _combine(found, operands, (1.0,) * len(operands), None, sums, False)
    return sums


def _assemble_by_reference(
    parents: Sequence[Operand], weights: Sequence[float], dtype: torch.dtype, squares: bool, ue8m0: bool
) -> tuple[Operand, torch.Tensor | None]:
    base, *others = tiles = [parent.decoded() for parent in parents]
    sums = reference.block_squares(base, others) if squares else None
    total = reference.weighted_sum(tiles, weights)
    if dtype == torch.uint8:
        return Operand(*reference.encode_fp8_block(total, ue8m0=ue8m0)), sums
    return Operand(total.to(dtype)), sums


def _empty_sums(like: torch.Tensor, count: int) -> torch.Tensor:
    down, across = scale_shape(like.shape)
    return torch.empty((down * across, count), dtype=torch.float64, device=like.device)


def combine_job(
    parents: Sequence[Operand],
    weights: Sequence[float],
    out: Operand | None,
    sums: torch.Tensor | None,
    ue8m0: bool,
) -> native.Combine:
    """The C struct of a weighted sum; what it points to must outlive it."""
    count = len(parents)
    first = parents[0].values
    return native.Combine(
        parents=(ctypes.c_void_p * count)(*(each.values.data_ptr() for each in parents)),
        kinds=(ctypes.c_int32 * count)(*(_KINDS[each.values.dtype] for each in parents)),
        scales=(ctypes.c_void_p * count)(*(_place(each.scales) for each in parents)),
        weights=(ctypes.c_float * count)(*weights),
        count=count,
        out=_place(out.values if out else None),
        out_kind=_KINDS[out.values.dtype] if out else native.F32,
        out_scales=_place(out.scales if out else None),
        sums=_place(sums),
        rows=first.shape[0],
        cols=first.shape[1],
        ue8m0=int(ue8m0),
    )


def _combine(
    found: native.Native,
    parents: Sequence[Operand],
    weights: Sequence[float],
    out: Operand | None,
    sums: torch.Tensor | None,
    ue8m0: bool,
) -> None:
    first = parents[0].values
    job = combine_job(parents, weights, out, sums, ue8m0)
    if first.device.type == "cuda":
        with torch.cuda.device(first.device):
            stream = torch.cuda.current_stream().cuda_stream
            _raise(found, found.library.surgery_cuda_combine(ctypes.byref(job), stream))
    else:
        found.library.surgery_cpu_combine(None, ctypes.byref(job), torch.get_num_threads())


def _place(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def empty_result(like: torch.Tensor, dtype: torch.dtype) -> Operand:
    """Room for a result of the shape and on the device of `like`."""
    shape, device = scale_shape(like.shape), like.device
    scales = torch.empty(shape, dtype=torch.float32, device=device) if dtype == torch.uint8 else None
    return Operand(torch.empty(like.shape, dtype=dtype, device=device), scales)


def check(parents: Sequence[Operand]) -> None:
    """Refuse parents that a kernel cannot take together. Raises UsageError."""
    for parent in parents:
        _check(parent, parents[0].values)


def _check(operand: Operand, first: torch.Tensor) -> None:
    """Native code trusts shapes: refuse what does not fit. Raises UsageError."""
    values, scales = operand.values, operand.scales
    if values.dim() != 2 or values.shape != first.shape or values.device != first.device:
        raise UsageError(f"operands must be matrices of one shape and device, not {tuple(values.shape)}")
    if values.dtype not in _KINDS or (values.dtype == torch.uint8) != (scales is not None):
        raise UsageError(f"operands are uint8 with scales, bfloat16 or float32, not {values.dtype}")
    if not values.is_contiguous():
        raise UsageError("operands must be contiguous")
    if scales is None:
        return
    wanted = scale_shape(values.shape)
    if tuple(scales.shape) != wanted or scales.dtype != torch.float32 or scales.device != values.device:
        raise UsageError(f"scales must be float32 {list(wanted)} on {values.device}, not {scales.dtype}")
    if not scales.is_contiguous():
        raise UsageError("scales must be contiguous")


def _raise(found: native.Native, status: int) -> None:
    if status:
        message = found.library.surgery_cuda_error(status).decode()
        raise SurgeryError(f"a CUDA kernel failed: {message}", hint="SURGERY_KERNELS=reference avoids it")
