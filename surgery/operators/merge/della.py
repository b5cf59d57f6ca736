"""DELLA (arXiv 2406.11617): drop at random, the smaller the likelier.

In each row of n entries the probability to stay is linear in the rank r of the magnitude (0 the smallest),
from density − ε to density + ε:  p = density − ε + 2 ε r / (n − 1).  `rescale: keep` divides every entry by
its p (the paper's), `l1` scales to the L1 norm before. `della` elects signs, `della_linear` does not.

A one-dimensional tensor is one row (in runs of 2²⁰ entries). Equal magnitudes rank in the order they stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from surgery.operators.merge.method import Values
from surgery.operators.merge.passes import ranks_in_rows
from surgery.operators.merge.schedules import Setting
from surgery.operators.merge.task_vectors import SMALLEST_DRAW, Normalize, RandomTaskVectors, Thinning, share
from surgery.operators.merge.ties import DenseSettings

if TYPE_CHECKING:
    import torch


class RankedDrop(Thinning):
    """Keeps an entry with a probability by its rank in the row."""

    random = True
    temporaries = 7  # ranks are int64, and so are the order and the places that they are made from

    def __init__(self, density: float, epsilon: float, *, keep: bool) -> None:
        self._density, self._epsilon, self._keep = density, epsilon, keep

    def thin(
        self, delta: torch.Tensor, at_ranks: Sequence[float], noise: torch.Tensor | None
    ) -> torch.Tensor:
        if noise is None:
            raise TypeError("no noise came with the tile")
        last = max(delta.shape[-1] - 1, 1)
        chance = ranks_in_rows(delta.abs()).float().mul_(2 * self._epsilon / last)
        chance.add_(self._density - self._epsilon)
        kept = delta * (noise < chance)
        return kept.div_(chance) if self._keep else kept


class RankedSettings(DenseSettings):
    """Settings of one model: probabilities run from density − epsilon to density + epsilon."""

    epsilon: Setting = 0.15


class DellaLinear(RandomTaskVectors):
    """Params of `merge.della_linear`."""

    op: ClassVar[str] = "merge.della_linear"

    models: Mapping[str, RankedSettings]

    def thinning(self, values: Values) -> Thinning | None:
        density, epsilon = share(values, "density", least=SMALLEST_DRAW), share(values, "epsilon")
        if density == 1.0:
            return None
        if density - epsilon <= 0.0 or density + epsilon > 1.0:
            raise ValueError(
                f"density {density:g} and epsilon {epsilon:g} give probabilities outside of 0 to 1; "
                "lower epsilon"
            )
        return RankedDrop(density, epsilon, keep=self.rescale == "keep")


class Della(DellaLinear):
    """Params of `merge.della`."""

    op: ClassVar[str] = "merge.della"
    consensus: ClassVar[bool] = True

    normalize: Normalize = "weights"
