"""Criteria that rank experts by what they did on demonstrations: one walk, one set of sums, many readouts.

A criterion reads a score for each expert out of the sums of a layer (surgery.calibrate.statistics). With
several domains, each domain's scores of a layer are divided by their sum and averaged (EASY-EP, section 4).

The sums are taken on the model as it is: by default what goes on to the next layer are the outputs of the
unpruned one, as the methods' own code has it, so that one walk serves any criterion and any ratio. With
`propagate: changed` every layer sees what the pruned layers in front of it give.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from surgery.calibrate.data import Calibration, find_file
from surgery.calibrate.statistics import FIELDS, ExpertStatistics, Sums, read_statistics
from surgery.errors import PlanError
from surgery.operators.experts.keep import ExpertShape, KeepList, expert_shape
from surgery.operators.experts.pruning import RankedExperts, overlap
from surgery.operators.protocol import Decision, RunContext
from surgery.stream.checkpoint import Checkpoint, Event
from surgery.stream.files import DataFile, file_hash

if TYPE_CHECKING:
    import numpy as np

    from surgery.operators.experts.walking import Collected

STATISTICS = "surgery_experts.json"

SAMPLE = 128
"""Bytes of each tensor that are looked at to tell models apart."""

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
        from surgery.operators.experts.walking import estimate

        return estimate(self, checkpoint, shape, context)

    def decide(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Decision:
        (checkpoint,) = inputs.values()
        shape = expert_shape(checkpoint)
        if self.statistics is not None:
            return self._decision(shape, self._read(checkpoint, shape, context), None)
        from surgery.operators.experts.walking import collect

        found = collect(self, checkpoint, shape, context)
        return self._decision(shape, found.statistics, found)

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

    def _decision(
        self, shape: ExpertShape, statistics: ExpertStatistics, found: Collected | None
    ) -> Decision:
        scores = {layer: self.layer_scores(sums) for layer, sums in statistics.layers.items()}
        kept = found.kept if found else {layer: self.choose(s.tolist(), shape) for layer, s in scores.items()}
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
            "overlap": overlap(by_domain), "walk": found.report if found else None,
            "layers": [
                {
                    "layer": layer, "scores": scores[layer].tolist(), "kept": list(keep.layers[layer]),
                    "load": statistics.of(layer, "count").sum(axis=0).tolist(),
                    "load_after": found.load_after[layer] if found else None,
                }
                for layer in shape.layers
            ],
        }  # fmt: skip
        data = {**keep.as_dict(), "statistics": statistics.digest(), "provenance": statistics.provenance}
        texts = {STATISTICS: statistics.dump()}
        return Decision(data, texts, (row,), (*_never_chosen(statistics), *(found.events if found else ())))


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """The same for the same weights in files of the same names, made by the same steps, wherever they lie.

    Of every file its size and its header, and what tells models of one shape apart: the etag of a file of
    the hub, of others some bytes out of the middle of every tensor.
    """
    digest = sha256()
    for source in checkpoint.inputs:
        for file in source.files:
            digest.update(f"{file.name}:{file.size}:{file.header_hash}:{file.etag or ''}\n".encode())
    places = {
        (part.stored.file.name, part.stored.offset, part.stored.nbytes): part.stored.file
        for ref in checkpoint.tensors.values()
        for source_ref in ref.sources()
        for part in map(source_ref.place, source_ref.parts)
        if part.stored.file is not None and not part.stored.file.etag and part.stored.nbytes
    }
    for (_, offset, nbytes), file in sorted(places.items(), key=lambda each: each[0]):
        digest.update(_bytes_at(file, offset, nbytes))
    for step in checkpoint.history:
        kept = {key: value for key, value in step.items() if key not in ("parents", "result")}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


def _bytes_at(file: DataFile, offset: int, nbytes: int) -> bytes:
    import numpy as np

    size = min(SAMPLE, nbytes)
    buffer = np.empty(size, np.uint8)
    file.read_into(buffer, offset + (nbytes - size) // 2)
    return buffer.tobytes()


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
