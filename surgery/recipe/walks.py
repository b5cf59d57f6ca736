"""Layer steps of a recipe: their walks run once, and their decisions survive a kill.

Steps behind one another that calibrate on the same data share a walk. Snapshots, hidden states beyond the
budget, solved tensors and decisions live in `OUT.walk` beside the output, one folder a step, until the output
is whole. A decision is kept under a fingerprint of everything it depends on; a walk of something else is
refused with the difference named.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.errors import PlanError
from surgery.operators.protocol import PREVIOUS, Decision, LayerOperator, Operator, RunContext
from surgery.stream.checkpoint import Checkpoint, Event
from surgery.stream.journal import LOCK, first_difference, lock
from surgery.stream.writer import write_json

DECISION = "decision.json"
STEPS = "steps.json"
KEPT = "solved-"
"""Files of a step that the output is made from begin so."""


@dataclass
class Planner:
    """Applies steps from headers and collects what their walks would need."""

    context: RunContext

    def __post_init__(self) -> None:
        self.walks: list[dict[str, Any]] = []

    def apply(self, index: int, operator: Operator, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
        if isinstance(operator, LayerOperator):
            for needs in operator.estimates(inputs, self.context):
                self.walks.append({"step": index, "op": operator.op, **needs})
            return operator.outline(inputs, self.context)
        return operator.apply(inputs)


@dataclass(frozen=True)
class Walker:
    """Applies steps for good: walks where there is no decision yet. `folder` is OUT.walk, in which the first
    of several processes alone writes decisions."""

    context: RunContext
    folder: Path
    steps: Sequence[Operator]
    """Those of the recipe, in order."""
    fresh: bool = False
    _walked: set[int] = field(default_factory=set)
    """Steps whose decisions this run has made."""

    def apply(self, index: int, operator: Operator, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
        if not isinstance(operator, LayerOperator):
            return operator.apply(inputs)
        ranks = self.context.ranks
        place = self._place(index)
        decision = None
        if ranks.leads:
            place.mkdir(parents=True, exist_ok=True)
            decision = (
                None if self.fresh else read_decision(place / DECISION, self._identity(operator, inputs))
            )
        decision = ranks.share(decision)
        if decision is None:
            decision = self._decide(index, operator, inputs)
        return operator.finish(inputs, decision, place)

    def _decide(self, index: int, operator: LayerOperator, inputs: Mapping[str, Checkpoint]) -> Decision:
        """Walk: for this step, and for those behind it that can share its walk."""
        partners = self._partners(index, operator)
        places = [self._place(index + ahead) for ahead in range(len(partners))]
        if self.context.ranks.leads:
            for place in places:
                place.mkdir(parents=True, exist_ok=True)
        contexts = [replace(self.context, folder=place) for place in places]
        if len(partners) == 1:
            found = [operator.decide(inputs, contexts[0])]
        else:
            from surgery.operators.together import walk_together

            (checkpoint,) = inputs.values()
            found = walk_together(partners, checkpoint, contexts)
        if self.context.ranks.leads:
            reached = dict(inputs)
            for partner, place, decision in zip(partners, places, found, strict=True):
                write_decision(place / DECISION, self._identity(partner, reached), decision)
                reached = {PREVIOUS: partner.finish(reached, decision, place)}
                for path in place.iterdir():
                    if path.name != DECISION and not path.name.startswith(KEPT):
                        path.unlink()
        self._walked.update(range(index, index + len(partners)))
        return found[0]

    def _partners(self, index: int, operator: LayerOperator) -> list[LayerOperator]:
        """The operator of step `index`, and those right behind it that can work in the same walk. With
        `propagate: original` each needs the layers as its own input has them, so that none can be shared."""
        key = operator.walk_key()
        found = [operator]
        for step in self.steps[index + 1 :] if key is not None and key[1] == "changed" else ():
            if not isinstance(step, LayerOperator) or step.walk_key() != key or step.input is not None:
                break
            found.append(step)
        return found

    def _place(self, index: int) -> Path:
        return self.folder / f"step-{index:02d}"

    def _identity(self, operator: LayerOperator, inputs: Mapping[str, Checkpoint]) -> dict[str, Any]:
        context = self.context
        return {
            "op": operator.op, "params": operator.summary(), "device": context.device,
            "dtype": context.dtype, "threads": context.threads, "data": operator.data_hashes(context),
            "inputs": {
                name: {
                    "steps": list(checkpoint.history),
                    "files": {source.label: source.identity() for source in checkpoint.inputs},
                }
                for name, checkpoint in inputs.items()
            },
        }  # fmt: skip


def walk_folder(out: Path) -> Path:
    """Where the walks of an output keep what they need to go on."""
    return out.with_name(out.name + ".walk")


@contextmanager
def walk_place(out: Path, steps: Sequence[Mapping[str, Any]], *, fresh: bool) -> Iterator[Path]:
    """The walks' folder, locked. It stays behind when the context ends with an error, so that the same
    command resumes; one that other `steps` left is refused."""
    folder = walk_folder(out)
    if folder.is_dir() and not (folder / LOCK).is_file() and any(folder.iterdir()):
        raise PlanError(
            f"{folder} exists and was not made by surgery",
            hint="move it away, or choose another output folder",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"cannot create {folder}: {error.strerror}", hint="choose another folder") from error
    held = lock(folder)
    try:
        if fresh:
            for path in folder.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        _compare_steps(folder / STEPS, list(steps))
        yield folder
    finally:
        os.close(held)
    shutil.rmtree(folder)


def _compare_steps(path: Path, steps: list[Mapping[str, Any]]) -> None:
    """Note down whose folder this is, or refuse another recipe's."""
    mine = json.loads(json.dumps(steps))
    if not path.is_file():
        path.write_text(json.dumps(mine), encoding="utf-8")
        return
    difference = first_difference(json.loads(path.read_text(encoding="utf-8")), mine, "steps")
    if difference:
        raise PlanError(
            f"{path.parent} holds the walk of something else: {difference}",
            hint="use another output folder, or restart with --fresh",
        )


def read_decision(path: Path, identity: Mapping[str, Any]) -> Decision | None:
    """The decision of an earlier run of the same step; None where there is none. PlanError for another's."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(found, dict) or not {"identity", "data", "texts", "measurements", "events"} <= {*found}:
        return None
    difference = first_difference(found["identity"], json.loads(json.dumps(identity)))
    if difference:
        raise PlanError(
            f"{path.parent} holds the walk of something else: {difference}",
            hint="use another output folder, or restart with --fresh",
        )
    events = tuple(Event(each["kind"], each["message"], tuple(each["tensors"])) for each in found["events"])
    return Decision(found["data"], found["texts"], tuple(found["measurements"]), events)


def write_decision(path: Path, identity: Mapping[str, Any], decision: Decision) -> None:
    """Keep a decision; renamed into place when it is whole."""
    document = {
        "identity": identity, "data": decision.data, "texts": decision.texts,
        "measurements": decision.measurements, "events": [each.as_dict() for each in decision.events],
    }  # fmt: skip
    write_json(path, document)
