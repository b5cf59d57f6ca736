"""Which weights go: the lowest scores of a pool, in exact numbers and the first of equals.

A sparsity is the share of zeros, or a pattern (n, m): n zeros among every m neighbours in a row. The pool
of a share is a whole matrix or each row by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.codecs.column_sweep import smallest
from surgery.operators.layerwise.reconstruction import matrices

Pattern = tuple[int, int]
Sparsity = float | Pattern


def lowest_of_matrices(
    scores: torch.Tensor, sparsity: Sparsity, splits: Sequence[int] | None = None
) -> torch.Tensor:
    """True for the lowest scores [B, R, C] of each of the matrices stacked along the rows: round(rows · C ·
    share) of each, or the n lowest of every m. Raises ValueError where a pattern or a stack does not fit."""
    if isinstance(sparsity, tuple):
        return lowest_of_groups(scores, sparsity)
    parts = [scores[:, rows].flatten(1) for rows in matrices(scores.shape[-2], splits)]
    masks = [lowest(part, round(part.shape[-1] * sparsity)) for part in parts]
    return torch.cat([mask.view(len(scores), -1, scores.shape[-1]) for mask in masks], 1)


def lowest_of_rows(scores: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """True for the round(C · share) lowest scores of each row of [B, R, C], or the n lowest of every m."""
    if isinstance(sparsity, tuple):
        return lowest_of_groups(scores, sparsity)
    return lowest(scores, round(scores.shape[-1] * sparsity))


def lowest_of_groups(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """True for the n lowest of every m neighbours in the rows of [B, R, C]."""
    check_pattern(pattern, scores.shape[-1])
    return smallest(scores.reshape(*scores.shape[:-1], -1, pattern[1]), pattern[0]).flatten(-2)


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for the `count` lowest of the last dimension, the first of equals. The same as
    `column_sweep.smallest`, without the sort."""
    if not 0 < count < scores.shape[-1]:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    # On CUDA `kthvalue` takes a hundred times as long for a pool of millions, and a sort twice as long.
    bound = scores.topk(count, largest=False, sorted=False).values.amax(-1, keepdim=True)
    below, equal = scores < bound, scores == bound
    missing = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))


def check_pattern(pattern: Pattern, cols: int) -> None:
    """Raises ValueError where rows of `cols` have no n zeros in every m."""
    zeros, group = pattern
    if not 0 <= zeros <= group or group < 1:
        raise ValueError(f"{zeros} zeros in every {group} columns are no pattern")
    if cols % group:
        raise ValueError(f"groups of {group} columns do not divide {cols} columns")
