"""Wanda (arXiv 2306.11695): prune by |w| · ‖x‖, compared within each output row, without an update.

score[r, c] = |W[r, c]| · ‖X_c‖₂,    ‖X_c‖₂² the diagonal of Σ x xᵀ
"""

from __future__ import annotations

from typing import ClassVar

import torch

from surgery.operators.layerwise.problem import Problem, Solved
from surgery.operators.sparsify.allocating import Allocating
from surgery.operators.sparsify.magnitude import magnitude
from surgery.operators.sparsify.masks import Sparsity, lowest_of_rows
from surgery.operators.sparsify.sparsity import sparsity_of


def wanda(weights: torch.Tensor, squares: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Weights [B, R, C] without round(C · sparsity) of each row, or n of every m; `squares` [B, C] are Σ x²
    of each input. A matrix whose inputs are all 0 or not finite is pruned by magnitude. Raises ValueError
    for patterns that do not divide C."""
    usable = squares.isfinite().all(-1) & (squares > 0).any(-1)
    squares = torch.where(usable[:, None], squares, 1.0)
    return weights.masked_fill(lowest_of_rows(wanda_scores(weights, squares), sparsity), 0.0)


def wanda_scores(weights: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """|W| · ‖X‖ of weights [..., R, C] with Σ x² [..., C]."""
    return weights.abs() * squares.sqrt()[..., None, :]


class Wanda(Allocating):
    """Params of `sparsify.wanda`."""

    op: ClassVar[str] = "sparsify.wanda"

    @property
    def needs_gram(self) -> bool:
        return False

    def solve(self, problem: Problem) -> Solved:
        return Solved(wanda(problem.weights, problem.squares, sparsity_of(problem)))

    def fall_back(self, problem: Problem) -> Solved:
        return Solved(magnitude(problem.weights, sparsity_of(problem), splits=problem.splits))
