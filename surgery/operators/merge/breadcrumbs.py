"""Model breadcrumbs (arXiv 2312.06795): of each task vector the largest and the smallest entries are dropped.

⌊γ n⌋ entries of largest magnitude go, of the rest the ⌊density · n⌋ largest stay (fewer where there are no
more). `elect_signs: true` adds the sign election of TIES. Entries that equal a border all stay. γ = 0 drops
no outlier in tensors of any size, and density 1 still drops outliers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from surgery.operators.merge.method import MethodKernel, Values
from surgery.operators.merge.schedules import Setting
from surgery.operators.merge.task_vectors import Between, TaskVectorKernel, TaskVectors, Thinning, share
from surgery.operators.merge.ties import DenseSettings
from surgery.stream.checkpoint import TensorRef


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

    def kernel(
        self, labels: Sequence[str], models: Mapping[str, Values], step: Values, ref: TensorRef
    ) -> MethodKernel:
        return TaskVectorKernel(
            self.op,
            labels,
            [self._thinning(name, values) or Thinning() for name, values in models.items()],
            [values["weight"] for values in models.values()],
            scale=step["scale"], consensus=self.elect_signs, normalize=self.normalize,
        )  # fmt: skip
