"""How much the outputs of a layer's matrices change when they are stored in fewer bits.

A walk over the model as it is takes the inputs of all matrices. Each scheme rounds them to nearest, and the
error of a unit, the matrices of one role in one layer, is

    Σ ‖(W − Q(W)) X‖² / Σ ‖W X‖²

over its matrices, from their Gram matrices alone. Where no token came by, X is taken for the identity.
Solvers (GPTQ) lose less than rounding does; what counts here is where, and how much more with fewer bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.calibrate.inputs import LayerInputs
from surgery.codecs.forms import ScaleDtype, codec_of
from surgery.codecs.grid import GridMethod, fit_grid, quantize
from surgery.codecs.schemes import IntScheme, Scheme
from surgery.operators.layerwise.assemble import problems
from surgery.operators.layerwise.problem import Matrix, Problem
from surgery.operators.layerwise.reconstruction import matrices, output_squares
from surgery.operators.layerwise.wave import Plan, WaveStep, wave_steps
from surgery.stream.checkpoint import TensorRef


@dataclass(frozen=True)
class Rounder:
    """Rounds to nearest in a scheme, as its stored form gives the values back."""

    scheme: Scheme
    grid: GridMethod = "absmax"
    scale_dtype: ScaleDtype = "bfloat16"

    def values(self, weights: torch.Tensor, splits: Sequence[int]) -> torch.Tensor:
        """Weights [B, R, C], matrices of `splits` rows stacked. Raises ValueError where groups do not divide
        C."""
        if isinstance(self.scheme, IntScheme):
            found = fit_grid(weights, self.scheme, self.grid, getattr(torch, self.scale_dtype))
            return quantize(weights, found, self.scheme).values()
        codec, new = codec_of(self.scheme, self.scale_dtype), torch.empty_like(weights)
        for index in range(len(weights)):
            for rows in matrices(weights.shape[1], splits):
                tile = weights[index, rows].cpu().contiguous()
                shape = tuple(tile.shape)
                raw = {**codec.encode(tile), **codec.constants(shape)}
                new[index, rows] = codec.decode(shape, 0, shape[0], raw).to(new)
        return new


@dataclass
class UnitSums:
    """‖W X‖² of a unit and ‖(W − Q(W)) X‖² for each scheme, and the same of W and W − Q(W) alone."""

    outputs: float = 0.0
    lost: list[float] = field(default_factory=list)
    weights: float = 0.0
    weights_lost: list[float] = field(default_factory=list)

    @property
    def errors(self) -> list[float]:
        """The relative error with each scheme."""
        if self.outputs > 0:
            return [each / self.outputs for each in self.lost]
        return [each / self.weights if self.weights else 0.0 for each in self.weights_lost]


@dataclass
class Sensing:
    """Who takes the inputs of the walk. In `plan` a matrix's work wants the name of its role."""

    plan: Plan
    rounders: Sequence[Rounder]
    device: torch.device
    room_bytes: int
    sums: dict[tuple[int, str], UnitSums] = field(default_factory=dict)

    @property
    def steps(self) -> list[WaveStep]:
        return wave_steps(self)

    @property
    def needs_gram(self) -> bool:
        return True

    def take(self, layer: int, number: int, refs: Sequence[TensorRef], inputs: LayerInputs) -> None:
        if number == 0:
            for unit in [each for each in self.sums if each[0] == layer]:
                del self.sums[unit]
        wave = self.plan[layer][number]
        for batch, problem in problems(layer, wave, refs, inputs, self.device, self.room_bytes, gram=True):
            self._add(batch[0][0], problem)

    def _add(self, first: Matrix, problem: Problem) -> None:
        zeros = [0.0] * len(self.rounders)
        sums = self.sums.setdefault(
            (problem.layer, str(first.work.wanted)), UnitSums(lost=zeros, weights_lost=list(zeros))
        )
        weights, gram = problem.weights, problem.known_gram
        sums.outputs += float(output_squares(weights, gram).sum())
        sums.weights += float(weights.square().sum(dtype=torch.float64))
        for index, rounder in enumerate(self.rounders):
            change = rounder.values(weights, problem.splits).sub_(weights)
            sums.lost[index] += float(output_squares(change, gram).sum())
            sums.weights_lost[index] += float(change.square().sum(dtype=torch.float64))

    def state(self) -> dict[str, Any]:
        return {
            "sums": [
                [layer, role, each.outputs, each.lost, each.weights, each.weights_lost]
                for (layer, role), each in self.sums.items()
            ]
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self.sums = {(layer, role): UnitSums(*rest) for layer, role, *rest in state["sums"]}
