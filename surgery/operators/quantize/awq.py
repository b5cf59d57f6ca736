"""AWQ (arXiv 2306.00978): scale inputs so that the weights they meet lose less in rounding, then clip.

    W X = (W s)(X / s),    s = x̄^r / (w̄^(1−r) + 1e-4),  divided by √(max s · min s)

x̄ is the mean |x| of an input, w̄ the mean over rows of |w| / max|w| of its group, r = 0, 1/20, … 19/20.
The s is kept whose error at the outputs of all linears that share the input is least, and no scaling is
among the candidates. 1/s is folded into what produces the input (`folds.py` says into what). After scaling,
group by group, the range of a row's weights is clipped to 1 − i/20 of it, i = 0 … 9, by the error of the
group's own inputs. All searches of a layer are on its weights and inputs as they were.

Deviations: AutoAWQ measures at the module that consumes the input, on samples; here the error is exact over
all tokens and measured at the linears themselves through the Gram matrix, tr(D H Dᵀ). A norm is stored in few
bits, so that columns are multiplied by what the stored norm was divided by, not by s: the fold is exact.
Inputs that never occur keep the scale 1. AutoAWQ leaves queries and keys unclipped, as it measures them
apart; here they are clipped like the rest. It quantizes asymmetrically in groups of 128 (`symmetric: false`);
the default here is that of the other quantizing operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import Field, model_validator

from surgery.codecs.grid import GridMethod
from surgery.codecs.schemes import IntScheme
from surgery.operators.layerwise.operator import MatrixOperator
from surgery.operators.layerwise.problem import Problem, Solved
from surgery.operators.layerwise.reconstruction import output_squares
from surgery.operators.layerwise.scaled import Prepare, Scaled, Stacked
from surgery.operators.layerwise.select import by_layer
from surgery.operators.quantize.folds import APART, BY_DESIGN, UNKNOWN, Fold, LayerFolds, layer_folds
from surgery.operators.quantize.precision import Precision, int_scheme_of
from surgery.operators.quantize.rtn import rtn
from surgery.stream.checkpoint import Checkpoint, Event, TensorRef
from surgery.stream.spool import Made

STEPS = 20


class Scaling(NamedTuple):
    """Scales [B, C] of the inputs' columns, the ratio r by matrix (None: no scaling), and the loss of every
    candidate, float64 [1 + 20, B] with no scaling first."""

    scales: torch.Tensor
    ratios: list[float | None]
    losses: torch.Tensor


def awq(
    weights: torch.Tensor,
    gram: torch.Tensor,
    inputs: torch.Tensor,
    scheme: IntScheme,
    *,
    grid: GridMethod = "absmax",
    scale_dtype: torch.dtype = torch.float32,
) -> Scaling:
    """The best scales for weights [B, R, C], the rows of all linears that share the input stacked, with Gram
    matrices [B, C, C] and mean |x| [B, C]. Raises ValueError where groups do not divide C."""
    candidates = candidate_scales(inputs, weight_means(weights, scheme))
    losses = torch.stack(
        [scaling_loss(weights, gram, each, scheme, grid=grid, scale_dtype=scale_dtype) for each in candidates]
    )
    best = losses.argmin(0)
    scales = candidates[best, torch.arange(len(weights), device=best.device)]
    return Scaling(scales, [None if i == 0 else (i - 1) / STEPS for i in best.tolist()], losses)


def weight_means(weights: torch.Tensor, scheme: IntScheme) -> torch.Tensor:
    """w̄ [B, C] of weights [B, R, C]: the mean over rows of |w| relative to the largest of its group."""
    grouped = weights.abs().view(*weights.shape[:-1], scheme.groups(weights.shape[-1]), -1)
    return (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).flatten(-2).mean(-2)


def candidate_scales(inputs: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """The scales [1 + 20, B, C] that are tried, all 1 first, from mean |x| and w̄ [B, C]."""
    found = [torch.ones_like(means)]
    seen = inputs > 0
    for i in range(STEPS):
        ratio = i / STEPS
        scales = (inputs.pow(ratio) / (means.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        high = scales.masked_fill(~seen, 0).amax(-1, keepdim=True)
        low = scales.masked_fill(~seen, torch.inf).amin(-1, keepdim=True)
        found.append(torch.where(seen, scales / (high * low).sqrt(), 1))
    return torch.stack(found)


def scaling_loss(
    weights: torch.Tensor,
    gram: torch.Tensor,
    scales: torch.Tensor,
    scheme: IntScheme,
    *,
    grid: GridMethod = "absmax",
    scale_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """‖(Q(W s)/s − W) X‖² of each matrix, float64 [B]. Linears that share scales add theirs."""
    rounded = rtn(weights * scales[:, None], scheme, grid=grid, scale_dtype=scale_dtype).values()
    return output_squares(rounded / scales[:, None] - weights, gram).sum(-1)


def clip_limits(
    weights: torch.Tensor,
    gram: torch.Tensor,
    scheme: IntScheme,
    *,
    scale_dtype: torch.dtype = torch.float32,
    max_shrink: float = 0.5,
) -> torch.Tensor:
    """The largest |w| [B, R, groups] that each group is to keep, for weights [B, R, C] as they are quantized:
    scaled, with the Gram matrix of the inputs divided by the scales."""
    count = scheme.groups(weights.shape[-1])
    width = weights.shape[-1] // count
    grouped = weights.view(*weights.shape[:-1], count, width).transpose(1, 2)
    inner = torch.stack([gram[:, g : g + width, g : g + width] for g in range(0, count * width, width)], 1)
    alone = IntScheme(scheme.bits, 0, scheme.symmetric)
    whole = grouped.abs().amax(-1)
    limits, least = whole, torch.full_like(whole, torch.inf)
    for i in range(int(max_shrink * STEPS)):
        limit = whole * (1 - i / STEPS)
        clipped = grouped.clamp(-limit[..., None], limit[..., None])
        lost = rtn(clipped, alone, scale_dtype=scale_dtype).values() - grouped
        loss = ((lost @ inner) * lost).sum(-1)
        limits = torch.where(loss < least, limit, limits)
        least = torch.minimum(loss, least)
    return limits.transpose(1, 2)


def clip(weights: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Weights [B, R, C] within the limits [B, R, groups] of their groups."""
    grouped = weights.view(*limits.shape, -1)
    return grouped.clamp(-limits[..., None], limits[..., None]).flatten(-2)


@dataclass(frozen=True)
class Search:
    """Finds the scales of a wave's matrices, and folds them. `folds` are those of each layer."""

    folds: Mapping[int, LayerFolds]
    min_tokens: int
    scale_dtype: torch.dtype

    def __call__(self, layer: int, refs: Sequence[TensorRef], stacked: Stacked) -> Scaled:
        current = {ref.name: ref for ref in refs}
        known = self.folds.get(layer, LayerFolds())
        found = Scaled()
        for batch, problem in stacked:
            for index, group in enumerate(batch):
                names = [matrix.ref.name for matrix in group]
                fold, reason = _fold_of(known, names)
                ratio = None
                if fold is not None and problem.tokens[index] >= self.min_tokens:
                    ratio = self._scale(problem.of(index), names, fold, current, found)
                found.told |= {name: {"ratio": ratio, "unscaled": reason} for name in names}
        return found

    def _scale(
        self,
        problem: Problem,
        names: Sequence[str],
        fold: Fold,
        current: Mapping[str, TensorRef],
        found: Scaled,
    ) -> float | None:
        """Scale the matrices of a problem of one; the ratio, None where no scaling is best."""
        best = awq(
            problem.weights, problem.known_gram, problem.magnitudes / problem.tokens[0],
            int_scheme_of(problem), scale_dtype=self.scale_dtype,
        )  # fmt: skip
        ratio, scales = best.ratios[0], best.scales[0]
        if ratio is None:
            return None
        if fold.norm is not None:
            made, scales = divided(current[fold.norm], scales)
            found.made.append(made)
        if fold.rows is not None:
            found.rows[fold.rows] = fold.spread(scales, current[fold.rows].shape[0])
        if fold.bias is not None:
            found.made.append(divided(current[fold.bias], scales)[0])
        found.columns |= dict.fromkeys(names, scales)
        return ratio


def divided(ref: TensorRef, scales: torch.Tensor) -> tuple[Made, torch.Tensor]:
    """A vector [C] divided by scales, in the form that it has, and what the stored values were divided by:
    1 where they are 0, or would be."""
    values = ref.read()
    wanted = values / scales.to(values.device, values.dtype)
    stored = _stored(ref, wanted)
    lost = (stored == 0) | ~stored.isfinite()
    wanted = torch.where(lost, values, wanted)
    stored = torch.where(lost, values, stored)
    exact = torch.where(stored == 0, 1, values / stored)
    return Made(ref, ref.codec, ref.codec.encode(wanted)), exact.to(scales)


def _stored(ref: TensorRef, values: torch.Tensor) -> torch.Tensor:
    """The values as readers of the tensor's form have them."""
    return ref.codec.decode(ref.shape, 0, ref.rows, ref.codec.encode(values))


def _fold_of(known: LayerFolds, names: Sequence[str]) -> tuple[Fold | None, str | None]:
    """The fold of matrices that share an input, or the reason why they have none."""
    fold = known.folds.get(names[0])
    if fold is None:
        return None, known.reasons.get(names[0], UNKNOWN)
    return (fold, None) if fold.readers == set(names) else (None, APART)


class AWQ(Precision, MatrixOperator):
    """Params of `quantize.awq`."""

    op: ClassVar[str] = "quantize.awq"

    scale: bool = Field(default=True, strict=True)
    """Scale inputs where that can be folded into what makes them."""
    clip: bool = Field(default=True, strict=True)
    """Clip the range of each group."""
    max_shrink: float = Field(default=0.5, gt=0, lt=1)
    """The largest share of a group's range that clipping may take away."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.check_whole_numbers()
        if self.sequential:
            raise ValueError(
                f"`sequential`: {self.op} chooses all scales of a layer on the layer as it was; leave it out"
            )
        return self

    def prepare(self, checkpoint: Checkpoint) -> Prepare | None:
        if not self.scale:
            return None
        return Search(self._folds(checkpoint), self.min_tokens, getattr(torch, self.scale_dtype))

    def may_change(self, checkpoint: Checkpoint) -> frozenset[str]:
        if not self.scale:
            return frozenset()
        return frozenset().union(*(each.beside for each in self._folds(checkpoint).values()))

    def solve(self, problem: Problem) -> Solved:
        weights = problem.weights
        if self.clip:
            limits = clip_limits(
                weights, problem.known_gram, int_scheme_of(problem),
                scale_dtype=getattr(torch, self.scale_dtype), max_shrink=self.max_shrink,
            )  # fmt: skip
            weights = clip(weights, limits)
        return self._nearest(problem, weights)

    def fall_back(self, problem: Problem) -> Solved:
        return self._nearest(problem, problem.weights)

    def _nearest(self, problem: Problem, weights: torch.Tensor) -> Solved:
        found = rtn(weights, int_scheme_of(problem), scale_dtype=getattr(torch, self.scale_dtype))
        return Solved(found.values(), found)

    def events_of(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Event, ...]:
        names: dict[str, list[str]] = {}
        for row in rows:
            reason = row.get("unscaled")
            if reason is not None and reason not in BY_DESIGN:
                names.setdefault(reason, []).append(row["tensor"])
        return (
            *super().events_of(rows),
            *(
                Event(
                    "fallback", f"{self.op}: {len(tensors)} matrices could not be scaled: {reason}",
                    tuple(tensors),
                )
                for reason, tensors in names.items()
            ),
        )  # fmt: skip

    def _folds(self, checkpoint: Checkpoint) -> dict[int, LayerFolds]:
        config = {**checkpoint.config, **(checkpoint.config.get("text_config") or {})}
        found: dict[int, LayerFolds] = {}
        for layer, refs in by_layer(checkpoint).items():
            works = {ref.name: work for ref in refs if (work := self.work(ref)) is not None}
            found[layer] = layer_folds(refs, works, config, checkpoint.architecture.experts)
        return found
