"""Arithmetic of merges on tiles: pure functions of float32 tensors, to be exchanged for native ones at
will."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SMALLEST_PRODUCTS = 1e-30
"""Mean product below which float32 products lose digits to underflow, and are made in float64."""


def product_sum(left: torch.Tensor, right: torch.Tensor) -> float:
    """Σ left · right over a tile, float32 products added in float64."""
    import torch

    products = left * right
    found = float(products.sum(dtype=torch.float64))
    if abs(found) < SMALLEST_PRODUCTS * max(left.numel(), 1) or found in (float("inf"), float("-inf")):
        return float((left.double() * right.double()).sum())
    return found


def keep_between(delta: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """`delta` where low ≤ |delta| ≤ high, 0 elsewhere; a new tensor."""
    size = delta.abs()
    return delta * ((size >= low) & (size <= high))


def weighted_deltas(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], *, consensus: bool, normalize: bool
) -> torch.Tensor:
    """Σ w_i δ_i, with `consensus` only over the entries whose sign is that of the whole sum (0 counts as +);
    `normalize` divides by the weights that took part (TIES, arXiv 2306.01708, section 3)."""
    import torch

    terms = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    total = terms[0].clone()
    for term in terms[1:]:
        total.add_(term)
    if not consensus:
        share = sum(weights)
        return total.div_(share) if normalize and abs(share) > 1e-8 else total
    positive = total >= 0
    total.zero_()
    divisor = torch.zeros_like(total)
    for term, weight in zip(terms, weights, strict=True):
        agrees = torch.where(positive, term > 0, term < 0)
        total.add_(term * agrees)
        if normalize:
            divisor.add_(agrees, alpha=weight)
    if normalize:
        divisor[divisor.abs() < 1e-8] = 1.0
        total.div_(divisor)
    return total


def ranks_in_rows(size: torch.Tensor) -> torch.Tensor:
    """int64 ranks of each row's numbers from 0 (smallest); equal numbers in the order they stand."""
    import torch

    order = size.argsort(dim=-1, stable=True)
    places = torch.arange(size.shape[-1]).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
