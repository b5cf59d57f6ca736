"""Grids of whole numbers: the codes, scales and zero points of group quantization, in any stored layout.

    w[r, c] = (code[r, c] − zero[r, g]) · scale[r, g],      code ∈ 0 … 2^b − 1,  g the group of column c

Columns are grouped in runs of `group_size` (0: the whole row is one group). A symmetric grid has the zero
point 2^(b−1) everywhere, so it is not stored. Grids over a group's values (compressed-tensors' rules):

    symmetric    scale = 2 · max|w| / (2^b − 1)
    asymmetric   scale = (max − min) / (2^b − 1) with 0 inside the range,  zero = round(−min / scale)

and 1 where that is zero. Scales are rounded to the dtype that they are stored in before a code is chosen, so
that what was computed with is what readers get. Codes are round(w / scale) + zero, to nearest with ties to
even, clamped; float32 with separately rounded operations throughout.

A grid may be shrunk instead until Σ |w − q|^2.4 over its group is least (GPTQ's search, arXiv 2210.17323):
the range times 1 − i/100, i = 0 … 79, the widest of equals.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from surgery.codecs.schemes import IntScheme

GridMethod = Literal["absmax", "mse"]

_SHRINKS, _NORM = 80, 2.4
_CHUNK = 1 << 22
"""Weights that a search works on at once."""


class Grid(NamedTuple):
    """float32 scales and uint8 zero points, [..., rows, groups] each."""

    scales: torch.Tensor
    zeros: torch.Tensor


class Quantized(NamedTuple):
    """uint8 codes [..., rows, cols] on a grid [..., rows, groups]; columns are in runs of cols / groups."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def values(self) -> torch.Tensor:
        """float32 [..., rows, cols]."""
        *lead, cols = self.codes.shape
        codes = self.codes.view(*lead, self.scales.shape[-1], -1).float()
        return ((codes - self.zeros.float()[..., None]) * self.scales[..., None]).view(*lead, cols)


def fit_grid(
    weights: torch.Tensor, scheme: IntScheme, method: GridMethod, scale_dtype: torch.dtype = torch.float32
) -> Grid:
    """The grid of every group of [..., rows, cols] by either method."""
    fit = absmax_grid if method == "absmax" else mse_grid
    return fit(weights, scheme, scale_dtype)


def absmax_grid(weights: torch.Tensor, scheme: IntScheme, scale_dtype: torch.dtype = torch.float32) -> Grid:
    """The grid that spans the values of every group of [..., rows, cols]."""
    *lead, cols = weights.shape
    grouped = weights.view(*lead, scheme.groups(cols), -1)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    return span_grid(low, high, scheme, scale_dtype)


def mse_grid(weights: torch.Tensor, scheme: IntScheme, scale_dtype: torch.dtype = torch.float32) -> Grid:
    """The shrunk grid of least error for every group of [..., rows, cols]."""
    *lead, cols = weights.shape
    groups = weights.reshape(-1, cols // scheme.groups(cols))
    step = max(1, _CHUNK // groups.shape[-1])
    parts = [_search(groups[i : i + step], scheme, scale_dtype) for i in range(0, len(groups), step)]
    scales, zeros = (torch.cat(part).view(*lead, -1) for part in zip(*parts, strict=True))
    return Grid(scales, zeros)


def _search(groups: torch.Tensor, scheme: IntScheme, scale_dtype: torch.dtype) -> Grid:
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best, least = span_grid(low, high, scheme, scale_dtype), torch.full_like(low, torch.inf)
    for i in range(_SHRINKS):
        share = 1 - i / 100
        grid = span_grid(low * share, high * share, scheme, scale_dtype)
        zeros = grid.zeros.to(groups.dtype)[:, None]
        codes = torch.round(groups / grid.scales[:, None]).add_(zeros).clamp_(0, scheme.top)
        values = codes.sub_(zeros).mul_(grid.scales[:, None])
        error = values.sub_(groups).abs_().pow_(_NORM).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros)
        )
    return best


def span_grid(low: torch.Tensor, high: torch.Tensor, scheme: IntScheme, scale_dtype: torch.dtype) -> Grid:
    """The grid over low (≤ 0) to high (≥ 0), element by element."""
    span = 2 * torch.maximum(high, -low) if scheme.symmetric else high - low
    # By a tensor of the same device: CUDA multiplies by the reciprocal of a number, which is not the same.
    scales = span / span.new_full((), scheme.top)
    scales = scales.to(scale_dtype).float()
    scales = torch.where(scales == 0, 1.0, scales)
    if scheme.symmetric:
        return Grid(scales, torch.full_like(scales, scheme.middle, dtype=torch.uint8))
    return Grid(scales, torch.round(-low / scales).clamp(0, scheme.top).to(torch.uint8))


def quantize(weights: torch.Tensor, grid: Grid, scheme: IntScheme) -> Quantized:
    """The nearest codes on a grid, of [..., rows, cols]."""
    *lead, cols = weights.shape
    grouped = weights.view(*lead, grid.scales.shape[-1], -1)
    codes = torch.round(grouped / grid.scales[..., None]) + grid.zeros.float()[..., None]
    return Quantized(codes.clamp(0, scheme.top).to(torch.uint8).view(*lead, cols), grid.scales, grid.zeros)
