"""TIES (arXiv 2306.01708): trim, elect sign, disjoint merge.

Of each task vector the ⌊density · n⌋ entries of largest magnitude stay; an entry takes part where its sign is
that of Σ w_i δ_i (0 counts as +); the sum is divided by the weights that took part (`normalize: weights`).

Deviations: entries that equal the smallest kept one all stay, so that no order of storage decides; weights
enter the election, where the paper has equal ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from surgery.operators.merge.method import Settings, Values
from surgery.operators.merge.schedules import Setting
from surgery.operators.merge.task_vectors import Between, Normalize, TaskVectors, Thinning, share


class DenseSettings(Settings):
    """Settings of one model: `density` is the share of its task vector that stays."""

    density: Setting = 1.0


class Ties(TaskVectors):
    """Params of `merge.ties`."""

    op: ClassVar[str] = "merge.ties"
    consensus: ClassVar[bool] = True

    models: Mapping[str, DenseSettings]
    normalize: Normalize = "weights"

    def thinning(self, values: Values) -> Thinning | None:
        density = share(values, "density")
        return None if density == 1.0 else Between(density)
