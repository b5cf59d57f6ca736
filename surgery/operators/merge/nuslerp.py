"""Spherical interpolation of two models or of their task vectors, by weights: t = w_2 / (w_1 + w_2).

    base + slerp(A − base, B − base, t)         with a base
    slerp(A, B, t)                              without

`rows: true` takes the angle row by row rather than over the whole tensor; a one-dimensional tensor is one
row. Colinear vectors (|cos θ| > 0.9995) are interpolated in a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from surgery.operators.merge.combination import Combination
from surgery.operators.merge.method import Method, MethodKernel, Settings, Values
from surgery.operators.merge.slerp import COLINEAR, slerp_coefficients
from surgery.stream.checkpoint import TensorRef

if TYPE_CHECKING:
    import torch


class RowSlerp(MethodKernel):
    """Every row by its own angle."""

    @property
    def temporaries(self) -> float:
        return 8

    def __init__(self, op: str, labels: Sequence[str], t: float, *, based: bool) -> None:
        super().__init__(op, labels, based=based)
        self._t = t

    def merge(self, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        a, b = (tile - tiles[0] for tile in tiles[1:]) if self.based else tiles
        size = (a.square().sum(-1, dtype=torch.float64) * b.square().sum(-1, dtype=torch.float64)).sqrt()
        dot = (a * b).sum(-1, dtype=torch.float64)
        cosine = torch.where(size > 0, dot / size, torch.ones_like(size)).clamp(-1, 1)
        line = cosine.abs() > COLINEAR
        angle = torch.where(line, torch.ones_like(cosine), cosine.acos())
        left = torch.where(line, 1 - self._t, ((1 - self._t) * angle).sin() / angle.sin())
        right = torch.where(line, self._t, (self._t * angle).sin() / angle.sin())
        mixed = a * left.float().unsqueeze(-1) + b * right.float().unsqueeze(-1)
        return tiles[0] + mixed if self.based else mixed


class NuSlerp(Method):
    """Params of `merge.nuslerp`: two models with weights, perhaps a base, `rows`."""

    op: ClassVar[str] = "merge.nuslerp"

    base: str | None = None
    models: Mapping[str, Settings]
    rows: bool = Field(default=False, strict=True)

    @model_validator(mode="after")
    def _two(self) -> NuSlerp:
        if len(set(self.models) - {self.base}) != 2:
            raise ValueError("nuslerp takes two models beside the base")
        return self

    def donor(self, models: Mapping[str, Values], step: Values) -> str | None:
        first, second = models
        return {0.0: first, 1.0: second}.get(_share(models))

    def kernel(
        self, labels: Sequence[str], models: Mapping[str, Values], step: Values, ref: TensorRef
    ) -> MethodKernel:
        t, based = _share(models), self.base is not None
        if self.rows and len(ref.shape) > 1:
            return RowSlerp(self.op, labels, t, based=based)
        return Combination(
            self.op, labels, lambda dots: slerp_coefficients(dots, t), based=based, offset=based
        )


def _share(models: Mapping[str, Values]) -> float:
    first, second = (values["weight"] for values in models.values())
    return 0.5 if abs(first + second) < 1e-8 else second / (first + second)
