"""The codec operations on tensors: the native kernel of the operands' device, or the torch reference.

FP8 codes travel as uint8. All operands of a call lie on one device and are contiguous matrices; results
are the reference's to the last bit (payloads of NaN aside; sums of squares on CUDA, whose order is another,
agree to 1e-12). On the CPU a call uses `torch.get_num_threads()` threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery.codecs import column_sweep, native, reference, structures
from surgery.codecs.column_sweep import BlockGrid, SweptBlock
from surgery.codecs.dispatch import call, check, library_for, place, told
from surgery.codecs.reference import BLOCK
from surgery.errors import UsageError

KINDS = {torch.uint8: native.FP8_BLOCK, torch.bfloat16: native.BF16, torch.float32: native.F32}
"""Kinds of operands and results, by their dtype."""
MOST_ON_CUDA = 16
"""Operands of one call there, as in kernels/cuda/parents.cuh."""


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
    places = (codes.data_ptr(), scales.data_ptr(), out.data_ptr())
    call(found, "decode", codes.device, *places, KINDS[dtype], rows, cols)
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
    check_operands(parents)
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


def sweep_block(
    weights: torch.Tensor,
    factor: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    pattern: tuple[int, int] | None = None,
    grid: BlockGrid | None = None,
    into: SweptBlock | None = None,
) -> SweptBlock:
    """`column_sweep.sweep_block` to the last bit: sweep float32 weights [batch, rows, cols] with the block
    [batch, cols, cols] of U.

    Operands may be slices of larger matrices, and so may `into`, where results go; its values may be the
    weights. Native up to 128 columns and 16 of a pattern; beyond, and in float64, the torch form. CUDA does
    not check that `grid.group` lies within the groups.
    """
    _check_sweep(weights, factor, mask, pattern, grid)
    into = into or SweptBlock(
        torch.empty(weights.shape, dtype=weights.dtype, device=weights.device),
        torch.empty(weights.shape, dtype=weights.dtype, device=weights.device),
        torch.empty(weights.shape, dtype=torch.uint8, device=weights.device) if grid else None,
    )
    _check_results(weights, grid, into)
    found = library_for(weights)
    batch, rows, cols = weights.shape
    fits = weights.dtype == torch.float32 and cols <= 128 and (pattern is None or pattern[1] <= 16)
    if found.library is None or not weights.numel() or not fits:
        swept = column_sweep.sweep_block(weights, factor, mask=mask, pattern=pattern, grid=grid)
        for mine, theirs in zip(into, swept, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        return into
    weights, factor = _dense(weights), _dense(factor)
    mask = None if mask is None or pattern else _dense(mask.view(torch.uint8))
    if grid is not None:
        grid = BlockGrid(grid.scales.contiguous(), grid.zeros.contiguous(), _dense(grid.group), grid.top)
    job = structures.Sweep(
        **_strided(weights, "weights", "weight"),
        **_strided(factor, "factor", "factor"),
        **_strided(mask, "mask", "mask"),
        scales=place(grid.scales if grid else None),
        zeros=place(grid.zeros if grid else None),
        group=place(grid.group if grid else None),
        group_batch=grid.group.stride(0) if grid else 0,
        **_strided(into.values, "values", "value"),
        **_strided(into.errors, "errors", "error"),
        **_strided(into.codes if grid else None, "codes", "code"),
        batch=batch,
        rows=rows,
        groups=grid.scales.shape[-1] if grid else 0,
        cols=cols,
        prune=pattern[0] if pattern else 0,
        of=pattern[1] if pattern else 0,
        top=grid.top if grid else 0,
    )
    call(found, "sweep", weights.device, ctypes.byref(job))
    return into


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """As it is, or a copy where the last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _strided(tensor: torch.Tensor | None, name: str, one: str) -> dict[str, int | None]:
    if tensor is None:
        return {name: None, f"{one}_batch": 0, f"{one}_row": 0}
    return {name: tensor.data_ptr(), f"{one}_batch": tensor.stride(0), f"{one}_row": tensor.stride(1)}


def _check_sweep(
    weights: torch.Tensor,
    factor: torch.Tensor,
    mask: torch.Tensor | None,
    pattern: tuple[int, int] | None,
    grid: BlockGrid | None,
) -> None:
    if weights.dim() != 3 or weights.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"a sweep is over float32 [batch, rows, cols], not {told(weights)}")
    batch, rows, cols = weights.shape
    check("factor", factor, (batch, cols, cols), (weights.dtype,), weights)
    if mask is not None:
        check("mask", mask, (batch, rows, cols), (torch.uint8, torch.bool), weights)
    if pattern is not None and not (0 < pattern[0] <= pattern[1] and cols % pattern[1] == 0):
        raise UsageError(f"the pattern {pattern[0]}:{pattern[1]} does not fit {cols} columns")
    if grid is None:
        return
    groups = grid.scales.shape[-1]
    check("scales", grid.scales, (batch, rows, groups), (torch.float32, weights.dtype), weights)
    check("zeros", grid.zeros, (batch, rows, groups), (torch.uint8,), weights)
    check("group", grid.group, (batch, cols), (torch.int32,), weights)
    if not 0 < grid.top < 256:
        raise UsageError(f"codes end at 1 to 255, not at {grid.top}")
    if weights.device.type == "cpu" and weights.numel():
        low, high = grid.group.aminmax()
        if low < 0 or high >= groups:
            raise UsageError(f"columns are in groups {int(low)} to {int(high)}, but there are {groups}")


def _check_results(weights: torch.Tensor, grid: BlockGrid | None, into: SweptBlock) -> None:
    shape = tuple(weights.shape)
    check("values", into.values, shape, (weights.dtype,), weights)
    check("errors", into.errors, shape, (weights.dtype,), weights)
    places = [into.values, into.errors]
    if grid is not None:
        if into.codes is None:
            raise UsageError("there is a grid, but no place for codes")
        check("codes", into.codes, shape, (torch.uint8,), weights)
        places.append(into.codes)
    if any(each.stride(-1) != 1 < each.shape[-1] for each in places):
        raise UsageError("values, errors and codes must be contiguous in their last dimension")


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
) -> structures.Combine:
    """The C struct of a weighted sum; what it points to must outlive it. Raises UsageError for too many."""
    count = len(parents)
    first = parents[0].values
    if first.is_cuda and count > MOST_ON_CUDA:
        raise UsageError(f"CUDA kernels take {MOST_ON_CUDA} operands at most, not {count}")
    return structures.Combine(
        parents=(ctypes.c_void_p * count)(*(each.values.data_ptr() for each in parents)),
        kinds=(ctypes.c_int32 * count)(*(KINDS[each.values.dtype] for each in parents)),
        scales=(ctypes.c_void_p * count)(*(place(each.scales) for each in parents)),
        weights=(ctypes.c_float * count)(*weights),
        count=count,
        out=place(out.values if out else None),
        out_kind=KINDS[out.values.dtype] if out else native.F32,
        out_scales=place(out.scales if out else None),
        sums=place(sums),
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
    job = combine_job(parents, weights, out, sums, ue8m0)
    call(found, "combine", parents[0].values.device, ctypes.byref(job))


def empty_result(like: torch.Tensor, dtype: torch.dtype) -> Operand:
    """Room for a result of the shape and on the device of `like`."""
    shape, device = scale_shape(like.shape), like.device
    scales = torch.empty(shape, dtype=torch.float32, device=device) if dtype == torch.uint8 else None
    return Operand(torch.empty(like.shape, dtype=dtype, device=device), scales)


def check_operands(parents: Sequence[Operand]) -> None:
    """Refuse parents that a kernel cannot take together. Raises UsageError."""
    for parent in parents:
        _check(parent, parents[0].values)


def _check(operand: Operand, first: torch.Tensor) -> None:
    """Native code trusts shapes: refuse what does not fit. Raises UsageError."""
    values, scales = operand.values, operand.scales
    if values.dim() != 2 or values.shape != first.shape or values.device != first.device:
        raise UsageError(f"operands must be matrices of one shape and device, not {tuple(values.shape)}")
    if values.dtype not in KINDS or (values.dtype == torch.uint8) != (scales is not None):
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
