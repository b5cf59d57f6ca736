"""Magnitude pruning: the smallest |w| of each matrix become 0. The baseline that needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from surgery.operators.layerwise.alone import AloneOperator
from surgery.operators.layerwise.problem import Work
from surgery.operators.sparsify.masks import Sparsity, lowest_of_matrices
from surgery.operators.sparsify.sparsity import Sparsifying, wanted_of
from surgery.stream.checkpoint import Decision, ReadContext, Sums, TensorRef
from surgery.stream.reshape import WholeRef


def magnitude(
    weights: torch.Tensor, sparsity: Sparsity, *, splits: Sequence[int] | None = None
) -> torch.Tensor:
    """Weights [B, R, C] without round(rows · C · sparsity) of each matrix of `splits`, or n of every m of a
    row. Raises ValueError for patterns that do not divide C."""
    return weights.masked_fill(lowest_of_matrices(weights.abs(), sparsity, splits), 0.0)


@dataclass(frozen=True)
class Cut:
    """The kernel of one matrix."""

    wanted: Sparsity

    def decide(self, inputs: Sequence[TensorRef], context: ReadContext) -> Decision:
        return Decision()

    def combine(self, tiles: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sums]:
        return magnitude(tiles[0][None], self.wanted)[0], ()

    def metrics(self, sums: Sums, numel: int) -> dict[str, Any]:
        return {}

    def lineage(self) -> dict[str, Any]:
        return {"op": Magnitude.op}


class Magnitude(Sparsifying, AloneOperator):
    """Params of `sparsify.magnitude`. Needs no data: it composes with other steps in one reading."""

    op: ClassVar[str] = "sparsify.magnitude"

    def treated(self, ref: TensorRef, work: Work) -> TensorRef:
        return WholeRef(ref, Cut(wanted_of(work)))
