"""Spherical interpolation between two models (Shoemake 1985):

    [sin((1−t)θ) · A + sin(tθ) · B] / sin θ

θ is the angle between the whole tensors; A is the base. As in common use the sum is of the tensors
themselves, not of unit vectors. Where |cos θ| > 0.9995 (or a tensor is 0) it is the line (1−t)·A + t·B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import acos, sin, sqrt
from typing import ClassVar

from pydantic import model_validator

from surgery.operators.merge.combination import Combination, Gram
from surgery.operators.merge.method import Method, Settings, Values
from surgery.operators.merge.schedules import Setting
from surgery.stream.checkpoint import TensorRef

COLINEAR = 0.9995


def slerp_coefficients(dots: Gram, t: float) -> list[float]:
    """Of A and B, from [[A·A, A·B], [B·A, B·B]]."""
    size = sqrt(dots[0][0] * dots[1][1])
    cosine = dots[0][1] / size if size else 1.0
    if abs(cosine) > COLINEAR:
        return [1.0 - t, t]
    angle = acos(cosine)
    return [sin((1.0 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)]


class Slerp(Method):
    """Params of `merge.slerp`: one model beside the base, and `t` from 0 (the base) to 1 (the model)."""

    op: ClassVar[str] = "merge.slerp"
    step_settings: ClassVar[tuple[str, ...]] = ("t",)

    base: str
    models: Mapping[str, Settings]
    t: Setting

    @model_validator(mode="after")
    def _two(self) -> Slerp:
        if len(self.input_names()) != 2:
            raise ValueError("slerp takes two models: the base and one other")
        return self

    def donor(self, models: Mapping[str, Values], step: Values) -> str | None:
        return {0.0: self.base, 1.0: next(iter(models))}.get(step["t"])

    def kernel(
        self, labels: Sequence[str], models: Mapping[str, Values], step: Values, ref: TensorRef
    ) -> Combination:
        return Combination(self.op, labels, lambda dots: slerp_coefficients(dots, step["t"]), based=True)
