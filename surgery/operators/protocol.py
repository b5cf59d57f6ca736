"""What every operator is: a frozen, typed set of params that plans and applies itself.

The params are the fields of the class; unknown keys are refused. A weight operator's `apply` sees headers
only and fails on everything that can be known without weights; it returns a new lazy checkpoint. A layer
operator first has to walk the model: `outline` is its result as far as headers tell, `decide` walks, and
`finish` makes the checkpoint from the decision, which stands in the manifest, so that it can be made again
without the walk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from surgery.calibrate.ranks import ONE_RANK, Ranks
from surgery.errors import UsageError
from surgery.stream.checkpoint import Checkpoint, Event

if TYPE_CHECKING:
    from surgery.calibrate.walk import LayerStep, Walk

Kind = Literal["weight", "layer", "training", "runtime"]
Progress = Callable[[str, int, int], None]
PREVIOUS = "<previous>"
"""Stands for the result of the step before, or for the only parent."""


def record_step(
    op: str,
    params: Mapping[str, Any],
    parents: Mapping[str, str],
    inputs: Iterable[Checkpoint],
    decision: Mapping[str, Any] | None = None,
) -> tuple[str, tuple[Mapping[str, Any], ...]]:
    """The label of a step's result and the history that leads to it, each step once.

    `parents` are the labels of the inputs by the names that the params use, `decision` what a layer operator
    found. The label is made from the content of the step, so that equal steps have equal labels and others
    do not.
    """
    step = {"op": op, **params, "parents": dict(parents)}
    if decision is not None:
        step["decision"] = dict(decision)
    digest = sha256(json.dumps(step, sort_keys=True).encode()).hexdigest()
    label = f"{op}:{digest[:12]}"
    history = {str(past["result"]): past for each in inputs for past in each.history}
    history[label] = {**step, "result": label}
    return label, tuple(history.values())


class Operator(BaseModel):
    """Base of all operators. Subclasses add fields (their params) and implement the methods."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    op: ClassVar[str]
    kind: ClassVar[Kind]

    def input_names(self) -> tuple[str, ...]:
        """Names of the checkpoints this step reads, the base first; PREVIOUS where it names none."""
        raise TypeError(f"{type(self).__name__} does not say which checkpoints it reads")

    def apply(self, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
        """The lazy result. Reads headers only; raises RecipeError (with a path inside the step) or
        CheckpointError on whatever can be known without weights."""
        raise TypeError(f"{type(self).__name__} cannot be applied")

    def summary(self) -> Mapping[str, Any]:
        """Params as they go into manifests and cards."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


@dataclass(frozen=True)
class RunContext:
    """Where and how layer operators run. `device`, `dtype` and `threads` can change results.

    `folder` is for snapshots and hidden states that do not fit the budget (None: neither); `beside` are the
    folders in which relative data files are looked up after the current one.
    """

    device: str = "cpu"
    dtype: str | None = None
    memory_bytes: int = 1 << 30
    threads: int | None = None
    folder: Path | None = None
    beside: tuple[Path, ...] = ()
    trust_remote_code: bool = False
    snapshot_seconds: float = 600.0
    ranks: Ranks = ONE_RANK
    """The processes that walk together, see `surgery.calibrate.ranks.joined_ranks`."""
    progress: Progress | None = None


@dataclass(frozen=True)
class Decision:
    """What a walk found. `data` is plain and enough for `finish`; the rest is for readers of the output."""

    data: Mapping[str, Any]
    texts: Mapping[str, str] = field(default_factory=dict)
    """Small files that the output carries, by name."""
    measurements: tuple[Mapping[str, Any], ...] = ()
    events: tuple[Event, ...] = ()


class Participant(Protocol):
    """An operator's part in a walk: what it does in each layer, and what it found."""

    @property
    def steps(self) -> Sequence[LayerStep]:
        """In order. A step sees the layer as those in front of it left it."""

    def decision(self, walk: Walk) -> Decision:
        """After the walk."""


class LayerOperator(Operator):
    """Base of the operators that need activations, or whole weights, before they know what to do."""

    kind: ClassVar[Kind] = "layer"
    experts_share: ClassVar[float] = 0.6
    """Of a GPU's free memory, what a layer's experts may take while it walks."""

    input: str | None = None
    """The checkpoint to work on; by default the result of the step before, or the only parent."""

    def input_names(self) -> tuple[str, ...]:
        return (self.input or PREVIOUS,)

    def apply(self, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
        raise UsageError(f"{self.op} needs a run: it decides by what the model does")

    def outline(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Checkpoint:
        """The result as far as headers tell: its names, shapes, forms and config. Raises what `apply` of a
        weight operator does."""
        raise TypeError(f"{type(self).__name__} has no outline")

    def data_hashes(self, context: RunContext) -> Mapping[str, str]:
        """SHA-256 of the files that it reads beside checkpoints, by what the params call them."""
        return {}

    def estimate(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Mapping[str, Any]:
        """What the walk reads and needs: for plans. Raises what can be known of the data."""
        raise TypeError(f"{type(self).__name__} has no estimate")

    def estimates(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Sequence[Mapping[str, Any]]:
        """The needs of each of its walks in order, for an operator that has not just one."""
        found = self.estimate(inputs, context)
        return (found,) if found else ()

    def walk_key(self) -> tuple[Any, ...] | None:
        """What its walk runs on, and how: operators with equal keys that follow one another share a walk.
        None for one that has no walk, or shares none."""
        return None

    def join(self, checkpoint: Checkpoint, context: RunContext) -> Participant:
        """Its part in a walk over `checkpoint` (which may be an outline). Asked where there is a key."""
        raise TypeError(f"{type(self).__name__} does not walk")

    def decide(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Decision:
        """Walk, and say what is to be done."""
        from surgery.operators.together import walk_together

        (checkpoint,) = inputs.values()
        return walk_together([self], checkpoint, [context])[0]

    def finish(
        self, inputs: Mapping[str, Checkpoint], decision: Decision, folder: Path | None = None
    ) -> Checkpoint:
        """The lazy result of a decision, from headers. `folder` is the one in which the walk left tensors;
        without it those can be told of but not read."""
        raise TypeError(f"{type(self).__name__} cannot finish")
