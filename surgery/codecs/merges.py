"""Merge methods on stored operands: whole-tensor statistics, and results in one pass over a tile.

Statistics run on the native kernels of the operands' device or as `merge_reference.py` has them, with equal
bits. The results of methods exist natively alone: without kernels the methods' own torch form, which is the
oracle of these, takes their place. Operands are as in `ops.py`, all of one shape; noise and weights of rows
may come from the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from surgery.codecs import merge_reference as reference
from surgery.codecs import ops, structures
from surgery.codecs.dispatch import call, library_for, place, told
from surgery.codecs.merge_reference import LOWER_BINS, UPPER_BINS
from surgery.codecs.ops import Operand
from surgery.errors import UsageError


class Kept(IntEnum):
    """What stays of a task vector, as in kernels/cpu/merge.h."""

    ALL = 0
    NOTHING = 1
    BETWEEN = 2
    DRAWN = 3


@dataclass(frozen=True)
class Thin:
    """BETWEEN: low ≤ |δ| ≤ high. DRAWN: a number below `density`, drawn from `states` (int64 [row blocks of
    128, 4], SFC64); what stays is divided by `density` if `divide`. All is multiplied by `factor`."""

    kept: Kept = Kept.ALL
    low: float = 0.0
    high: float = 0.0
    density: float = 1.0
    divide: bool = False
    states: torch.Tensor | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Sum:
    """How thinned task vectors are brought together; see `passes.weighted_deltas`."""

    weights: Sequence[float]
    elect: bool
    divide: bool
    scale: float


def available(operands: Sequence[Operand]) -> bool:
    """Whether native kernels serve these operands."""
    first = operands[0].values
    return bool(first.numel()) and library_for(first).library is not None


def products(operands: Sequence[Operand], *, offset: bool) -> torch.Tensor:
    """Dot products by block, the lower triangle row by row: float64 [blocks, pairs]; with `offset` those of
    the differences of all operands but the first from it."""
    ops.check_operands(operands)
    if not available(operands):
        tiles = [each.decoded() for each in operands]
        return reference.products([tile - tiles[0] for tile in tiles[1:]] if offset else tiles)
    count = len(operands) - offset
    sums = _sums(operands, count * (count + 1) // 2)
    _run("products", operands, structures.Products(at=_at(operands, None, sums), offset=int(offset)))
    return sums


def task_sums(operands: Sequence[Operand]) -> torch.Tensor:
    """‖base‖², ‖δ_1‖², …, then δ_2·δ_1, δ_3·δ_1, δ_3·δ_2, … by block: float64 [blocks, columns]."""
    ops.check_operands(operands)
    if not available(operands):
        base, *others = (each.decoded() for each in operands)
        return reference.task_sums(base, others)
    models = len(operands) - 1
    sums = _sums(operands, _columns(len(operands)))
    _run_tasks("tasks", operands, [Thin()] * models, _nothing(models), None, sums)
    return sums


def task_sizes(operands: Sequence[Operand], thins: Sequence[Thin]) -> torch.Tensor:
    """Σ |δ_i| of every model, then Σ |δ'_i| of what stays, by block: float64 [blocks, 2 · models]. By native
    kernels alone."""
    _check_native(operands)
    models = len(operands) - 1
    sums = _sums(operands, 2 * models)
    _run_tasks("sizes", operands, thins, _nothing(models), None, sums)
    return sums


def row_divergence(base: Operand, model: Operand) -> torch.Tensor:
    """KL(softmax(model) + 10⁻⁸ ‖ softmax(base) + 10⁻⁸) of each row: float32 [rows], not below 0."""
    operands = (base, model)
    ops.check_operands(operands)
    if not available(operands):
        return reference.row_divergence(base.decoded(), model.decoded())
    out = torch.empty(base.values.shape[0], dtype=torch.float32, device=base.values.device)
    job = structures.Divergence(at=_at(operands, None, None), out=out.data_ptr())
    _run("divergence", operands, job)
    return out


def count_sizes(
    operands: Sequence[Operand],
    digits: Sequence[Sequence[int]] | None,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Counts of |operand i − operand 0| (times float32 `row_weights` [rows]) by upper 16 bits, int64 [models,
    32768], or of the lower 16 bits by model and `digit`, int64 [models, digits, 65536]. Digits
    are 0 to 32767, as many for every model."""
    ops.check_operands(operands)
    models, weights = len(operands) - 1, _fitting(row_weights, operands)
    _check_digits(digits, models)
    if not available(operands):
        return _count_by_reference(operands, digits, weights)
    wanted = torch.tensor(digits, dtype=torch.int32).view(models, -1) if digits is not None else None
    shape = (models, UPPER_BINS) if wanted is None else (models, wanted.shape[1], LOWER_BINS)
    counts = torch.zeros(shape, dtype=torch.int64, device=operands[0].values.device)
    job = structures.Counting(
        at=_at(operands, None, None),
        row_weights=place(weights),
        digits=place(wanted),
        digit_count=wanted.shape[1] if wanted is not None else 0,
        counts=counts.data_ptr(),
    )
    _run("counting", operands, job)
    return counts


def merge_tasks(
    operands: Sequence[Operand], thins: Sequence[Thin], how: Sum, dtype: torch.dtype, *, ue8m0: bool
) -> tuple[Operand, torch.Tensor]:
    """base + scale · Σ w_i δ'_i stored as `dtype`, and `task_sums`. By native kernels alone."""
    _check_native(operands)
    out = ops.empty_result(operands[0].values, dtype)
    sums = _sums(operands, _columns(len(operands)))
    _run_tasks("tasks", operands, thins, how, out, sums, ue8m0)
    return out, sums


def merge_fusion(
    base: Operand,
    model: Operand,
    row_weights: torch.Tensor,
    threshold: float,
    dtype: torch.dtype,
    *,
    ue8m0: bool,
) -> tuple[Operand, torch.Tensor]:
    """base + δ where |δ| · row_weights ≥ threshold, stored as `dtype`, and ‖base‖², ‖δ‖² by block: float64
    [blocks, 2]. By native kernels alone."""
    operands = (base, model)
    _check_native(operands)
    out = ops.empty_result(base.values, dtype)
    sums, weights = _sums(operands, 2), _fitting(row_weights, operands)
    job = structures.Fusion(
        at=_at(operands, out, sums, ue8m0=ue8m0), row_weights=place(weights), threshold=threshold
    )
    _run("fusion", operands, job)
    return out, sums


def _run_tasks(
    name: str, operands: Sequence[Operand], thins: Sequence[Thin], how: Sum, out: Operand | None,
    sums: torch.Tensor, ue8m0: bool = False,
) -> None:  # fmt: skip
    first = operands[0].values
    for thin in thins:
        _check_thin(thin, ops.scale_shape(first.shape)[0])
    states = [None if thin.states is None else thin.states.to(first.device).contiguous() for thin in thins]
    room = None
    if first.is_cuda and any(thin.kept is Kept.DRAWN for thin in thins):
        shape = (len(thins), -(-first.numel() // 32))
        room = torch.empty(shape, dtype=torch.int32, device=first.device)
    entries = (_entry(thin, each) for thin, each in zip(thins, states, strict=True))
    share = sum(how.weights)
    job = structures.Tasks(
        at=_at(operands, out, sums, how.weights, ue8m0=ue8m0),
        thins=(structures.Thin * len(operands))(structures.Thin(), *entries),
        elect=int(how.elect),
        divide=int(how.divide),
        share=share if how.divide and not how.elect and abs(share) > 1e-8 else 1.0,
        scale=how.scale,
        drawn=place(room),
    )
    _run(name, operands, job)


def _check_native(operands: Sequence[Operand]) -> None:
    ops.check_operands(operands)
    if len(operands) < 2:
        raise UsageError("there is no model beside the base")
    if not available(operands):
        first = operands[0].values
        raise UsageError(
            f"there are no kernels for {told(first)} on {first.device}", hint="surgery kernels status"
        )


def _check_thin(thin: Thin, blocks: int) -> None:
    if thin.kept is not Kept.DRAWN:
        return
    shape, kind = (blocks, 4), torch.int64
    if thin.states is None or tuple(thin.states.shape) != shape or thin.states.dtype != kind:
        raise UsageError(f"drawing needs the states of {blocks} blocks of rows: int64 [{blocks}, 4]")
    if not 0.0 < ctypes.c_float(thin.density).value <= 1.0:
        raise UsageError(f"a density of {thin.density:g} is not above 0 and at most 1 in float32")


def _check_digits(digits: Sequence[Sequence[int]] | None, models: int) -> None:
    if models < 1:
        raise UsageError("there is no model beside the base")
    if digits is None:
        return
    counts = {len(each) for each in digits}
    if len(digits) != models or len(counts) != 1 or 0 in counts:
        raise UsageError(f"{models} models need as many digits each, and one at least")
    if not all(0 <= digit < UPPER_BINS for each in digits for digit in each):
        raise UsageError(f"digits are 0 to {UPPER_BINS - 1}")


def _nothing(models: int) -> Sum:
    return Sum([0.0] * models, False, False, 1.0)


def _entry(thin: Thin, states: torch.Tensor | None) -> structures.Thin:
    numbers = (thin.low, thin.high, thin.density, thin.factor)
    return structures.Thin(int(thin.kept), int(thin.divide), *numbers, place(states))


def _at(
    operands: Sequence[Operand], out: Operand | None, sums: torch.Tensor | None,
    weights: Sequence[float] = (), *, ue8m0: bool = False,
) -> structures.Combine:  # fmt: skip
    """`weights` are those of the operands but the first, 0 where there are none."""
    given = (0.0, *weights) if weights else [0.0] * len(operands)
    return ops.combine_job(operands, given, out, sums, ue8m0)


def _run(name: str, operands: Sequence[Operand], job: ctypes.Structure) -> None:
    first = operands[0].values
    call(library_for(first), name, first.device, ctypes.byref(job))


def _count_by_reference(
    operands: Sequence[Operand], digits: Sequence[Sequence[int]] | None, row_weights: torch.Tensor | None
) -> torch.Tensor:
    base, *others = (each.decoded() for each in operands)
    sizes = [(other - base).abs_() for other in others]
    if row_weights is not None:
        sizes = [size.mul_(row_weights.unsqueeze(-1)) for size in sizes]
    if digits is None:
        return torch.stack([reference.upper_counts(size) for size in sizes])
    return torch.stack([
        torch.stack([reference.lower_counts(size, digit) for digit in mine])
        for size, mine in zip(sizes, digits, strict=True)
    ])  # fmt: skip


def _fitting(row_weights: torch.Tensor | None, operands: Sequence[Operand]) -> torch.Tensor | None:
    rows = operands[0].values.shape[0]
    if row_weights is None:
        return None
    if row_weights.dtype != torch.float32 or tuple(row_weights.shape) != (rows,):
        raise UsageError(f"row weights are float32 [{rows}], not {tuple(row_weights.shape)}")
    return row_weights.to(operands[0].values.device).contiguous()


def _columns(count: int) -> int:
    return count + (count - 1) * (count - 2) // 2


def _sums(operands: Sequence[Operand], columns: int) -> torch.Tensor:
    down, across = ops.scale_shape(operands[0].values.shape)
    return torch.empty((down * across, columns), dtype=torch.float64, device=operands[0].values.device)
