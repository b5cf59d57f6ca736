"""Magnitude pruning: the smallest |w| of each matrix become 0. The baseline that needs no data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.operators.sparsify.masks import Sparsity, lowest_of_matrices


def magnitude(
    weights: torch.Tensor, sparsity: Sparsity, *, splits: Sequence[int] | None = None
) -> torch.Tensor:
    """Weights [B, R, C] without round(rows · C · sparsity) of each matrix of `splits`, or n of every m of a
    row. Raises ValueError for patterns that do not divide C."""
    return weights.masked_fill(lowest_of_matrices(weights.abs(), sparsity, splits), 0.0)
