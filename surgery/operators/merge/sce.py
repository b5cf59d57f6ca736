"""SCE (FuseChat 3.0, arXiv 2408.07990): select, calculate, erase.

    select      the ⌊topk · n⌋ positions whose variance over the task vectors is largest stay in all of them
    calculate   w_i ∝ mean δ_i² over the tensor
    erase       entries whose sign is not that of Σ δ_i (0 counts as +) are dropped
    result      base + Σ w_i δ_i / Σ w_i over the entries that are left

The variance is the population's, in float32. Positions that equal the smallest kept variance all stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator

from surgery.errors import RecipeError
from surgery.operators.merge.method import Method, MethodKernel, Settings, Values, Whole
from surgery.operators.merge.passes import product_sum
from surgery.operators.merge.schedules import Setting
from surgery.operators.merge.selection import ROUNDS, Selector
from surgery.operators.merge.task_vectors import share
from surgery.stream.checkpoint import TensorRef

if TYPE_CHECKING:
    import torch


class SelectCalculateErase(MethodKernel):
    @property
    def temporaries(self) -> float:
        """Differences thrice, as they stand, for their variance and weighted; products may be float64."""
        return 3 * len(self.labels) + 6

    def __init__(self, op: str, labels: Sequence[str], topk: float) -> None:
        super().__init__(op, labels, based=True)
        self._topk = topk
        self._smallest = 0.0
        self._weights: list[float] = []

    def measure(self, whole: Whole) -> None:
        count = int(self._topk * whole.numel)
        self._smallest = float("inf")
        if count and self._topk < 1.0:
            selector = Selector((whole.numel - count,))
            for round_ in range(ROUNDS):
                if round_:
                    selector.next_round()
                whole.map(lambda tile: selector.feed(_variance(_deltas(tile.values()))))
            (self._smallest,) = selector.values()
        elif count:
            self._smallest = 0.0
        squares = whole.sum(lambda tile: [product_sum(d, d) for d in self._selected(tile.values())])
        squares = squares or [0.0] * (len(self.labels) - 1)
        total = sum(squares)
        self._weights = [each / total if total else 0.0 for each in squares]

    def _selected(self, tiles: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        deltas = _deltas(tiles)
        if self._smallest == 0.0:
            return deltas
        stays = _variance(deltas) >= self._smallest
        return [delta.mul_(stays) for delta in deltas]

    def merge(self, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        deltas = self._selected(tiles)
        positive = sum(deltas[1:], deltas[0]) >= 0
        total, divisor = torch.zeros_like(tiles[0]), torch.zeros_like(tiles[0])
        for delta, weight in zip(deltas, self._weights, strict=True):
            agrees = torch.where(positive, delta > 0, delta < 0)
            total.add_(delta.mul_(agrees), alpha=weight)
            divisor.add_(agrees, alpha=weight)
        divisor[divisor == 0] = 1.0
        return total.div_(divisor).add_(tiles[0])


def _deltas(tiles: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tile - tiles[0] for tile in tiles[1:]]


def _variance(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    mean = sum(deltas[1:], deltas[0]) / len(deltas)
    total = (deltas[0] - mean).square_()
    for delta in deltas[1:]:
        total.add_((delta - mean).square_())
    return total.div_(len(deltas))


class Sce(Method):
    """Params of `merge.sce`; the weights follow from the models."""

    op: ClassVar[str] = "merge.sce"
    step_settings: ClassVar[tuple[str, ...]] = ("topk",)

    base: str
    models: Mapping[str, Settings]
    topk: Setting = 1.0

    @model_validator(mode="after")
    def _no_weights(self) -> Sce:
        if not set(self.models) - {self.base}:
            raise ValueError("no model is named beside the base")
        if any(settings.weight != 1.0 for settings in self.models.values()):
            raise ValueError("sce takes no weights: they follow from the task vectors")
        return self

    def kernel(
        self, labels: Sequence[str], models: Mapping[str, Values], step: Values, ref: TensorRef
    ) -> MethodKernel:
        try:
            return SelectCalculateErase(self.op, labels, share(step, "topk"))
        except ValueError as error:
            raise RecipeError(str(error), path=("topk",)) from error
