"""Merge methods on stored operands: whole-tensor statistics, and results in one pass over a tile.

Statistics run on the native CPU kernels (kernels/cpu/merge.cpp) or as `merge_reference.py` has them, with
equal bits. The results of methods exist natively alone: without kernels the methods' own torch form, which
is the oracle of these, takes their place. Operands are as in `ops.py`, all of one shape.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from surgery.codecs import merge_reference as reference
from surgery.codecs import native, ops
from surgery.codecs.dispatch import library_for
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


class _Thin(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32), ("divide", ctypes.c_int32),
        ("low", ctypes.c_float), ("high", ctypes.c_float), ("density", ctypes.c_float),
        ("factor", ctypes.c_float), ("states", ctypes.c_void_p),
    )  # fmt: skip


class _Tasks(ctypes.Structure):
    _fields_ = (
        ("at", native.Combine), ("thins", ctypes.POINTER(_Thin)),
        ("elect", ctypes.c_int32), ("divide", ctypes.c_int32),
        ("share", ctypes.c_float), ("scale", ctypes.c_float),
    )  # fmt: skip


class _Fusion(ctypes.Structure):
    _fields_ = (("at", native.Combine), ("row_weights", ctypes.c_void_p), ("threshold", ctypes.c_float))


class _Counting(ctypes.Structure):
    _fields_ = (
        ("at", native.Combine), ("row_weights", ctypes.c_void_p), ("digits", ctypes.c_void_p),
        ("digit_count", ctypes.c_int32), ("counts", ctypes.c_void_p),
    )  # fmt: skip


def available(operands: Sequence[Operand]) -> bool:
    """Whether native kernels serve these operands."""
    first = operands[0].values
    return first.device.type == "cpu" and bool(first.numel()) and library_for(first).library is not None


def products(operands: Sequence[Operand], *, offset: bool) -> torch.Tensor:
    """Dot products by block, the lower triangle row by row: float64 [blocks, pairs]; with `offset` those of
    the differences of all operands but the first from it."""
    ops.check_operands(operands)
    if not available(operands):
        tiles = [each.decoded() for each in operands]
        return reference.products([tile - tiles[0] for tile in tiles[1:]] if offset else tiles)
    count = len(operands) - offset
    sums = _sums(operands, count * (count + 1) // 2)
    job = ops.combine_job(operands, [0.0] * len(operands), None, sums, False)
    _library(operands).surgery_cpu_products(None, ctypes.byref(job), int(offset), torch.get_num_threads())
    return sums


def task_sums(operands: Sequence[Operand]) -> torch.Tensor:
    """‖base‖², ‖δ_1‖², …, then δ_2·δ_1, δ_3·δ_1, δ_3·δ_2, … by block: float64 [blocks, columns]."""
    ops.check_operands(operands)
    if not available(operands):
        base, *others = (each.decoded() for each in operands)
        return reference.task_sums(base, others)
    sums = _sums(operands, _columns(len(operands)))
    models = len(operands) - 1
    _run_tasks(operands, [Thin()] * models, Sum([0.0] * models, False, False, 1.0), None, sums, False)
    return sums


def task_sizes(operands: Sequence[Operand], thins: Sequence[Thin]) -> torch.Tensor:
    """Σ |δ_i| of every model, then Σ |δ'_i| of what stays, by block: float64 [blocks, 2 · models]. By native
    kernels alone."""
    ops.check_operands(operands)
    models = len(operands) - 1
    sums = _sums(operands, 2 * models)
    job = _tasks_job(operands, thins, Sum([0.0] * models, False, False, 1.0), None, sums, False)
    _library(operands).surgery_cpu_sizes(None, ctypes.byref(job), torch.get_num_threads())
    return sums


def row_divergence(base: Operand, model: Operand) -> torch.Tensor:
    """KL(softmax(model) + 10⁻⁸ ‖ softmax(base) + 10⁻⁸) of each row: float32 [rows], not below 0."""
    ops.check_operands((base, model))
    if not available((base, model)):
        return reference.row_divergence(base.decoded(), model.decoded())
    out = torch.empty(base.values.shape[0], dtype=torch.float32)
    job = ops.combine_job((base, model), (0.0, 0.0), None, None, False)
    library = _library((base, model))
    library.surgery_cpu_divergence(None, ctypes.byref(job), out.data_ptr(), torch.get_num_threads())
    return out


def count_sizes(
    operands: Sequence[Operand],
    digits: Sequence[Sequence[int]] | None,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Counts of |operand i − operand 0| (times float32 `row_weights` [rows]) by upper 16 bits, int64 [models,
    32768], or of the lower 16 bits by model and `digit`, int64 [models, digits, 65536]."""
    ops.check_operands(operands)
    models = len(operands) - 1
    if not available(operands):
        return _count_by_reference(operands, digits, row_weights)
    wanted = torch.tensor(digits, dtype=torch.int32).view(models, -1) if digits is not None else None
    shape = (models, UPPER_BINS) if wanted is None else (models, wanted.shape[1], LOWER_BINS)
    counts = torch.zeros(shape, dtype=torch.int64)
    weights = _fitting(row_weights, operands)
    job = _Counting(
        at=ops.combine_job(operands, [0.0] * len(operands), None, None, False),
        row_weights=weights.data_ptr() if weights is not None else None,
        digits=wanted.data_ptr() if wanted is not None else None,
        digit_count=wanted.shape[1] if wanted is not None else 0,
        counts=counts.data_ptr(),
    )
    _library(operands).surgery_cpu_counting(None, ctypes.byref(job))
    return counts


def merge_tasks(
    operands: Sequence[Operand], thins: Sequence[Thin], how: Sum, dtype: torch.dtype, *, ue8m0: bool
) -> tuple[Operand, torch.Tensor]:
    """base + scale · Σ w_i δ'_i stored as `dtype`, and `task_sums`. By native kernels alone."""
    ops.check_operands(operands)
    out = ops.empty_result(operands[0].values, dtype)
    sums = _sums(operands, _columns(len(operands)))
    _run_tasks(operands, thins, how, out, sums, ue8m0)
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
    ops.check_operands(operands)
    out = ops.empty_result(base.values, dtype)
    sums = _sums(operands, 2)
    weights = _fitting(row_weights, operands)
    job = _Fusion(
        at=ops.combine_job(operands, (0.0, 0.0), out, sums, ue8m0),
        row_weights=weights.data_ptr() if weights is not None else None,
        threshold=threshold,
    )
    _library(operands).surgery_cpu_fusion(None, ctypes.byref(job), torch.get_num_threads())
    return out, sums


def _run_tasks(
    operands: Sequence[Operand], thins: Sequence[Thin], how: Sum, out: Operand | None,
    sums: torch.Tensor, ue8m0: bool,
) -> None:  # fmt: skip
    job = _tasks_job(operands, thins, how, out, sums, ue8m0)
    _library(operands).surgery_cpu_tasks(None, ctypes.byref(job), torch.get_num_threads())


def _tasks_job(
    operands: Sequence[Operand], thins: Sequence[Thin], how: Sum, out: Operand | None,
    sums: torch.Tensor, ue8m0: bool,
) -> _Tasks:  # fmt: skip
    blocks = ops.scale_shape(operands[0].values.shape)[0]
    for thin in thins:
        if thin.kept is Kept.DRAWN and (thin.states is None or tuple(thin.states.shape) != (blocks, 4)):
            raise UsageError(f"drawing needs the states of {blocks} blocks of rows")
    share = sum(how.weights)
    return _Tasks(
        at=ops.combine_job(operands, (0.0, *how.weights), out, sums, ue8m0),
        thins=(_Thin * len(operands))(_Thin(), *(_entry(thin) for thin in thins)),
        elect=int(how.elect),
        divide=int(how.divide),
        share=share if how.divide and not how.elect and abs(share) > 1e-8 else 1.0,
        scale=how.scale,
    )


def _entry(thin: Thin) -> _Thin:
    states = thin.states.data_ptr() if thin.states is not None else None
    return _Thin(
        int(thin.kept), int(thin.divide), thin.low, thin.high, thin.density, thin.factor, states
    )  # fmt: skip


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
    return row_weights.contiguous()


def _columns(count: int) -> int:
    return count + (count - 1) * (count - 2) // 2


def _sums(operands: Sequence[Operand], columns: int) -> torch.Tensor:
    down, across = ops.scale_shape(operands[0].values.shape)
    return torch.empty((down * across, columns), dtype=torch.float64)


def _library(operands: Sequence[Operand]) -> ctypes.CDLL:
    found: ctypes.CDLL = library_for(operands[0].values).library
    return found
