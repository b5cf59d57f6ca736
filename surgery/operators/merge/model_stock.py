"""Model Stock (arXiv 2403.19522, equation 3): between the base and the mean of N fine-tuned models.

    t = N cos θ / (1 + (N − 1) cos θ),      result = t · mean(W_i) + (1 − t) · base

cos θ is the mean cosine of all pairs of task vectors, over the whole tensor (the paper's layer). A pair with
a task vector of 0 has cosine 0. t is held in [0, 1]: a negative cosine gives the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import ClassVar

from pydantic import model_validator

from surgery.operators.merge.combination import Combination, Gram
from surgery.operators.merge.method import Method, Settings, Values
from surgery.stream.checkpoint import TensorRef


def stock_coefficients(dots: Gram) -> list[float]:
    """Of the task vectors: t / N each."""
    count = len(dots)
    cosines = []
    for i in range(count):
        for j in range(i):
            size = sqrt(dots[i][i] * dots[j][j])
            cosines.append(dots[i][j] / size if size else 0.0)
    cosine = max(0.0, sum(cosines) / len(cosines))
    t = min(1.0, count * cosine / (1 + (count - 1) * cosine))
    return [t / count] * count


class ModelStock(Method):
    """Params of `merge.model_stock`: a base and two models or more; weights play no part."""

    op: ClassVar[str] = "merge.model_stock"

    base: str
    models: Mapping[str, Settings]

    @model_validator(mode="after")
    def _several(self) -> ModelStock:
        if len(self.input_names()) < 3:
            raise ValueError("model_stock takes a base and at least two models")
        if any(settings.weight != 1.0 for settings in self.models.values()):
            raise ValueError("model_stock takes no weights: the angle between the models sets the share")
        return self

    def kernel(
        self, labels: Sequence[str], models: Mapping[str, Values], step: Values, ref: TensorRef
    ) -> Combination:
        return Combination(self.op, labels, stock_coefficients, based=True, offset=True)
