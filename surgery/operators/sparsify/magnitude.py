"""Magnitude pruning: the smallest |w| of each matrix become 0. The baseline that needs no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from surgery.errors import PlanError
from surgery.operators.protocol import PREVIOUS, Kind, record_step
from surgery.operators.sparsify.masks import Sparsity, lowest_of_matrices
from surgery.operators.sparsify.sparsity import Sparsifying, wanted_of
from surgery.stream.checkpoint import Checkpoint, Decision, ReadContext, Sums, TensorRef
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


class Magnitude(Sparsifying):
    """Params of `sparsify.magnitude`. Needs no data: it composes with other steps in one reading."""

    op: ClassVar[str] = "sparsify.magnitude"
    kind: ClassVar[Kind] = "weight"

    input: str | None = None
    """The checkpoint to work on; by default the result of the step before, or the only parent."""
    mtp: Literal["keep", "rtn"] = "keep"
    """The prediction (MTP) layer: `keep` its bytes, or cut it as well."""

    def input_names(self) -> tuple[str, ...]:
        return (self.input or PREVIOUS,)

    def apply(self, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
        (checkpoint,) = inputs.values()
        tensors: dict[str, TensorRef] = {}
        changed = 0
        for name, ref in checkpoint.tensors.items():
            work = None if ref.info.mtp and self.mtp == "keep" else self.work(ref)
            tensors[name] = ref if work is None else WholeRef(ref, Cut(wanted_of(work)))
            changed += work is not None
        if not changed:
            raise PlanError(
                f"{self.op} finds nothing to work on in {checkpoint.label}",
                hint="surgery inspect shows the roles of its tensors",
            )
        label, history = record_step(
            self.op, self.summary(), {self.input_names()[0]: checkpoint.label}, [checkpoint]
        )
        return checkpoint.replace(tensors=tensors, label=label, history=history)
