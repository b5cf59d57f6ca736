"""What every operator is: a frozen, typed set of params that plans and applies itself.

The params are the fields of the class; unknown keys are refused. `plan` sees headers only and fails
on everything that can be known without weights; `apply` returns a new lazy checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from surgery.stream.checkpoint import Checkpoint

Kind = Literal["weight", "layer", "training", "runtime"]


def record_step(
    op: str, params: Mapping[str, Any], parents: Mapping[str, str], inputs: Iterable[Checkpoint]
) -> tuple[str, tuple[Mapping[str, Any], ...]]:
    """The label of a step's result and the history that leads to it, each step once.

    `parents` are the labels of the inputs by the names that the params use. The label is made from
    the content of the step, so that equal steps have equal labels and others do not.
    """
    step = {"op": op, **params, "parents": dict(parents)}
    digest = sha256(json.dumps(step, sort_keys=True).encode()).hexdigest()
    label = f"{op}:{digest[:12]}"
    history = {str(past["result"]): past for each in inputs for past in each.history}
    history[label] = {**step, "result": label}
    return label, tuple(history.values())


class Operator(BaseModel):
    """Base of all operators. Subclasses add fields (their params) and implement the methods."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: ClassVar[str]
    kind: ClassVar[Kind]

    def input_names(self) -> tuple[str, ...]:
        """Names of the checkpoints this step reads, the base first."""
        raise TypeError(f"{type(self).__name__} does not say which checkpoints it reads")

    def apply(self, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
        """The lazy result. Reads headers only; raises RecipeError (with a path inside the step) or
        CheckpointError on whatever can be known without weights."""
        raise TypeError(f"{type(self).__name__} cannot be applied")

    def summary(self) -> Mapping[str, Any]:
        """Params as they go into manifests and cards."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
