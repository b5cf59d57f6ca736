"""Weighted sums and passes of merge methods as torch operators `torch.ops.surgery.*`; see `library.py`.

Operands and results are those of `ops` and `merges`, scales of several operands in a list of their own.
`merges.merge_tasks` is not among them: what thins task vectors is more than a schema holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.codecs import merges, ops
from surgery.codecs.merge_reference import LOWER_BINS, UPPER_BINS
from surgery.codecs.ops import Operand
from surgery.errors import UsageError


@torch.library.custom_op("surgery::assemble", mutates_args=())
def assemble(
    parents: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    weights: Sequence[float],
    dtype: torch.dtype,
    *,
    squares: bool = False,
    ue8m0: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σ weights[i] · parents[i] as (values, scales or [0], sums or [0]); see `ops.assemble`."""
    made, sums = ops.assemble(_operands(parents, scales), weights, dtype, squares=squares, ue8m0=ue8m0)
    device = made.values.device
    none = torch.empty(0, dtype=torch.float32, device=device) if made.scales is None else made.scales
    return made.values, none, torch.empty(0, dtype=torch.float64, device=device) if sums is None else sums


@assemble.register_fake
def _(
    parents: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    weights: Sequence[float],
    dtype: torch.dtype,
    *,
    squares: bool = False,
    ue8m0: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made, sums = _result(parents[0], dtype), torch.empty(0, dtype=torch.float64, device=parents[0].device)
    return *made, _block_sums(parents[0], len(parents)) if squares else sums


@torch.library.custom_op("surgery::row_divergence", mutates_args=())
def row_divergence(
    base: torch.Tensor,
    base_scales: torch.Tensor | None,
    model: torch.Tensor,
    model_scales: torch.Tensor | None,
) -> torch.Tensor:
    """KL(softmax(model) + 10⁻⁸ ‖ softmax(base) + 10⁻⁸) of each row: float32 [rows]."""
    return merges.row_divergence(Operand(base, base_scales), Operand(model, model_scales))


@row_divergence.register_fake
def _(
    base: torch.Tensor,
    base_scales: torch.Tensor | None,
    model: torch.Tensor,
    model_scales: torch.Tensor | None,
) -> torch.Tensor:
    return torch.empty(base.shape[0], dtype=torch.float32, device=base.device)


@torch.library.custom_op("surgery::count_sizes", mutates_args=())
def count_sizes(
    parents: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    digits: Sequence[int],
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Counts of |parent i − parent 0| by their upper bits, or by the lower ones beside `digits`, one parent's
    after the other's; see `merges.count_sizes`."""
    models = len(parents) - 1
    if models and len(digits) % models:
        raise UsageError(f"{len(digits)} digits are not as many for each of {models} models")
    each = len(digits) // max(models, 1)
    wanted = [digits[i * each : (i + 1) * each] for i in range(models)] if digits else None
    return merges.count_sizes(_operands(parents, scales), wanted, row_weights)


@count_sizes.register_fake
def _(
    parents: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    digits: Sequence[int],
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    models = len(parents) - 1
    bins = (len(digits) // models, LOWER_BINS) if digits else (UPPER_BINS,)
    return torch.empty((models, *bins), dtype=torch.int64, device=parents[0].device)


@torch.library.custom_op("surgery::merge_fusion", mutates_args=())
def merge_fusion(
    parents: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    row_weights: torch.Tensor,
    threshold: float,
    dtype: torch.dtype,
    *,
    ue8m0: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """base + δ where |δ| · row_weights ≥ threshold as (values, scales or [0], sums), by native kernels
    alone; see `merges.merge_fusion`."""
    base, model = _operands(parents, scales)
    made, sums = merges.merge_fusion(base, model, row_weights, threshold, dtype, ue8m0=ue8m0)
    none = torch.empty(0, dtype=torch.float32, device=sums.device)
    return made.values, none if made.scales is None else made.scales, sums


@merge_fusion.register_fake
def _(
    parents: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    row_weights: torch.Tensor,
    threshold: float,
    dtype: torch.dtype,
    *,
    ue8m0: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_result(parents[0], dtype), _block_sums(parents[0], 2)


def _operands(parents: Sequence[torch.Tensor], scales: Sequence[torch.Tensor | None]) -> list[Operand]:
    return [Operand(*each) for each in zip(parents, scales, strict=True)]


def _result(like: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shape = ops.scale_shape(like.shape) if dtype == torch.uint8 else (0,)
    scales = torch.empty(shape, dtype=torch.float32, device=like.device)
    return torch.empty(like.shape, dtype=dtype, device=like.device), scales


def _block_sums(like: torch.Tensor, columns: int) -> torch.Tensor:
    down, across = ops.scale_shape(like.shape)
    return torch.empty((down * across, columns), dtype=torch.float64, device=like.device)
