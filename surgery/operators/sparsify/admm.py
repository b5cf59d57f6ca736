"""ADMM pruning (arXiv 2401.02938): alternate the solution of a ridge problem with its sparsest neighbour.

Inputs are scaled to norm 1, so that |V| is Wanda's score: ν = ‖X_c‖ + 1e-8, G = H / (ν νᵀ) + δI with δ the
damping times the mean of the diagonal, V = W ν. From U = 0, Z the projection on the mask and ρ = 1,

    Z ← (V + U) ∘ mask,    U ← U + V − Z,    V ← (W ν G + ρ (Z − U)) (G + ρI)⁻¹

and (V + U) ∘ mask / ν in the end. In the first iterations the mask is chosen anew from |V + U|, the rest
refine the values on a fixed one. One inverse and products of matrices, no loop over columns.

The share of zeros rises to the wanted one, s_t = s − s (1 − t/T)³ (t = 1 … T mask choices). Deviations from
the paper's code: for pools of a whole matrix it computes this schedule without using it; here `gradual`
decides for every pool. Patterns are of any n and m: the candidates are the n lowest of every m, and of
these the lowest go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from surgery.operators.layerwise.hessian import faults_of
from surgery.operators.layerwise.problem import Problem, Solved
from surgery.operators.sparsify.allocating import Allocating
from surgery.operators.sparsify.magnitude import magnitude
from surgery.operators.sparsify.masks import Sparsity, lowest_of_groups, lowest_of_matrices, lowest_of_rows
from surgery.operators.sparsify.sparsity import sparsity_of

Pool = Literal["matrix", "row"]


def admm(
    weights: torch.Tensor,
    gram: torch.Tensor,
    sparsity: Sparsity,
    *,
    pool: Pool = "matrix",
    splits: Sequence[int] | None = None,
    gradual: bool = True,
    damping: float = 0.1,
    iterations: int = 20,
    mask_iterations: int = 15,
) -> torch.Tensor:
    """Weights [B, R, C] at a share of zeros of each matrix of `splits` or of each row, or an (n, m) pattern,
    for inputs with the Gram matrices [B, C, C]. Where `faults_of` finds one at fault, its weights are pruned
    by magnitude and stay as they are.

    Raises ValueError where a pattern does not divide C, a stack does not fit or no iteration chooses a mask.
    """
    if not 1 <= mask_iterations <= iterations:
        raise ValueError(f"of {iterations} iterations {mask_iterations} cannot choose the mask")
    rho = 1.0
    faulty = torch.tensor([fault is not None for fault in faults_of(gram)], device=gram.device)
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt() + 1e-8
    norms = norms.masked_fill(faulty[:, None], 1.0)
    scaled = gram / norms[:, :, None]
    scaled /= norms[:, None, :]
    scaled.masked_fill_(faulty[:, None, None], 0.0)
    diagonal = scaled.diagonal(dim1=-2, dim2=-1)
    diagonal += damping * diagonal.mean(-1, keepdim=True)
    value = weights * norms[:, None]
    target = value @ scaled
    diagonal += rho
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled))
    del scaled, diagonal
    dual = torch.zeros_like(value)
    mask = torch.zeros_like(value, dtype=torch.bool)
    for step in range(iterations):
        value += dual
        if step < mask_iterations:
            left = (1 - (step + 1) / mask_iterations) ** 3 if gradual else 0.0
            mask = choose(value.abs(), sparsity, 1 - left, pool, splits)
        # value holds V + U: the new dual is what the mask takes away, and Z − U follows from both.
        dual = value.masked_fill(~mask, 0.0)
        value = torch.where(mask, -value, value).mul_(rho).add_(target) @ inverse
    value += dual
    return value.masked_fill_(mask, 0.0).div_(norms[:, None])


def choose(
    scores: torch.Tensor, sparsity: Sparsity, share: float, pool: Pool, splits: Sequence[int] | None
) -> torch.Tensor:
    """True for the lowest scores [B, R, C]: `share` of the zeros that the sparsity asks for."""
    if isinstance(sparsity, float | int):
        if pool == "row":
            return lowest_of_rows(scores, sparsity * share)
        return lowest_of_matrices(scores, sparsity * share, splits)
    candidates = lowest_of_groups(scores, sparsity)
    if share == 1.0:
        return candidates
    others = scores.masked_fill(~candidates, torch.inf)
    return lowest_of_matrices(others, share * sparsity[0] / sparsity[1], splits)


class Admm(Allocating):
    """Params of `sparsify.admm`."""

    op: ClassVar[str] = "sparsify.admm"

    pool: Pool = "matrix"
    """Whether weights compete in their whole matrix or in their row."""
    damping: float = Field(default=0.1, gt=0, le=1)
    """Of the scaled Gram matrix, whose diagonal is 1."""
    iterations: int = Field(default=20, ge=1)
    mask_iterations: int = Field(default=15, ge=1)
    """Iterations in which the mask is chosen anew."""

    def solve(self, problem: Problem) -> Solved:
        values = admm(
            problem.weights, problem.known_gram, sparsity_of(problem), pool=self.pool,
            splits=problem.splits, damping=self.damping, iterations=self.iterations,
            mask_iterations=min(self.mask_iterations, self.iterations),
        )  # fmt: skip
        return Solved(values, unsolved=list(faults_of(problem.known_gram)))

    def fall_back(self, problem: Problem) -> Solved:
        return Solved(magnitude(problem.weights, sparsity_of(problem), splits=problem.splits))
