"""Rounding to nearest: each weight by itself on the grid of its group. The baseline that needs no data."""

from __future__ import annotations

import torch

from surgery.codecs.grid import GridMethod, Quantized, fit_grid, quantize
from surgery.codecs.schemes import IntScheme


def rtn(
    weights: torch.Tensor,
    scheme: IntScheme,
    *,
    grid: GridMethod = "absmax",
    scale_dtype: torch.dtype = torch.float32,
) -> Quantized:
    """Weights [..., R, C] in a scheme. Raises ValueError where its groups do not divide C."""
    return quantize(weights, fit_grid(weights, scheme, grid, scale_dtype), scheme)
