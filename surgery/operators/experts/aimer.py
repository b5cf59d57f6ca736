"""AIMER: experts ranked by their weights alone, without any data (arXiv 2603.18492).

    S[e] = mean |W| / √(mean W²)      over all weights of the expert's projections together

1 where all weights have one magnitude, 0.80 for Gaussian ones, lower the heavier the tails. The method is
known here by its abstract; which end of the scale marks the important experts is not confirmed, so
`important` decides. The default did better on two small models (benchmarks/README.md).

Sums are float64 per tile, added in tile order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from surgery.errors import CheckpointError
from surgery.operators.experts.keep import ExpertShape, KeepList, expert_shape
from surgery.operators.experts.pruning import RankedExperts
from surgery.operators.protocol import Decision, RunContext
from surgery.stream.checkpoint import Checkpoint, ReadContext, TensorRef

if TYPE_CHECKING:
    import torch


def sums(values: torch.Tensor) -> tuple[float, float]:
    """(Σ |w|, Σ w²) in float64."""
    wide = values.double()
    return float(wide.abs().sum()), float(wide.square().sum())


def aimer(absolute: float, square: float, count: int) -> float:
    """mean |W| / √(mean W²) from the sums; 0 for an expert of zeros."""
    return absolute / count / sqrt(square / count) if square else 0.0


class Aimer(RankedExperts):
    """Params of `experts.aimer`."""

    op: ClassVar[str] = "experts.aimer"

    important: Literal["low", "high"] = "low"
    """Which end of the scale stays."""

    def estimate(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Mapping[str, Any]:
        (checkpoint,) = inputs.values()
        layers = _by_layer(checkpoint).values()
        refs = [ref for experts in layers for each in experts.values() for ref in each]
        stuck = next((ref for ref in refs if not ref.codec.decodable), None)
        if stuck is not None:
            raise CheckpointError(
                f"{stuck.name} is stored as {stuck.codec.name}, which can be copied but not computed with",
                hint="drop experts by list (experts.drop) or at random (experts.random)",
            )
        return {"device": "cpu", "bytes_read": sum(source.nbytes for ref in refs for source in ref.sources())}

    def decide(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Decision:
        (checkpoint,) = inputs.values()
        shape = expert_shape(checkpoint)
        layers = _by_layer(checkpoint)
        jobs = [(layer, expert) for layer in shape.layers for expert in range(shape.count)]
        found: dict[int, list[float]] = {layer: [0.0] * shape.count for layer in shape.layers}
        with ThreadPoolExecutor(context.threads or 2) as pool:
            scored = pool.map(lambda job: _score(layers[job[0]][job[1]]), jobs)
            for done, ((layer, expert), score) in enumerate(zip(jobs, scored, strict=True), 1):
                found[layer][expert] = score
                if context.progress:
                    context.progress("experts", done, len(jobs))
        return self._decision(found, shape)

    def _decision(self, found: Mapping[int, list[float]], shape: ExpertShape) -> Decision:
        sign = 1.0 if self.important == "high" else -1.0
        kept = {
            layer: self.choose([sign * score for score in scores], shape) for layer, scores in found.items()
        }
        keep = KeepList(kept, self.groups_after(shape))
        row = {
            "kind": "experts", "op": self.op, "domains": [], "experts": shape.count, "kept": keep.count,
            "groups": self.groups if shape.groups.limited else None, "overlap": [], "walk": None,
            "layers": [
                {"layer": layer, "scores": found[layer], "kept": list(kept[layer]), "load": None,
                 "load_after": None}
                for layer in shape.layers
            ],
        }  # fmt: skip
        return Decision(keep.as_dict(), measurements=(row,))


def _by_layer(checkpoint: Checkpoint) -> dict[int, dict[int, list[TensorRef]]]:
    """The matrices of each routed expert, without those of the prediction layer."""
    found: dict[int, dict[int, list[TensorRef]]] = {}
    for ref in checkpoint.tensors.values():
        info = ref.info
        matrix = info.role == "routed_expert" and len(ref.shape) > 1 and not info.mtp
        if matrix and info.layer is not None and info.expert is not None:
            found.setdefault(info.layer, {}).setdefault(info.expert, []).append(ref)
    return found


def _score(refs: Sequence[TensorRef]) -> float:
    absolute = square = 0.0
    context = ReadContext()
    for ref in refs:
        for start, stop in ref.tiles():
            part = sums(ref.pull(start, stop, context))
            absolute, square = absolute + part[0], square + part[1]
    return aimer(absolute, square, sum(ref.numel for ref in refs))
