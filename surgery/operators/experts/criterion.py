"""Criteria that rank experts by what they did on demonstrations: one walk, one set of sums, many readouts.

A criterion reads a score for each expert out of the sums of a layer (surgery.calibrate.statistics). With
several domains, each domain's scores of a layer are divided by their sum and averaged (EASY-EP, section 4).

The sums are taken on the model as it is: by default what goes on to the next layer are the outputs of the
unpruned one, as the methods' own code has it, so that one walk serves any criterion and any ratio. With
`propagate: changed` every layer sees what the pruned layers in front of it give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from surgery.calibrate.data import Calibration, find_file
from surgery.calibrate.statistics import FIELDS, ExpertStatistics, Sums, read_statistics
from surgery.errors import PlanError
from surgery.operators.experts.keep import ExpertShape, KeepList, expert_shape
from surgery.operators.experts.pruning import RankedExperts, overlap
from surgery.operators.fingerprint import model_fingerprint
from surgery.operators.protocol import Decision, Participant, RunContext
from surgery.stream.checkpoint import Checkpoint, Event
from surgery.stream.files import file_hash

if TYPE_CHECKING:
    import numpy as np


STATISTICS = "surgery_experts.json"

Fields = Mapping[str, "np.ndarray[Any, np.dtype[np.float64]]"]
"""[experts] by the name of the sum, for one layer and one domain."""


class Criterion(RankedExperts):
    """Params that all criteria share. Exactly one of `calibration` and `statistics` is given."""

    calibration: Calibration | None = None
    """Demonstrations: a file, a list of files, {domain: file}, or a mapping with more settings."""
    statistics: str | None = None
    """A surgery_experts.json of an earlier run on this model, instead of a walk."""
    propagate: Literal["original", "changed"] = "original"
    """Whether later layers see the unpruned layers' outputs or the pruned ones'."""

    @model_validator(mode="after")
    def _one_source(self) -> Criterion:
        if (self.calibration is None) == (self.statistics is None):
            given = "both are given" if self.calibration is not None else "neither is given"
            raise ValueError(
                f"give `calibration` (demonstrations) or `statistics` (of an earlier walk): {given}"
            )
        if self.statistics is not None and self.propagate == "changed":
            raise ValueError("`propagate: changed` needs a walk; statistics are of the model as it is")
        return self

    def scores(self, sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[experts], the higher the more important."""
        raise TypeError(f"{type(self).__name__} has no scores")

    def layer_scores(self, sums: Sums) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[experts] over all domains, from sums [domains, fields, experts]."""
        import numpy as np

        each = [self.scores(dict(zip(FIELDS, domain, strict=True))) for domain in sums]
        if len(each) == 1:
            return each[0]
        totals = [float(scores.sum()) for scores in each]
        return np.asarray(
            sum(s / total if total else s for s, total in zip(each, totals, strict=True)) / len(each)
        )

    def data_hashes(self, context: RunContext) -> Mapping[str, str]:
        names = [str(self.statistics)] if self.calibration is None else []
        if self.calibration is not None:
            names = [name for files in self.calibration.files.values() for name in files]
        return {name: file_hash(find_file(name, context.beside)) for name in names}

    def estimate(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Mapping[str, Any]:
        (checkpoint,) = inputs.values()
        shape = expert_shape(checkpoint)
        self.placeholder(shape)
        if self.statistics is not None:
            self._read(checkpoint, shape, context)
            return {}
        from surgery.operators.experts.walking import check_walkable
        from surgery.operators.together import estimate_together

        check_walkable(checkpoint, shape)
        return estimate_together(self._demonstrations(), checkpoint, context)

    def walk_key(self) -> tuple[Any, ...] | None:
        return None if self.calibration is None else (self.calibration, self.propagate)

    def join(self, checkpoint: Checkpoint, context: RunContext) -> Participant:
        from surgery.operators.experts.walking import Pruning, check_walkable

        shape = expert_shape(checkpoint)
        check_walkable(checkpoint, shape)
        return Pruning(self, shape, context.ranks)

    def decide(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Decision:
        if self.statistics is None:
            return super().decide(inputs, context)
        (checkpoint,) = inputs.values()
        shape = expert_shape(checkpoint)
        statistics = self._read(checkpoint, shape, context)
        kept = {
            layer: self.choose(self.layer_scores(sums).tolist(), shape)
            for layer, sums in statistics.layers.items()
        }
        return self.decision_of(shape, statistics, kept, None, None)

    def _demonstrations(self) -> Calibration:
        if self.calibration is None:
            raise TypeError(f"{self.op} has no calibration data")
        return self.calibration

    def _read(self, checkpoint: Checkpoint, shape: ExpertShape, context: RunContext) -> ExpertStatistics:
        path = find_file(str(self.statistics), context.beside)
        statistics = read_statistics(path)
        if statistics.provenance.get("model") != model_fingerprint(checkpoint):
            raise PlanError(
                f"{path} was taken on another model than "
                f"{', '.join(source.model for source in checkpoint.inputs)}",
                hint="walk again: give `calibration` instead of `statistics`",
            )
        if statistics.provenance.get("propagate") != "original":
            raise PlanError(
                f"{path} was taken behind pruned layers: it says nothing of the model as it is",
                hint="walk again, with propagate: original",
            )
        counts = {sums.shape[2] for sums in statistics.layers.values()}
        if tuple(sorted(statistics.layers)) != shape.layers or counts != {shape.count}:
            raise PlanError(f"{path} does not have the layers and experts of {checkpoint.label}")
        return statistics

    def decision_of(
        self,
        shape: ExpertShape,
        statistics: ExpertStatistics,
        kept: Mapping[int, tuple[int, ...]],
        load_after: Mapping[int, list[int]] | None,
        walk: Mapping[str, Any] | None,
    ) -> Decision:
        """What the sums come to. `load_after` and `walk` are None where they were read from a file."""
        scores = {layer: self.layer_scores(sums) for layer, sums in statistics.layers.items()}
        keep = KeepList(dict(sorted(kept.items())), self.groups_after(shape))
        by_domain: dict[str, dict[int, tuple[int, ...]]] = {
            domain: {
                layer: self.choose(self.layer_scores(sums[number : number + 1]).tolist(), shape)
                for layer, sums in statistics.layers.items()
            }
            for number, domain in enumerate(statistics.domains)
        }
        row = {
            "kind": "experts", "op": self.op, "domains": list(statistics.domains), "experts": shape.count,
            "kept": keep.count, "groups": self.groups if shape.groups.limited else None,
            "overlap": overlap(by_domain), "walk": walk,
            "layers": [
                {
                    "layer": layer, "scores": scores[layer].tolist(), "kept": list(keep.layers[layer]),
                    "load": statistics.of(layer, "count").sum(axis=0).tolist(),
                    "load_after": load_after[layer] if load_after else None,
                }
                for layer in shape.layers
            ],
        }  # fmt: skip
        data = {**keep.as_dict(), "statistics": statistics.digest(), "provenance": statistics.provenance}
        texts = {STATISTICS: statistics.dump()}
        return Decision(data, texts, (row,), _never_chosen(statistics))


def _never_chosen(statistics: ExpertStatistics) -> tuple[Event, ...]:
    idle = {
        layer: [expert for expert, count in enumerate(statistics.of(layer, "count").sum(axis=0)) if not count]
        for layer in statistics.layers
    }
    found = {layer: experts for layer, experts in idle.items() if experts}
    if not found:
        return ()
    total = sum(len(experts) for experts in found.values())
    told = "; ".join(f"layer {layer}: {', '.join(map(str, experts[:8]))}" for layer, experts in found.items())
    message = f"{total} experts were never chosen on the calibration data ({told[:300]})"
    return (Event("idle experts", message),)
