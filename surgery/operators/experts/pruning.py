"""Base of the operators that drop experts: how many stay, in which groups, and what a decision becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from surgery.errors import PlanError
from surgery.operators.experts.groups import Groups, Strategy, choose, groups_after
from surgery.operators.experts.keep import (
    ExpertShape,
    KeepList,
    Mtp,
    apply_keep,
    expert_shape,
)
from surgery.operators.protocol import Decision, LayerOperator, RunContext, record_step
from surgery.stream.checkpoint import Checkpoint

KEEP_LIST = "surgery_keep.json"
Keep = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Measured:
    """Something that was found on the way and goes into the manifest as it is."""

    row: Mapping[str, Any]

    def measure(self) -> Mapping[str, Any]:
        return self.row


class DropExperts(LayerOperator):
    """What a keep-list becomes. Subclasses say which experts stay."""

    mtp: Mtp = "prune"
    """The prediction (MTP) layer: `prune` it with the last layer's list, or `drop` it."""

    def placeholder(self, shape: ExpertShape) -> KeepList:
        """A list of the right size, to plan with."""
        raise TypeError(f"{type(self).__name__} has no placeholder")

    def outline(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Checkpoint:
        (checkpoint,) = inputs.values()
        return self._pruned(checkpoint, Decision(self.placeholder(expert_shape(checkpoint)).as_dict()))

    def finish(
        self, inputs: Mapping[str, Checkpoint], decision: Decision, folder: Path | None = None
    ) -> Checkpoint:
        (checkpoint,) = inputs.values()
        return self._pruned(checkpoint, decision)

    def _pruned(self, checkpoint: Checkpoint, decision: Decision) -> Checkpoint:
        keep = KeepList.from_dict(decision.data)
        pruned = apply_keep(checkpoint, expert_shape(checkpoint), keep, self.mtp, self.op)
        label, history = record_step(
            self.op, self.summary(), {self.input_names()[0]: checkpoint.label}, [checkpoint], decision.data
        )
        return pruned.replace(
            label=label,
            history=history,
            events=(*pruned.events, *decision.events),
            probes=(*pruned.probes, *(Measured(row) for row in decision.measurements)),
            texts={**pruned.texts, KEEP_LIST: keep.dump(), **decision.texts},
        )


class RankedExperts(DropExperts):
    """The best experts of each layer stay, the same number in each."""

    keep: Keep
    """Experts of each layer that stay: a number, or a fraction below 1."""
    groups: Strategy = "ungrouped"
    """What becomes of a router that is limited to groups (DeepSeek-V2, V3), see `groups.py`."""

    def number(self, shape: ExpertShape) -> int:
        """How many stay. Raises PlanError for what is no number of experts of this model."""
        count = self.keep * shape.count if self.keep < 1 else self.keep
        number = round(count)
        if self.keep >= 1 and number != self.keep:
            raise PlanError(f"keep is {self.keep:g}: a fraction below 1 or a whole number of experts")
        if number < shape.top_k:
            raise PlanError(
                f"keep is {self.keep:g}, {number} of {shape.count} experts: fewer than the {shape.top_k} "
                "that every token chooses",
                hint="keep more of them; half of them is keep=0.5",
            )
        if number >= shape.count:
            raise PlanError(
                f"keep is {self.keep:g} of {shape.count} experts: nothing would be dropped",
                hint="keep fewer",
            )
        return number

    def groups_after(self, shape: ExpertShape) -> Groups:
        return groups_after(shape.groups, shape.count, self.number(shape), shape.top_k, self.groups)

    def placeholder(self, shape: ExpertShape) -> KeepList:
        after = self.groups_after(shape)
        return KeepList({layer: tuple(range(self.number(shape))) for layer in shape.layers}, after)

    def choose(self, scores: Sequence[float], shape: ExpertShape) -> tuple[int, ...]:
        """The experts of one layer that stay."""
        return choose(scores, self.number(shape), shape.groups, self.groups)


def overlap(lists: Mapping[str, Mapping[int, Sequence[int]]]) -> list[dict[str, Any]]:
    """For each pair of domains, the share of kept experts that both would keep, over all layers."""
    names = list(lists)
    rows: list[dict[str, Any]] = []
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            common = total = 0
            for layer, kept in lists[first].items():
                common += len({*kept} & {*lists[second][layer]})
                total += len(kept)
            rows.append({"domains": [first, second], "share": common / total})
    return rows
