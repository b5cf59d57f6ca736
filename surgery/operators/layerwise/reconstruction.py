"""The error at the outputs of a layer on its calibration inputs, from their Gram matrix alone:

‖(W − W′) X‖² = tr(D H Dᵀ),    D = W − W′,  H = Σ x xᵀ
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Reconstruction(NamedTuple):
    """float64 [B, S] for the S matrices of `splits`: ‖(W − W′)X‖², and that divided by ‖WX‖²."""

    error: torch.Tensor
    relative: torch.Tensor


def reconstruction_error(
    weights: torch.Tensor, new: torch.Tensor, gram: torch.Tensor, splits: Sequence[int] | None = None
) -> Reconstruction:
    """Of weights [B, R, C] and what became of them, on inputs with the Gram matrices [B, C, C].

    Where ‖WX‖² is 0, the relative error is 0 without an error and infinite with one. Raises ValueError where
    `splits` do not sum to R.
    """
    parts = matrices(weights.shape[-2], splits)
    lost = output_squares(weights - new, gram)
    whole = output_squares(weights, gram)
    error = torch.stack([lost[:, part].sum(-1) for part in parts], -1)
    size = torch.stack([whole[:, part].sum(-1) for part in parts], -1)
    return Reconstruction(error, torch.where(error == 0, 0.0, error / size))


def output_squares(weights: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """‖w X‖² of every row w of [B, R, C]: float64 [B, R], never negative."""
    squares = torch.empty(weights.shape[:-1], dtype=torch.float64, device=weights.device)
    # One matrix at a time: the product is as large as the weights, and no batch makes it faster.
    for matrix, inputs, row in zip(weights, gram, squares, strict=True):
        row.copy_((matrix @ inputs).mul_(matrix).sum(-1, dtype=torch.float64).clamp_(min=0))
    return squares


def matrices(rows: int, splits: Sequence[int] | None) -> list[slice]:
    """The rows of each of the matrices that are stacked; all of them without `splits`."""
    if splits is None:
        return [slice(0, rows)]
    if sum(splits) != rows:
        raise ValueError(f"matrices of {tuple(splits)} rows do not stack to {rows} rows")
    ends = [sum(splits[: i + 1]) for i in range(len(splits))]
    return [slice(end - count, end) for end, count in zip(ends, splits, strict=True)]
