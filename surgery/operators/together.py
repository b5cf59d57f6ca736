"""One walk for the layer operators that follow one another and calibrate on the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgery.calibrate.batches import Batch, make_batches
from surgery.calibrate.budget import BATCH_TOKENS, estimate_walk, host_share
from surgery.calibrate.data import Calibration, CalibrationSet, read_calibration
from surgery.calibrate.skeleton import compute_dtype, device_kind, placement
from surgery.calibrate.threads import torch_threads
from surgery.calibrate.tokenizer import load_tokenizer
from surgery.calibrate.walk import LayerStep, Propagate, Walk, WalkSettings, room_for
from surgery.errors import CheckpointError
from surgery.operators.fingerprint import model_fingerprint
from surgery.operators.protocol import Decision, LayerOperator, RunContext
from surgery.stream.checkpoint import Checkpoint, Event


@dataclass(frozen=True)
class Demonstrations:
    """The sequences of a walk, and the id that fills up short rows."""

    found: CalibrationSet
    pad: int

    def batches(self, kind: str) -> tuple[Batch, ...]:
        """Batches for a kind of device."""
        return make_batches(self.found.sequences, BATCH_TOKENS[kind], self.pad)


@dataclass(frozen=True)
class Route:
    """What a walk goes over, and where it computes."""

    checkpoint: Checkpoint
    data: Demonstrations
    context: RunContext
    device: torch.device
    dtype: torch.dtype
    propagate: Propagate

    def fingerprint(self, ops: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What its results depend on; `ops` are the operators that walk, with their params."""
        return {
            **provenance(self.data, self.device, self.dtype, self.propagate),
            "model": model_fingerprint(self.checkpoint),
            "ops": list(ops),
        }

    def walk(self, steps: Sequence[LayerStep], share: float, fingerprint: Mapping[str, Any]) -> Walk:
        """Walk all layers. `share` of a GPU's free memory goes to a layer's experts."""
        context, checkpoint = self.context, self.checkpoint
        weights = sum(ref.numel for ref in checkpoint.tensors.values())
        with torch_threads(context.threads, weights):
            keep, room = room_for(checkpoint, self.device, context.memory_bytes, share)
            settings = WalkSettings(
                self.device, self.dtype, room_bytes=room, keep=keep,
                host_bytes=host_share(context.memory_bytes), folder=context.folder,
                snapshot_seconds=context.snapshot_seconds, ranks=context.ranks,
                trust_remote_code=context.trust_remote_code, progress=context.progress,
            )  # fmt: skip
            walk = Walk(checkpoint, self.data.batches(self.device.type), steps, settings, self.propagate)
            walk.fingerprint = fingerprint
            walk.run()
        return walk


def find_route(
    checkpoint: Checkpoint, calibration: Calibration, propagate: Propagate, context: RunContext
) -> Route:
    """The route over a model with its calibration data. Raises CheckpointError for what cannot be computed
    with."""
    check_decodable(checkpoint)
    device, dtype = placement(context.device, context.dtype)
    data = demonstrations(calibration, checkpoint, context)
    return Route(checkpoint, data, context, device, dtype, propagate)


def walk_together(
    operators: Sequence[LayerOperator], checkpoint: Checkpoint, contexts: Sequence[RunContext]
) -> list[Decision]:
    """The decisions of operators that work on one another's results, from one walk over `checkpoint`. The
    first context says where and how to walk; each operator keeps its files in the folder of its own."""
    key = operators[0].walk_key()
    if key is None or any(operator.walk_key() != key for operator in operators):
        raise ValueError("these operators cannot share a walk")
    route = find_route(checkpoint, *walk_needs(key), contexts[0])
    participants = []
    outlined = checkpoint
    for operator, own in zip(operators, contexts, strict=True):
        participants.append(operator.join(outlined, own))
        outlined = operator.outline({operator.input_names()[0]: outlined}, own)
    steps = [step for each in participants for step in each.steps]
    share = min(operator.experts_share for operator in operators)
    ops = [{"op": each.op, "params": each.summary()} for each in operators]
    walk = route.walk(steps, share, route.fingerprint(ops))
    found = [each.decision(walk) for each in participants]
    found[0] = _with_events(found[0], data_events(route.data.found))
    return found


def walk_needs(key: tuple[Any, ...]) -> tuple[Calibration, Propagate]:
    """Calibration data and propagation of a walk, out of its key."""
    calibration, propagate = key
    return calibration, propagate


def demonstrations(calibration: Calibration, checkpoint: Checkpoint, context: RunContext) -> Demonstrations:
    """The calibration data for this model."""
    tokenizer = load_tokenizer(
        checkpoint, add_bos=calibration.add_bos, trust_remote_code=context.trust_remote_code
    )
    config = {**checkpoint.config, **(checkpoint.config.get("text_config") or {})}
    found = read_calibration(
        calibration,
        tokenizer,
        folders=context.beside,
        vocab_size=config.get("vocab_size"),
        longest=config.get("max_position_embeddings"),
    )
    return Demonstrations(found, tokenizer.pad)


def provenance(
    data: Demonstrations, device: torch.device, dtype: torch.dtype, propagate: str
) -> dict[str, Any]:
    """What the results of a walk depend on beside the model."""
    return {
        "calibration": data.found.describe(), "routing": "model", "propagate": propagate,
        "device": device.type, "dtype": str(dtype).removeprefix("torch."),
        "batch_tokens": BATCH_TOKENS[device.type], "torch": str(torch.__version__),
    }  # fmt: skip


def check_decodable(checkpoint: Checkpoint, hint: str = "start from a bf16 or FP8 checkpoint") -> None:
    """Refuse, from headers, what a walk cannot compute with."""
    for ref in checkpoint.tensors.values():
        if ref.info.layer is not None and not ref.info.mtp and not ref.codec.decodable:
            raise CheckpointError(
                f"{ref.name} is stored as {ref.codec.name}, which can be copied but not computed with",
                hint=hint,
            )


def data_events(data: CalibrationSet) -> tuple[Event, ...]:
    if not data.cut:
        return ()
    message = (
        f"{data.cut} of {len(data.sequences)} demonstrations are longer than the sequence length: cut off"
    )
    return (Event("calibration", message),)


def estimate_together(
    calibration: Calibration, checkpoint: Checkpoint, context: RunContext
) -> Mapping[str, Any]:
    """A walk's needs for a plan. The device need not be there."""
    check_decodable(checkpoint)
    data = demonstrations(calibration, checkpoint, context)
    kind = device_kind(context.device)
    dtype = compute_dtype(kind, context.dtype)
    shapes = [batch.shape for batch in data.batches(kind)]
    found = estimate_walk(checkpoint, shapes, device=kind, dtype=dtype, memory_bytes=context.memory_bytes)
    return {**found.as_dict(), "calibration": data.found.describe()}


def _with_events(decision: Decision, events: tuple[Event, ...]) -> Decision:
    return Decision(decision.data, decision.texts, decision.measurements, (*decision.events, *events))
