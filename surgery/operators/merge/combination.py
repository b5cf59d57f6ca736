"""The kernel of methods whose result lies in the span of the models: coefficients, then a weighted sum.

Coefficients may depend on the Gram matrix of the whole tensors (norms and angles), which is all that SLERP,
the Karcher mean or Model Stock need to know of them. It is read in one pass and held in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from surgery.operators.merge.distances import totals
from surgery.operators.merge.method import MethodKernel, Tile, Whole

if TYPE_CHECKING:
    import torch

    from surgery.codecs.ops import Operand

Gram = list[list[float]]
Rule = Callable[[Gram], list[float]]
"""Coefficients of the models from their Gram matrix; of differences from the base where there is one."""


class Combination(MethodKernel):
    """Σ c_i · model_i, or (`offset`) base + Σ c_i · (model_i − base), the Gram matrix then being that of the
    differences. `rule` is a constant list or a function of the Gram matrix."""

    def __init__(
        self, op: str, labels: Sequence[str], rule: Rule | Sequence[float], *, based: bool,
        offset: bool = False, equal_copies: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(op, labels, based=based, equal_copies=equal_copies)
        self._rule = rule
        self._offset = offset
        self._coefficients: list[float] = []

    def measure(self, whole: Whole) -> None:
        if not callable(self._rule):
            self._coefficients = list(self._rule)
            return
        from surgery.codecs.merges import products

        models = len(self.labels)
        found = whole.sum(
            lambda tile: totals(tile.computed(models, lambda at: products(at, offset=self._offset)))
        )
        count = len(self.labels) - self._offset
        found = found or [0.0] * (count * (count + 1) // 2)
        square = [
            [found[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)] for j in range(count)] for i in range(count)
        ]
        self._coefficients = self._rule(square)

    def merge_stored(
        self, tile: Tile, dtype: torch.dtype, *, ue8m0: bool
    ) -> tuple[Operand, torch.Tensor | None] | None:
        if self._offset or not any(self._coefficients):
            return None
        from surgery.codecs import ops
        from surgery.codecs.merges import task_sums

        few = len(self.labels) < 3
        how: dict[str, bool] = {"squares": self.based and few, "ue8m0": ue8m0}

        def work(parents: Sequence[Operand]) -> tuple[Operand, torch.Tensor | None]:
            result, sums = ops.assemble(parents, self._coefficients, dtype, **how)
            return result, task_sums(parents) if self.based and not few else sums

        return tile.computed(len(self.labels), work)

    def merge(self, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        if not self._offset:
            if not any(self._coefficients):
                return tiles[0] * 0.0
            from surgery.codecs.reference import weighted_sum

            return weighted_sum(tiles, self._coefficients)
        base = tiles[0]
        total = base.clone()
        for tile, coefficient in zip(tiles[1:], self._coefficients, strict=True):
            if coefficient:
                total.add_((tile - base).mul_(coefficient))
        return total
