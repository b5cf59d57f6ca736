"""Model breadcrumbs (arXiv 2312.06795): of each task vector the largest and the smallest entries are dropped.

⌊γ n⌋ entries of largest magnitude go, of the rest the ⌊density · n⌋ largest stay (fewer where there are no
more). `elect_signs: true` adds the sign election of TIES. Entries that equal a border all stay. γ = 0 drops
no outlier in tensors of any size, and density 1 still drops outliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from surgery.operators.merge.method import Values
from surgery.operators.merge.schedules import Setting
from surgery.operators.merge.task_vectors import Between, TaskVectors, Thinning, share
from surgery.operators.merge.ties import DenseSettings


class CrumbSettings(DenseSettings):
    """Settings of one model: `gamma` is the share of largest entries that is dropped."""

    gamma: Setting = 0.01


class Breadcrumbs(TaskVectors):
    """Params of `merge.breadcrumbs`."""

    op: ClassVar[str] = "merge.breadcrumbs"

    models: Mapping[str, CrumbSettings]
    elect_signs: bool = Field(default=False, strict=True)

    def thinning(self, values: Values) -> Thinning | None:
        density, gamma = share(values, "density"), share(values, "gamma")
        return None if density == 1.0 and not gamma else Between(density, gamma)

    @property
    def elects(self) -> bool:
        return self.elect_signs
