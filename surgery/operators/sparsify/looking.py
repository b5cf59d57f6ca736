"""The walk that measures layers before they get their sparsity: it looks on and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.calibrate.inputs import LayerInputs
from surgery.operators.layerwise.assemble import problems
from surgery.operators.layerwise.problem import Problem
from surgery.operators.layerwise.wave import Plan, WaveStep, wave_steps
from surgery.operators.sparsify.ratios import half_error, outlier_share
from surgery.stream.checkpoint import TensorRef


@dataclass
class Looking:
    """Who takes the inputs of the first walk: `found` has each layer's share of outliers, or its error
    (`errors`).

    Outliers are relative to the mean of a whole layer, so that they are counted with its last wave: until
    then its inputs' squares wait, which are small.
    """

    plan: Plan
    errors: bool
    multiple: float
    device: torch.device
    room_bytes: int
    found: dict[int, float] = field(default_factory=dict)
    _held: list[LayerInputs] = field(default_factory=list)

    @property
    def steps(self) -> list[WaveStep]:
        return wave_steps(self)

    @property
    def needs_gram(self) -> bool:
        return self.errors

    def take(self, layer: int, number: int, refs: Sequence[TensorRef], inputs: LayerInputs) -> None:
        if number == 0:
            self.found[layer], self._held = 0.0, []
        if self.errors:
            for problem in self.problems_of(layer, number, refs, inputs):
                self.found[layer] += float(half_error(problem.weights, problem.known_gram).sum())
            return
        self._held.append(inputs)
        if number + 1 == len(self.plan[layer]):
            self.found[layer] = outlier_share(Pairs(self, layer, refs, self._held), multiple=self.multiple)
            self._held = []

    def state(self) -> dict[str, Any]:
        return {"found": {str(layer): value for layer, value in self.found.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.found = {int(layer): value for layer, value in state["found"].items()}

    def problems_of(
        self, layer: int, number: int, refs: Sequence[TensorRef], inputs: LayerInputs
    ) -> Iterator[Problem]:
        for _, problem in problems(
            layer, self.plan[layer][number], refs, inputs, self.device, self.room_bytes, gram=self.errors
        ):
            yield problem


@dataclass(frozen=True)
class Pairs:
    """Weights and squares of all matrices of a layer, decoded anew each time they are gone through."""

    looking: Looking
    layer: int
    refs: Sequence[TensorRef]
    taken: Sequence[LayerInputs]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, inputs in enumerate(self.taken):
            for problem in self.looking.problems_of(self.layer, number, self.refs, inputs):
                yield problem.weights, problem.squares
