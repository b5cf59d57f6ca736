"""What every operator is: a frozen, typed set of params that plans and applies itself.

The params are the fields of the class; unknown keys are refused. `plan` sees headers only and fails
on everything that can be known without weights; `apply` returns a new lazy checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from surgery.stream.checkpoint import Checkpoint

Kind = Literal["weight", "layer", "training", "runtime"]


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
