"""The walk of the criteria: take the sums of each layer, choose, and count how the pruned layer routes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from surgery.calibrate.batches import Batch, make_batches
from surgery.calibrate.budget import (
    BATCH_TOKENS,
    estimate_walk,
    host_share,
)
from surgery.calibrate.data import CalibrationSet, read_calibration
from surgery.calibrate.experts import Routing
from surgery.calibrate.ranks import Ranks
from surgery.calibrate.skeleton import compute_dtype, device_kind, placement
from surgery.calibrate.statistics import ExpertStatistics, LayerStatistics
from surgery.calibrate.threads import torch_threads
from surgery.calibrate.tokenizer import load_tokenizer
from surgery.calibrate.walk import LayerObserver, Replay, Walk, WalkSettings, room_for
from surgery.errors import CheckpointError
from surgery.operators.experts.criterion import Criterion, model_fingerprint
from surgery.operators.experts.keep import ExpertShape, keep_tensors, text_section
from surgery.operators.protocol import RunContext
from surgery.stream.checkpoint import Checkpoint, Event, TensorRef

if TYPE_CHECKING:
    from surgery.calibrate.layers import BuiltLayer


@dataclass(frozen=True)
class Collected:
    """What a walk brought: sums, keep-lists, tokens by expert of the pruned layers, and how it went."""

    statistics: ExpertStatistics
    kept: Mapping[int, tuple[int, ...]]
    load_after: Mapping[int, list[int]]
    report: Mapping[str, Any]
    events: tuple[Event, ...]


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


def collect(
    criterion: Criterion, checkpoint: Checkpoint, shape: ExpertShape, context: RunContext
) -> Collected:
    """Walk the model over the criterion's demonstrations."""
    check_walkable(checkpoint, shape)
    device, dtype = placement(context.device, context.dtype)
    data, pad = calibration_set(criterion, checkpoint, context)
    weights = sum(ref.numel for ref in checkpoint.tensors.values())
    with torch_threads(context.threads, weights):
        step = PruneStep(criterion, shape, data.domains, context.ranks)
        provenance = {
            "calibration": data.describe(), "model": model_fingerprint(checkpoint), "routing": "model",
            "propagate": criterion.propagate, "device": device.type,
            "dtype": str(dtype).removeprefix("torch."), "batch_tokens": BATCH_TOKENS[device.type],
            "torch": str(torch.__version__),
        }  # fmt: skip
        keep, room = room_for(checkpoint, device, context.memory_bytes)
        settings = WalkSettings(
            device, dtype, room_bytes=room, keep=keep,
            host_bytes=host_share(context.memory_bytes),
            folder=context.folder, snapshot_seconds=context.snapshot_seconds, ranks=context.ranks,
            trust_remote_code=context.trust_remote_code, progress=context.progress,
        )  # fmt: skip
        batches = make_batches(data.sequences, BATCH_TOKENS[device.type], pad)
        walk = Walk(checkpoint, batches, [step], settings, criterion.propagate)
        walk.fingerprint = {**provenance, "op": criterion.op, "params": criterion.summary()}
        walk.run()
    layers = dict(sorted(step.sums.items()))
    return Collected(
        ExpertStatistics(data.domains, layers, provenance),
        dict(sorted(step.kept.items())),
        step.load_after,
        {
            "calibration": data.describe(),
            "layers": [{"layer": each.layer, "rms": each.rms, "change": each.change} for each in walk.report],
        },
        data_events(data),
    )


def check_walkable(checkpoint: Checkpoint, shape: ExpertShape) -> None:
    """Refuse, from headers, what a walk could not compute with or look at."""
    hint = "drop experts by list (experts.drop), by weights (experts.aimer) or at random (experts.random)"
    if not shape.rules.observable:
        raise CheckpointError(
            f"transformers runs all experts of {checkpoint.config.get('model_type')!r} in one operation: "
            "what each of them does cannot be observed",
            hint=hint,
        )
    for ref in checkpoint.tensors.values():
        if ref.info.layer is not None and not ref.info.mtp and not ref.codec.decodable:
            raise CheckpointError(
                f"{ref.name} is stored as {ref.codec.name}, which can be copied but not computed with",
                hint=f"{hint}, or start from a bf16 or FP8 checkpoint",
            )


def calibration_set(
    criterion: Criterion, checkpoint: Checkpoint, context: RunContext
) -> tuple[CalibrationSet, int]:
    """The sequences to walk over, and the id that fills up short rows."""
    if criterion.calibration is None:
        raise TypeError(f"{criterion.op} has no calibration data")
    tokenizer = load_tokenizer(
        checkpoint, add_bos=criterion.calibration.add_bos, trust_remote_code=context.trust_remote_code
    )
    config = text_section(checkpoint.config)
    data = read_calibration(
        criterion.calibration,
        tokenizer,
        folders=context.beside,
        vocab_size=config.get("vocab_size"),
        longest=config.get("max_position_embeddings"),
    )
    return data, tokenizer.pad


def data_events(data: CalibrationSet) -> tuple[Event, ...]:
    if not data.cut:
        return ()
    message = (
        f"{data.cut} of {len(data.sequences)} demonstrations are longer than the sequence length: cut off"
    )
    return (Event("calibration", message),)


def estimate(
    criterion: Criterion, checkpoint: Checkpoint, shape: ExpertShape, context: RunContext
) -> Mapping[str, Any]:
    """The walk's needs for a plan. The device need not be there."""
    check_walkable(checkpoint, shape)
    data, pad = calibration_set(criterion, checkpoint, context)
    kind = device_kind(context.device)
    dtype = compute_dtype(kind, context.dtype)
    shapes = [batch.shape for batch in make_batches(data.sequences, BATCH_TOKENS[kind], pad)]
    found = estimate_walk(checkpoint, shapes, device=kind, dtype=dtype, memory_bytes=context.memory_bytes)
    return {**found.as_dict(), "calibration": data.describe()}
