"""AWQ (arXiv 2306.00978): scale inputs so that the weights they meet lose less in rounding, then clip.

    W X = (W s)(X / s),    s = x̄^r / (w̄^(1−r) + 1e-4),  divided by √(max s · min s)

x̄ is the mean |x| of an input, w̄ the mean over rows of |w| / max|w| of its group, r = 0, 1/20, … 19/20.
The s is kept whose error at the outputs of all linears that share the input is least, and no scaling is
among the candidates. 1/s is folded into what produces the input. After that, group by group, the range of a
row's weights is clipped to 1 − i/20 of it, i = 0 … 9, by the error of the group's own inputs.

Deviation: AutoAWQ measures at the module that consumes the input, on samples; here the error is exact over
all tokens and measured at the linears themselves through the Gram matrix, tr(D H Dᵀ).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from surgery.codecs.grid import GridMethod
from surgery.codecs.schemes import IntScheme
from surgery.operators.layerwise.reconstruction import output_squares
from surgery.operators.quantize.rtn import rtn

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
    for i in range(STEPS):
        ratio = i / STEPS
        scales = (inputs.pow(ratio) / (means.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        found.append(scales / (scales.amax(-1, keepdim=True) * scales.amin(-1, keepdim=True)).sqrt())
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
