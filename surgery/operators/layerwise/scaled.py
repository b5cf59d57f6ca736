"""Scales that a wave's matrices get before they are solved, taken back elsewhere in the layer.

    W' = diag(a) W diag(b),    X' = diag(1/b) X,    H' = diag(1/b) H diag(1/b)

Whoever makes X divides it by b: a norm, or the matrix before, whose rows are divided (its a = 1/b).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.operators.layerwise.problem import Matrix, Problem
from surgery.stream.checkpoint import TensorRef
from surgery.stream.spool import Made

Stacked = Iterator[tuple[list[list[Matrix]], Problem]]
"""The problems of a wave with the matrices of each of their B, see `assemble.problems`."""


@dataclass
class Scaled:
    """`columns` (b) and `rows` (a) of matrices by their tensors' names, on the device of the problems; those
    that are not named stay as they are. `made` are the other tensors of the layer that change with them, and
    `told` more cells of a matrix's row in the table of the manifest."""

    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)

    def problem(self, batch: Sequence[Sequence[Matrix]], problem: Problem) -> Problem:
        """The scaled problem; the same object where none of its matrices is scaled."""
        names = {matrix.ref.name for group in batch for matrix in group}
        if not names & (self.columns.keys() | self.rows.keys()):
            return problem
        rows, columns = self._factors(batch, problem)
        return Problem(
            problem.layer, problem.wanted, problem.weights * rows * columns, problem.splits,
            problem.squares / columns[:, 0].square(), problem.magnitudes / columns[:, 0],
            None if problem.gram is None else problem.gram / columns / columns.mT, problem.tokens,
        )  # fmt: skip

    def undone(
        self, batch: Sequence[Sequence[Matrix]], problem: Problem, values: torch.Tensor
    ) -> torch.Tensor:
        """What values [B, R, C] of a scaled problem are on the inputs and outputs of the unscaled one."""
        rows, columns = self._factors(batch, problem)
        return values / rows / columns

    def _factors(
        self, batch: Sequence[Sequence[Matrix]], problem: Problem
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(a [B, R, 1], b [B, 1, C])."""
        like = problem.weights
        ones = like.new_ones(like.shape[-1])
        columns = torch.stack([self.columns.get(group[0].ref.name, ones) for group in batch])
        rows = torch.stack([
            torch.cat([
                self.rows.get(matrix.ref.name, like.new_ones(count))
                for matrix, count in zip(group, problem.splits, strict=True)
            ])
            for group in batch
        ])  # fmt: skip
        return rows[..., None], columns[:, None]


Prepare = Callable[[int, Sequence[TensorRef], Stacked], Scaled]
"""prepare(layer, its tensors, the problems of a wave) looks at all of a wave before any of it is solved."""
