"""The layer walk: one decoder layer at a time through a model that is larger than memory.

For each layer in order: its tensors are pulled from the (lazy) checkpoint, the hidden states of all batches
run through transformers' own layer, every step observes and may rewrite the layer, and the hidden states go
on to the next layer:

    for each step:  forward → decide → rewrite;  the next step's forward runs on the rewritten layer

`propagate` says which layer's outputs go on: those of the layer as it was (`original`) or as the steps left
it (`changed`). Steps that need different answers are walks of their own.

Memory: the dense part of one layer and one batch on the device, the experts that are in use (see
`experts.py`), two generations of hidden states in host memory or in mapped files. Walks resume from
snapshots to equal results.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from surgery.calibrate.activations import Activations, fill_from, read_states, write_snapshot
from surgery.calibrate.batches import Batch
from surgery.calibrate.budget import expert_share, largest_experts
from surgery.calibrate.experts import ExpertBank, ExpertObserver, RoutedExperts, attached
from surgery.calibrate.layers import BuiltLayer, LayeredModel
from surgery.calibrate.ranks import ONE_RANK, Ranks
from surgery.calibrate.state import by_expert
from surgery.errors import CheckpointError, PlanError
from surgery.stream.checkpoint import Checkpoint, TensorRef
from surgery.stream.journal import first_difference

Propagate = Literal["original", "changed"]
Progress = Callable[[str, int, int], None]
SNAPSHOT_SECONDS = 600.0


def room_for(
    checkpoint: Checkpoint, device: torch.device, memory_bytes: int, share: float = 0.6
) -> tuple[str, int]:
    """Where a layer's experts are kept between batches, and in how many bytes: a share of the budget on a
    CPU; on a GPU `share` of what is free, or page-locked host memory where they do not fit."""
    if device.type == "cpu":
        return "device", expert_share(memory_bytes)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = int(free * share)
    return ("device", room) if largest_experts(checkpoint) <= room else ("host", memory_bytes)


@dataclass(frozen=True)
class WalkSettings:
    """Where and how a walk runs. Of these, device kind, dtype and threads can change results.

    `room_bytes` bounds the experts that are kept (see `ExpertBank`), `host_bytes` the hidden states in
    memory: beyond it they live in files in `folder`, where snapshots go as well (None: neither).
    """

    device: torch.device
    dtype: torch.dtype
    room_bytes: int
    host_bytes: int
    folder: Path | None = None
    snapshot_seconds: float = SNAPSHOT_SECONDS
    keep: str = "device"
    ranks: Ranks = ONE_RANK
    trust_remote_code: bool = False
    progress: Progress | None = None


class LayerObserver(Protocol):
    """Looks on while a layer runs over all batches."""

    @property
    def experts(self) -> Sequence[ExpertObserver]: ...

    def watch(self, layer: BuiltLayer) -> AbstractContextManager[None]:
        """Hooks on the layer's submodules, for as long as it runs."""

    def batch(self, batch: Batch) -> None:
        """Called before each batch."""


Replay = Callable[[Sequence[TensorRef], LayerObserver], None]
"""Run the layer's attention and router again with these (rewritten) tensors, its experts left out."""


class LayerStep(Protocol):
    """What an operator does in a walk."""

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint as it will be behind this step, from headers: its config rules rewritten layers."""

    def observe(self, layer: int, *, has_experts: bool) -> LayerObserver | None:
        """Who looks on in this layer; None where the step has no interest in it. `has_experts`: whether
        experts run one by one in it."""

    def finish(self, layer: int, refs: Sequence[TensorRef], replay: Replay) -> Sequence[TensorRef] | None:
        """Decide, after the forward; the layer's new tensors, or None where it stays as it is."""

    def state(self) -> dict[str, Any]:
        """What a snapshot must hold, as plain data."""

    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class LayerReport:
    """A layer's passage: seconds, root mean square of the hidden states behind it, and their relative change
    ‖out − in‖ / ‖in‖."""

    layer: int
    seconds: float
    rms: float
    change: float

    def as_dict(self) -> dict[str, Any]:
        return {"layer": self.layer, "seconds": self.seconds, "rms": self.rms, "change": self.change}


@dataclass
class PassageSums:
    """Squares of the hidden states in front of a layer and behind it, tokens of padding left out."""

    before: float = 0.0
    after: float = 0.0
    change: float = 0.0
    count: int = 0

    def add(self, before: torch.Tensor, after: torch.Tensor, valid: torch.Tensor | None) -> None:
        before, after = before.flatten(0, 1), after.flatten(0, 1)
        if valid is not None:
            before, after = before[valid], after[valid]
        self.before += _squares(before)
        self.after += _squares(after)
        self.change += _squares(after.float() - before.float())
        self.count += after.numel()

    def report(self, layer: int, seconds: float) -> LayerReport:
        change = (self.change / self.before) ** 0.5 if self.before else 0.0
        return LayerReport(layer, round(seconds, 3), (self.after / self.count) ** 0.5, change)


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float32).double() ** 2)


@dataclass
class Walk:
    """A walk of `steps` over `checkpoint` with `batches`. Raises CheckpointError where it cannot be built."""

    checkpoint: Checkpoint
    batches: Sequence[Batch]
    steps: Sequence[LayerStep]
    settings: WalkSettings
    propagate: Propagate = "original"
    report: list[LayerReport] = field(default_factory=list)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        outlines = [self.checkpoint]
        for step in self.steps:
            outlines.append(step.outline(outlines[-1]))
        device = self.settings.device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._models: list[LayeredModel] = []
        for outline in outlines:
            same = [m for m in self._models if m.checkpoint.config == outline.config]
            self._models.append(same[0] if same else self._layered(outline))
        for model in dict.fromkeys(self._models):
            if model is not self._models[0]:
                model.share_calls(self._models[0])

    def _layered(self, checkpoint: Checkpoint) -> LayeredModel:
        settings = self.settings
        return LayeredModel(
            checkpoint, settings.device, settings.dtype, trust_remote_code=settings.trust_remote_code
        )

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)

    def run(self, until: int | None = None) -> None:
        """Walk all layers, or those in front of `until`; go on from a snapshot where there is one."""
        model = self._models[0]
        shapes = [batch.shape for batch in self.batches]
        self._place = (self._activations(shapes, "now"), self._activations(shapes, "next"), 0)
        self._embed(model)
        start = saved_layer = self._resume()
        self._place = (self._now, self._next, start)
        self.settings.ranks.wait()
        saved = time.monotonic()
        stop = model.num_layers if until is None else until
        try:
            for layer in range(start, stop):
                self._tell(layer, model.num_layers)
                self._layer(layer)
                if time.monotonic() - saved >= self.settings.snapshot_seconds:
                    self._save(layer + 1)
                    saved, saved_layer = time.monotonic(), layer + 1
        except KeyboardInterrupt:
            if self._place[2] > saved_layer:
                self._save(self._place[2])
            raise
        self._tell(stop, model.num_layers)
        # Nothing is to come: give the other generation back.
        self._place = (self._now, self._now, stop)

    @property
    def _now(self) -> Activations:
        """Hidden states in front of the layer that is to come, the third of `_place`."""
        return self._place[0]

    @property
    def _next(self) -> Activations:
        return self._place[1]

    def _save(self, layer: int) -> None:
        if self.settings.folder and self.settings.ranks.leads:
            state = {"fingerprint": self.fingerprint, "steps": [step.state() for step in self.steps]}
            state["report"] = [each.as_dict() for each in self.report[:layer]]
            write_snapshot(self.settings.folder, layer, self._now, state)

    def logits(self) -> Iterator[torch.Tensor]:
        """After `run`: logits [batch, tokens, vocabulary] of each batch in turn, in the compute dtype."""
        with self._models[0].end() as head:
            for number, batch in enumerate(self.batches):
                yield head.logits(batch.ids, self._now.get(number, self.settings.device))

    def row_logits(self) -> Iterator[torch.Tensor]:
        """After `run`: logits [length, vocabulary] of each row in turn, one row in memory at a time."""
        with self._models[0].end() as head:
            for number, batch in enumerate(self.batches):
                hidden = self._now.get(number, torch.device("cpu"))
                for row, length in enumerate(batch.lengths):
                    one = slice(row, row + 1)
                    yield head.logits(batch.ids[one, :length], hidden[one, :length])[0]

    def _activations(self, shapes: Sequence[tuple[int, int]], name: str) -> Activations:
        settings = self.settings
        hidden = self._models[0].hidden_size
        itemsize = torch.finfo(settings.dtype).bits // 8
        fits = 2 * sum(rows * cols for rows, cols in shapes) * hidden * itemsize <= settings.host_bytes
        file = None
        if settings.folder is not None and not fits:
            file = settings.folder / f"hidden-{name}-{settings.ranks.index}.bin"
        return Activations(
            shapes, hidden, settings.dtype, file=file, pin=file is None and settings.device.type == "cuda"
        )

    def _embed(self, model: LayeredModel) -> None:
        with model.begin() as embedder:
            for number, batch in enumerate(self.batches):
                self._now.put(number, embedder.embed(batch.ids))

    def _resume(self) -> int:
        """The layer to go on with, from the newest snapshot that is whole. PlanError for another walk's."""
        folder = self.settings.folder
        for state in read_states(folder) if folder is not None else ():
            difference = first_difference(state["fingerprint"], json.loads(json.dumps(self.fingerprint)))
            if difference:
                raise PlanError(
                    f"{folder} holds an unfinished walk of something else: {difference}",
                    hint="use another output folder, or restart with --fresh",
                )
            if folder is not None and fill_from(folder, state, self._now):
                for step, saved in zip(self.steps, state["steps"], strict=True):
                    step.restore(saved)
                self.report[:] = [LayerReport(**each) for each in state["report"]]
                return int(state["layer"])
        return 0

    def _tell(self, layer: int, layers: int) -> None:
        if self.settings.progress:
            self.settings.progress("walk", layer * self.tokens, layers * self.tokens)

    def _layer(self, layer: int) -> None:
        begun = time.monotonic()
        refs: Sequence[TensorRef] = self._models[0].refs(layer)
        current = False
        """Whether `_next` holds the outputs that go on."""
        for number, step in enumerate(self.steps):
            model, after = self._models[number], self._models[number + 1]
            observer = step.observe(layer, has_experts=model.experts_of(layer) is not None)
            if observer is not None:
                keep = self.propagate == "changed" or not current
                self._forward(model, model.load_layer(layer, refs), refs, observer, keep=keep)
                current = True

            def replay(
                rewritten: Sequence[TensorRef], observer: LayerObserver, model: LayeredModel = after
            ) -> None:
                again = model.load_layer(layer, rewritten)
                self._forward(model, again, rewritten, observer, keep=False, count_only=True)

            new = step.finish(layer, refs, replay)
            if new is not None:
                refs = new
                current = current and self.propagate == "original"
        if not current:
            model = self._models[-1] if self.propagate == "changed" else self._models[0]
            if self.propagate == "original":
                refs = model.refs(layer)
            self._forward(model, model.load_layer(layer, refs), refs, None, keep=True)
        self.report.append(self._sums.report(layer, time.monotonic() - begun))
        # One assignment, so that an interrupt finds hidden states and layer in step.
        self._place = (self._next, self._now, layer + 1)

    def _forward(
        self,
        model: LayeredModel,
        built: BuiltLayer,
        refs: Sequence[TensorRef],
        observer: LayerObserver | None,
        *,
        keep: bool,
        count_only: bool = False,
    ) -> None:
        """All batches through a layer; frees it. Outputs go to `_next` under `keep`."""
        routed = self._experts(model, built, refs, observer, count_only)
        if keep:
            self._sums = PassageSums()
        with ExitStack() as stack:
            stack.callback(model.free_layer, built)
            stack.enter_context(torch.no_grad())
            if routed and built.experts is not None:
                stack.enter_context(attached(built.experts, routed))
            stack.enter_context(observer.watch(built) if observer else nullcontext())
            for number, batch in enumerate(self.batches):
                if observer:
                    observer.batch(batch)
                valid = batch.valid(self.settings.device)
                if routed:
                    routed.valid = valid
                args, kwargs = model.call(built.index, batch.shape)
                hidden = self._now.get(number, self.settings.device)
                out = built.module(hidden, *args, **kwargs)
                if keep:
                    after = out[0] if isinstance(out, tuple) else out
                    self._next.put(number, after)
                    self._sums.add(hidden, after, valid)

    def _experts(
        self,
        model: LayeredModel,
        built: BuiltLayer,
        refs: Sequence[TensorRef],
        observer: LayerObserver | None,
        count_only: bool,
    ) -> RoutedExperts | None:
        if built.experts is None:
            return None
        settings, rules = self.settings, model.checkpoint.architecture.experts
        if rules is None:
            raise CheckpointError(
                f"{model.checkpoint.label}: where its experts lie is not known "
                f"(model_type {model.checkpoint.config.get('model_type')!r})",
                hint="an architecture is one short file in surgery/stream/architectures",
            )
        bank = ExpertBank(
            built.experts, by_expert(refs), rules, settings.device, settings.dtype,
            settings.room_bytes, settings.keep, self._side,
        )  # fmt: skip
        watching = observer.experts if observer else ()
        return RoutedExperts(bank, watching, settings.ranks, count_only=count_only)
