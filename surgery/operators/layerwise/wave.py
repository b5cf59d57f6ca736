"""A layer's matrices in waves, as the steps of a walk.

For each layer, wave by wave (what fits into memory at once, see `select.waves`): the calibration tokens run
through the layer as it is, the inputs of the wave's matrices are summed up, and whoever asked for them takes
them: a solver, which puts new tensors in the place of the old ones, or one that only looks on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from surgery.calibrate.inputs import LayerInputs
from surgery.calibrate.walk import LayerObserver, Replay
from surgery.operators.layerwise.problem import Matrix
from surgery.stream.checkpoint import Checkpoint, TensorRef

Plan = Mapping[int, Sequence[Sequence[Matrix]]]
"""The waves of each layer."""


class Taker(Protocol):
    """Who takes the inputs of a walk's waves."""

    @property
    def plan(self) -> Plan: ...

    @property
    def needs_gram(self) -> bool:
        """Whether it wants Σ x xᵀ, not its diagonal alone."""

    def take(
        self, layer: int, number: int, refs: Sequence[TensorRef], inputs: LayerInputs
    ) -> Sequence[TensorRef] | None:
        """The inputs of wave `number`; gives the layer's tensors where they change."""

    def state(self) -> dict[str, Any]:
        """What a snapshot must hold, as plain data."""

    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class WaveStep:
    """Wave number `number` of each layer. The first of the waves keeps the state of all."""

    taker: Taker
    number: int
    _taking: LayerInputs | None = None

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint

    def observe(self, layer: int, *, has_experts: bool) -> LayerObserver | None:
        waves = self.taker.plan.get(layer, ())
        if self.number >= len(waves):
            return None
        wave = waves[self.number]
        modules = [matrix.module for matrix in wave if matrix.module is not None]
        experts = {matrix.expert for matrix in wave if matrix.expert is not None}
        self._taking = LayerInputs(layer, modules, experts, gram=self.taker.needs_gram)
        return self._taking

    def finish(self, layer: int, refs: Sequence[TensorRef], replay: Replay) -> Sequence[TensorRef] | None:
        if self._taking is None:
            return None
        inputs, self._taking = self._taking, None
        return self.taker.take(layer, self.number, refs, inputs)

    def state(self) -> dict[str, Any]:
        return self.taker.state() if self.number == 0 else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        if self.number == 0:
            self.taker.restore(state)


def wave_steps(taker: Taker) -> list[WaveStep]:
    """One step for each wave of the layer that has most."""
    return [WaveStep(taker, number) for number in range(max(map(len, taker.plan.values()), default=0))]
