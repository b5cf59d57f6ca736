"""The weighted mean of models, Σ w_i W_i / Σ w_i (model soups, arXiv 2203.05482).

`normalize: false` leaves the division out. Weights are divided in float64, sums run in float32 in the order
of `models`. A tensor for which one model alone has weight is that model's, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from surgery.errors import RecipeError
from surgery.operators.merge.combination import Combination
from surgery.operators.merge.method import Method, Settings, Values
from surgery.stream.checkpoint import TensorRef


class Linear(Method):
    """Params of `merge.linear`."""

    op: ClassVar[str] = "merge.linear"

    models: Mapping[str, Settings]
    normalize: bool = Field(default=True, strict=True)

    def donor(self, models: Mapping[str, Values], step: Values) -> str | None:
        weights = self._weights(models)
        carrying = [name for name, weight in zip(models, weights, strict=True) if weight]
        return carrying[0] if len(carrying) == 1 and weights[list(models).index(carrying[0])] == 1 else None

    def kernel(
        self, labels: Sequence[str], models: Mapping[str, Values], step: Values, ref: TensorRef
    ) -> Combination:
        weights = self._weights(models)
        copies = abs(sum(weights) - 1) < 1e-12
        return Combination(self.op, labels, weights, based=False, equal_copies=copies)

    def _weights(self, models: Mapping[str, Values]) -> list[float]:
        weights = [values["weight"] for values in models.values()]
        if not self.normalize:
            return weights
        total = sum(weights)
        if abs(total) < 1e-8:
            raise RecipeError("the weights sum to 0 and cannot be normalised", path=("models",))
        return [weight / total for weight in weights]
