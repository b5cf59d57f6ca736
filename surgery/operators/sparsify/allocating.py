"""Layers of different sparsity, found by a first walk over the model as it is.

The first walk only looks on: it takes the inputs of every matrix and measures each layer (`ratios.py`). The
second solves, with the sparsity that each layer gets. All matrices of a layer have one, its experts too, and
the weights that take part together have the sparsity that was asked for.

What the first walk found waits beside the snapshots, so that a run which is stopped in the second does not
repeat the first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from surgery.errors import PlanError
from surgery.operators.layerwise.operator import (
    MatrixOperator,
    check_one_process,
    estimate_waves,
    solver_room,
    sums_room,
)
from surgery.operators.protocol import Decision, Progress, RunContext
from surgery.operators.sparsify.sparsity import Sparsifying
from surgery.stream.checkpoint import Checkpoint
from surgery.stream.journal import first_difference
from surgery.stream.writer import write_json

if TYPE_CHECKING:
    from surgery.operators.layerwise.wave import Plan

Allocate = Literal["uniform", "owl", "lsa"]
RANGES = {"owl": 0.08, "lsa": 0.1}
"""β where none is given."""
MULTIPLE = 5.0
"""M where none is given."""
KIND = "layer_ratios"
"""Of the table in the manifest's measurements."""
FOUND = "first-walk.json"
FOLDER = "first-walk"


class Allocating(Sparsifying, MatrixOperator):
    """Params of the sparsifying operators that walk."""

    allocate: Allocate = "uniform"
    """How layers share `sparsity`: all alike, or as a first walk finds (OWL, LSA)."""
    allocate_range: float | None = Field(default=None, gt=0, le=0.5)
    """β: the most and the least sparse layer are 2β apart. By default 0.08 (owl) or 0.1 (lsa), less where
    `sparsity` is near 0 or 1."""
    allocate_multiple: float | None = Field(default=None, gt=0)
    """owl: a weight is an outlier where its score is more than so many times the mean of its layer (5)."""

    @model_validator(mode="after")
    def _can_allocate(self) -> Allocating:
        if self.allocate == "uniform":
            for name in ("allocate_range", "allocate_multiple"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` says nothing without `allocate: owl` or `lsa`")
            return self
        if self.sparsity is None:
            raise ValueError(f"`allocate: {self.allocate}` spreads a `sparsity`; give that alone")
        if self.allocate != "owl" and self.allocate_multiple is not None:
            raise ValueError("`allocate_multiple` goes with `allocate: owl`")
        most = min(self.sparsity, 1 - self.sparsity) / 2
        if self.allocate_range is not None and self.allocate_range > most + 1e-9:
            raise ValueError(
                f"layers {2 * self.allocate_range:g} apart around {self.sparsity:g} could leave 0 … 1: "
                f"`allocate_range` is {most:g} at most"
            )
        return self

    @property
    def beta(self) -> float:
        """The range in force."""
        share = self.sparsity or 0.0
        return self.allocate_range or min(RANGES[self.allocate], share / 2, (1 - share) / 2)

    def walk_key(self) -> tuple[Any, ...] | None:
        return super().walk_key() if self.allocate == "uniform" else None

    def estimates(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Sequence[Mapping[str, Any]]:
        second = super().estimates(inputs, context)
        if self.allocate == "uniform":
            return second
        (checkpoint,) = inputs.values()
        plan, gram = self._first_plan(checkpoint, context), self.allocate == "lsa"
        first = estimate_waves(self.calibration, checkpoint, context, plan, gram=gram)
        return ({"finds": f"the sparsity of each layer ({self.allocate})", **first}, *second)

    def decide(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Decision:
        if self.allocate == "uniform":
            return super().decide(inputs, context)
        check_one_process(self.op, context)
        (checkpoint,) = inputs.values()
        table = self._table(checkpoint, self._measured(checkpoint, context))
        shares = tuple(table["layer_sparsity"])
        solving = self.model_copy(
            update={
                "allocate": "uniform",
                "allocate_range": None,
                "allocate_multiple": None,
                "sparsity": None,
                "layer_sparsity": shares,
            }
        )
        found = solving.decide(inputs, context)
        return Decision(
            {**found.data, "layer_sparsity": list(shares)}, found.texts,
            (table, *found.measurements), found.events,
        )  # fmt: skip

    def _first_plan(self, checkpoint: Checkpoint, context: RunContext) -> Plan:
        from surgery.operators.layerwise.select import waves

        room, gram = sums_room(context), self.allocate == "lsa"
        return {
            layer: waves(matrices, room, gram=gram, sequential=False)
            for layer, matrices in self.matrices(checkpoint).items()
        }

    def _measured(self, checkpoint: Checkpoint, context: RunContext) -> dict[int, float]:
        """What the first walk finds of each layer: its outliers' share, or its error."""
        from surgery.operators.sparsify.looking import Looking
        from surgery.operators.together import find_route

        folder = None if context.folder is None else context.folder / FOLDER
        first = replace(context, folder=folder, progress=_renamed(context.progress))
        route = find_route(checkpoint, self.calibration, "original", first)
        fingerprint = route.fingerprint([{"op": self.op, "params": self.summary()}])
        found = None if context.folder is None else _read_found(context.folder / FOUND, fingerprint)
        if found is None:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            taker = Looking(
                self._first_plan(checkpoint, context), self.allocate == "lsa",
                self.allocate_multiple or MULTIPLE, route.device, solver_room(context),
            )  # fmt: skip
            route.walk(taker.steps, self.experts_share, fingerprint)
            found = taker.found
            if context.folder is not None:
                told = {str(layer): value for layer, value in found.items()}
                write_json(context.folder / FOUND, {"fingerprint": fingerprint, "found": told})
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return found

    def _table(self, checkpoint: Checkpoint, found: Mapping[int, float]) -> dict[str, Any]:
        """The table of the manifest: what each layer got, and why."""
        from surgery.operators.sparsify.ratios import lsa, owl

        sizes = {
            layer: sum(matrix.ref.numel for matrix in matrices)
            for layer, matrices in self.matrices(checkpoint).items()
        }
        spread = owl if self.allocate == "owl" else lsa
        values = [found[layer] for layer in sizes]
        share = self.sparsity or 0.0
        shares = spread(values, share, beta=self.beta, sizes=list(sizes.values()))
        by_layer = {layer: round(each, 6) for layer, each in zip(sizes, shares, strict=True)}
        layers = [ref.info.layer for ref in checkpoint.tensors.values() if not ref.info.mtp]
        count = 1 + max(layer for layer in layers if layer is not None)
        return {
            "kind": KIND, "op": self.op, "allocate": self.allocate, "sparsity": share, "range": self.beta,
            "layer_sparsity": [by_layer.get(layer, share) for layer in range(count)],
            "columns": ["layer", "outliers" if self.allocate == "owl" else "error", "sparsity", "weights"],
            "rows": [[layer, found[layer], by_layer[layer], sizes[layer]] for layer in sizes],
        }  # fmt: skip


def _read_found(path: Path, fingerprint: Mapping[str, Any]) -> dict[int, float] | None:
    """What an earlier first walk of the same found; None where there is none."""
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    difference = first_difference(kept["fingerprint"], json.loads(json.dumps(fingerprint)))
    if difference:
        raise PlanError(
            f"{path.parent} holds the walk of something else: {difference}",
            hint="use another output folder, or restart with --fresh",
        )
    return {int(layer): value for layer, value in kept["found"].items()}


def _renamed(progress: Progress | None) -> Progress | None:
    """Progress that tells the first walk from the second."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"first {stage}", done, total)
