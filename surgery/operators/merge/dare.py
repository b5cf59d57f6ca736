"""DARE (arXiv 2311.03099): drop entries of each task vector at random and make up for it.

Every entry stays with probability `density`. `rescale: keep` divides by it as the paper does; `l1` scales to
the L1 norm that the whole task vector had; `none` leaves the rest as it is. `dare_linear` adds the task
vectors up, `dare_ties` elects signs first. The noise of a tensor follows from `seed`, its name and the
model's (`noise.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from surgery.operators.merge.method import Values
from surgery.operators.merge.task_vectors import SMALLEST_DRAW, RandomTaskVectors, Thinning, share
from surgery.operators.merge.ties import DenseSettings

if TYPE_CHECKING:
    import torch

    from surgery.codecs.merges import Thin


class Drop(Thinning):
    """Keeps an entry with probability `density`; divides by it if `keep`."""

    random = True

    def __init__(self, density: float, *, keep: bool) -> None:
        self._density, self._keep = density, keep

    def thin(
        self, delta: torch.Tensor, at_ranks: Sequence[float], noise: torch.Tensor | None
    ) -> torch.Tensor:
        if noise is None:
            raise TypeError("no noise came with the tile")
        kept = delta * (noise < self._density)
        return kept.div_(self._density) if self._keep else kept

    def native(self, at_ranks: Sequence[float], states: torch.Tensor | None) -> Thin | None:
        from surgery.codecs.merges import Kept, Thin

        return Thin(Kept.DRAWN, density=self._density, divide=self._keep, states=states)


class DareLinear(RandomTaskVectors):
    """Params of `merge.dare_linear`."""

    op: ClassVar[str] = "merge.dare_linear"

    models: Mapping[str, DenseSettings]

    def thinning(self, values: Values) -> Thinning | None:
        density = share(values, "density", least=SMALLEST_DRAW)
        return None if density == 1.0 else Drop(density, keep=self.rescale == "keep")


class DareTies(DareLinear):
    """Params of `merge.dare_ties`."""

    op: ClassVar[str] = "merge.dare_ties"
    consensus: ClassVar[bool] = True
