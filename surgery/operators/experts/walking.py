"""The walk of the criteria: take the sums of each layer, choose, and count how the pruned layer routes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.calibrate.batches import Batch
from surgery.calibrate.experts import Routing
from surgery.calibrate.ranks import Ranks
from surgery.calibrate.statistics import ExpertStatistics, LayerStatistics
from surgery.calibrate.walk import LayerObserver, Replay, Walk
from surgery.errors import CheckpointError
from surgery.operators.experts.criterion import Criterion
from surgery.operators.experts.keep import ExpertShape, keep_tensors
from surgery.operators.protocol import Decision, RunContext
from surgery.operators.together import check_decodable
from surgery.stream.checkpoint import Checkpoint, TensorRef

if TYPE_CHECKING:
    import torch

    from surgery.calibrate.layers import BuiltLayer


@dataclass
class LoadCounter:
    """Counts the tokens that the router of a layer sends to each expert."""

    counts: list[int] = field(default_factory=list)

    @property
    def experts(self) -> Sequence[Any]:
        return (self,)

    @contextmanager
    def watch(self, layer: BuiltLayer) -> Iterator[None]:
        yield

    def batch(self, batch: Batch) -> None:
        """Every domain counts."""

    def routed(self, routing: Routing) -> None:
        old = self.counts or [0] * len(routing.counts)
        self.counts = [a + b for a, b in zip(old, routing.counts, strict=True)]

    def expert(self, *seen: Any) -> None:
        """Nothing to see: the routing alone is counted."""

    def combined(self, routing: Routing, out: torch.Tensor) -> None:
        """Nothing to see: no expert has run."""


@dataclass
class PruneStep:
    """The step of one criterion in a walk."""

    criterion: Criterion
    shape: ExpertShape
    domains: tuple[str, ...]
    ranks: Ranks
    sums: dict[int, np.ndarray[Any, np.dtype[np.float64]]] = field(default_factory=dict)
    kept: dict[int, tuple[int, ...]] = field(default_factory=dict)
    load_after: dict[int, list[int]] = field(default_factory=dict)
    _taking: LayerStatistics | None = None

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        return self.criterion.outline({"input": checkpoint}, RunContext())

    def observe(self, layer: int, *, has_experts: bool) -> LayerObserver | None:
        if layer not in self.shape.layers:
            return None
        if not has_experts:
            raise TypeError(f"the experts of layer {layer} do not run one by one")
        self._taking = LayerStatistics(
            layer, self.shape.count, len(self.domains), self.shape.rules.norm, self.ranks
        )
        return self._taking

    def finish(self, layer: int, refs: Sequence[TensorRef], replay: Replay) -> Sequence[TensorRef] | None:
        if self._taking is None:
            return None
        sums, self._taking = self._taking.sums, None
        kept = self.criterion.choose(self.criterion.layer_scores(sums).tolist(), self.shape)
        rewritten = keep_tensors(refs, kept, self.shape)
        counter = LoadCounter()
        replay(rewritten, counter)
        self.sums[layer], self.kept[layer], self.load_after[layer] = sums, kept, counter.counts
        return rewritten if self.criterion.propagate == "changed" else None

    def state(self) -> dict[str, Any]:
        return {
            "sums": {str(layer): sums.tolist() for layer, sums in self.sums.items()},
            "kept": {str(layer): list(kept) for layer, kept in self.kept.items()},
            "load_after": {str(layer): counts for layer, counts in self.load_after.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.sums = {int(layer): np.array(sums) for layer, sums in state["sums"].items()}
        self.kept = {int(layer): tuple(kept) for layer, kept in state["kept"].items()}
        self.load_after = {int(layer): counts for layer, counts in state["load_after"].items()}


@dataclass
class Pruning:
    """The part of a criterion in a walk."""

    criterion: Criterion
    shape: ExpertShape
    ranks: Ranks

    def __post_init__(self) -> None:
        calibration = self.criterion.calibration
        if calibration is None:
            raise TypeError(f"{self.criterion.op} has no calibration data")
        self._domains = tuple(calibration.files)
        self._step = PruneStep(self.criterion, self.shape, self._domains, self.ranks)

    @property
    def steps(self) -> Sequence[PruneStep]:
        return (self._step,)

    def decision(self, walk: Walk) -> Decision:
        provenance = {key: value for key, value in walk.fingerprint.items() if key != "ops"}
        statistics = ExpertStatistics(self._domains, dict(sorted(self._step.sums.items())), provenance)
        report = {
            "calibration": provenance["calibration"],
            "layers": [{"layer": each.layer, "rms": each.rms, "change": each.change} for each in walk.report],
        }
        kept = dict(sorted(self._step.kept.items()))
        return self.criterion.decision_of(self.shape, statistics, kept, self._step.load_after, report)


def check_walkable(checkpoint: Checkpoint, shape: ExpertShape) -> None:
    """Refuse, from headers, what a walk could not compute with or look at."""
    hint = "drop experts by list (experts.drop), by weights (experts.aimer) or at random (experts.random)"
    if not shape.rules.observable:
        raise CheckpointError(
            f"transformers runs all experts of {checkpoint.config.get('model_type')!r} in one operation: "
            "what each of them does cannot be observed",
            hint=hint,
        )
    check_decodable(checkpoint, f"{hint}, or start from a bf16 or FP8 checkpoint")
