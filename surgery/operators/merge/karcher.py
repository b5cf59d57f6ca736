"""The Karcher (Riemannian) mean of the models' directions, times the mean of their norms.

    μ ← exp_μ( Σ w_i log_μ(u_i) ),  u_i = W_i / ‖W_i‖,   until ‖Σ w_i log_μ(u_i)‖ < tolerance

on the unit sphere of the whole tensor. Every iterate lies in the span of the models, so the iteration runs on
their Gram matrix in float64 and the tensors are read once. Weights may differ; equal ones are the plain mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import acos, cos, sin, sqrt
from typing import ClassVar

from pydantic import Field

from surgery.errors import RecipeError
from surgery.operators.merge.combination import Combination, Gram
from surgery.operators.merge.method import Method, Settings, Values
from surgery.stream.checkpoint import TensorRef


def karcher_coefficients(dots: Gram, weights: Sequence[float], rounds: int, tolerance: float) -> list[float]:
    """Of the models. Those that are 0 have no direction and count as 0 in the mean of norms."""
    norms = [sqrt(dots[i][i]) for i in range(len(dots))]
    live = [i for i, norm in enumerate(norms) if norm]
    if not live:
        return [0.0] * len(norms)
    cosines = {i: {j: dots[i][j] / (norms[i] * norms[j]) for j in live} for i in live}

    def length(vector: Mapping[int, float]) -> float:
        return sqrt(max(0.0, sum(vector[i] * vector[j] * cosines[i][j] for i in live for j in live)))

    share = sum(weights[i] for i in live)
    mean = {i: weights[i] / share for i in live}
    size = length(mean)
    mean = {i: value / size for i, value in mean.items()} if size else {i: float(i == live[0]) for i in live}
    for _ in range(rounds):
        tangent = dict.fromkeys(live, 0.0)
        for i in live:
            cosine = min(1.0, max(-1.0, sum(mean[j] * cosines[i][j] for j in live)))
            angle = acos(cosine)
            if sin(angle) < 1e-12:
                continue
            pull = weights[i] / share * angle / sin(angle)
            tangent[i] += pull
            for j in live:
                tangent[j] -= pull * cosine * mean[j]
        step = length(tangent)
        if step < tolerance:
            break
        mean = {i: cos(step) * mean[i] + sin(step) / step * tangent[i] for i in live}
        size = length(mean)
        mean = {i: value / size for i, value in mean.items()}
    norm = sum(weight * norm for weight, norm in zip(weights, norms, strict=True)) / sum(weights)
    return [norm * mean[i] / norms[i] if i in mean else 0.0 for i in range(len(norms))]


class Karcher(Method):
    """Params of `merge.karcher`."""

    op: ClassVar[str] = "merge.karcher"

    models: Mapping[str, Settings]
    max_iterations: int = Field(default=100, ge=1, le=10_000)
    tolerance: float = Field(default=1e-9, gt=0)

    def donor(self, models: Mapping[str, Values], step: Values) -> str | None:
        weights = [values["weight"] for values in models.values()]
        if min(weights) < 0 or not sum(weights):
            raise RecipeError("weights of a Karcher mean are at least 0, and not all 0", path=("models",))
        carrying = [name for name, values in models.items() if values["weight"]]
        return carrying[0] if len(carrying) == 1 else None

    def kernel(
        self, labels: Sequence[str], models: Mapping[str, Values], step: Values, ref: TensorRef
    ) -> Combination:
        weights = [values["weight"] for values in models.values()]
        rounds, tolerance = self.max_iterations, self.tolerance
        return Combination(
            self.op, labels, lambda dots: karcher_coefficients(dots, weights, rounds, tolerance), based=False
        )
