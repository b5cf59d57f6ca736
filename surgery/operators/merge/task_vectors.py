"""What the task-vector methods share: δ_i = W_i − W_base, thinned out, brought together, added to the base.

    result = base + λ · Σ w_i δ'_i     perhaps with sign consensus and a division by the weights (passes.py)

A `Thinning` says which entries of one δ stay. `normalize: norms` first scales every δ_i of a tensor to the
mean norm of all of them (the data-free half of DisTaC, arXiv 2508.01148; per tensor, where the paper scales
whole models), so that no model speaks louder for having moved further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from surgery.errors import RecipeError
from surgery.operators.merge.distances import totals
from surgery.operators.merge.method import Method, MethodKernel, Settings, Tile, Values, Whole
from surgery.operators.merge.noise import NoiseRef
from surgery.operators.merge.passes import keep_between, weighted_deltas
from surgery.operators.merge.schedules import Setting
from surgery.operators.merge.selection import Selector, select_sizes
from surgery.stream.checkpoint import Sums, TensorRef

if TYPE_CHECKING:
    import torch

    from surgery.codecs.merges import Thin
    from surgery.codecs.ops import Operand

Normalize = Literal["none", "weights", "norms"]
Rescale = Literal["none", "keep", "l1"]
SMALLEST_DRAW = 2.0**-24
"""What random numbers are multiples of: nothing stays with a smaller probability but by accident."""


class Thinning:
    """What stays of one task vector, all of it here. `ranks` are those of |δ| (ascending, from 0) that it
    asks for."""

    random: bool = False
    temporaries: ClassVar[float] = 1
    """float32 tiles that `thin` holds beside its input and its result."""

    def ranks(self, numel: int) -> tuple[int, ...]:
        return ()

    def thin(
        self, delta: torch.Tensor, at_ranks: Sequence[float], noise: torch.Tensor | None
    ) -> torch.Tensor:
        return delta

    def native(self, at_ranks: Sequence[float], states: torch.Tensor | None) -> Thin | None:
        """`thin` as the native kernels know it; None where they don't."""
        return None


class Between(Thinning):
    """Keeps the magnitudes from rank `first` to rank `last`, and whatever equals one of the two."""

    def __init__(self, density: float, drop_top: float = 0.0) -> None:
        self._density, self._drop_top = density, drop_top

    def ranks(self, numel: int) -> tuple[int, ...]:
        last = numel - 1 - int(self._drop_top * numel)
        first = last + 1 - int(self._density * numel)
        return (max(first, 0), last) if first <= last and numel else ()

    def thin(
        self, delta: torch.Tensor, at_ranks: Sequence[float], noise: torch.Tensor | None
    ) -> torch.Tensor:
        return keep_between(delta, *at_ranks) if at_ranks else delta * 0.0

    def native(self, at_ranks: Sequence[float], states: torch.Tensor | None) -> Thin | None:
        from surgery.codecs.merges import Kept, Thin

        if not at_ranks:
            return Thin(Kept.NOTHING)
        return Thin(Kept.BETWEEN, low=at_ranks[0], high=at_ranks[1])


class Everything(Thinning):
    """Keeps everything, natively too."""

    def native(self, at_ranks: Sequence[float], states: torch.Tensor | None) -> Thin | None:
        from surgery.codecs.merges import Thin

        return Thin()


class TaskVectorKernel(MethodKernel):
    """Inputs: the base, the models, then noise for each model if the thinning is random."""

    def __init__(
        self, op: str, labels: Sequence[str], thinnings: Sequence[Thinning], weights: Sequence[float], *,
        scale: float, consensus: bool, normalize: Normalize, l1: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(op, labels, based=True)
        self._thinnings = thinnings
        self._weights = list(weights)
        self._scale = scale
        self._consensus = consensus
        self._normalize = normalize
        self._l1 = l1
        self._factors = [1.0] * len(weights)
        self._at_ranks: list[tuple[float, ...]] = [()] * len(weights)

    @property
    def temporaries(self) -> float:
        """Differences, what stays of them and terms of all models, and the election's; or thinning's."""
        models, thinning = len(self._weights), max(each.temporaries for each in self._thinnings)
        return max(3 * models + 5, 2 * models + thinning)

    def measure(self, whole: Whole) -> None:
        self._select(whole)
        models = len(self._weights)
        if self._normalize == "norms":
            from surgery.codecs.merges import task_sums

            sums = whole.sum(lambda tile: totals(tile.computed(1 + models, task_sums)))
            norms = [sqrt(each) for each in sums[1 : 1 + models]] or [0.0] * models
            mean = sum(norms) / len(norms)
            self._factors = [mean / norm if norm else 1.0 for norm in norms]
        if self._l1:
            sizes = whole.sum(self._sizes) or [0.0] * (2 * models)
            gains = [b / a if a else 1.0 for b, a in zip(sizes[:models], sizes[models:], strict=True)]
            self._factors = [factor * gain for factor, gain in zip(self._factors, gains, strict=True)]

    def _select(self, whole: Whole) -> None:
        selectors = {
            i: Selector(ranks) for i, t in enumerate(self._thinnings) if (ranks := t.ranks(whole.numel))
        }
        if not selectors:
            return
        select_sizes(whole, selectors, len(self.labels))
        for i, selector in selectors.items():
            self._at_ranks[i] = selector.values()

    def _sizes(self, tile: Tile) -> Sums:
        """L1 norms of the task vectors, then of what stays of them."""
        from surgery.codecs.merge_reference import sizes
        from surgery.codecs.merges import task_sizes

        thins = self._native_thins(tile)
        if thins is not None:
            return totals(tile.computed(len(self.labels), lambda at: task_sizes(at, thins)))
        values = tile.values()
        deltas = self._deltas(values)
        thinned = [self._thinned(i, delta, values) for i, delta in enumerate(deltas)]
        return totals(sizes([each if each.dim() > 1 else each.view(1, -1) for each in (*deltas, *thinned)]))

    def merge_stored(
        self, tile: Tile, dtype: torch.dtype, *, ue8m0: bool
    ) -> tuple[Operand, torch.Tensor | None] | None:
        from surgery.codecs.merges import Sum, merge_tasks

        thins = self._native_thins(tile)
        if thins is None:
            return None
        thins = [replace(thin, factor=factor) for thin, factor in zip(thins, self._factors, strict=True)]
        how = Sum(self._weights, self._consensus, self._normalize == "weights", self._scale)
        return tile.computed(len(self.labels), lambda at: merge_tasks(at, thins, how, dtype, ue8m0=ue8m0))

    def _native_thins(self, tile: Tile) -> list[Thin] | None:
        """What the kernels need to thin a tile; None where they, or one thinning, cannot."""
        from surgery.codecs.native import cpu

        noises = tile.inputs[len(self.labels) :]
        # Noise is drawn by 128 entries of a one-dimensional tensor, which kernels take as one row.
        if cpu().library is None or (noises and len(tile.inputs[0].shape) < 2):
            return None
        found = []
        for i, thinning in enumerate(self._thinnings):
            noise = noises[i] if noises else None
            states = noise.states(tile.start, tile.stop) if isinstance(noise, NoiseRef) else None
            thin = thinning.native(self._at_ranks[i], states)
            if thin is None:
                return None
            found.append(thin)
        return found

    def _deltas(self, tiles: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tile - tiles[0] for tile in tiles[1 : len(self.labels)]]

    def _thinned(self, i: int, delta: torch.Tensor, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        noise = tiles[len(self.labels) + i] if len(tiles) > len(self.labels) else None
        return self._thinnings[i].thin(delta, self._at_ranks[i], noise)

    def merge(self, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        deltas = []
        for i, delta in enumerate(self._deltas(tiles)):
            kept = self._thinned(i, delta, tiles)
            deltas.append(kept if self._factors[i] == 1.0 else kept * self._factors[i])
        mixed = weighted_deltas(
            deltas, self._weights, consensus=self._consensus, normalize=self._normalize == "weights"
        )
        return mixed.mul_(self._scale).add_(tiles[0])


class TaskVectors(Method):
    """Base of the task-vector methods. `scale` is λ, applied to the merged task vector."""

    step_settings: ClassVar[tuple[str, ...]] = ("scale",)
    consensus: ClassVar[bool] = False

    base: str
    models: Mapping[str, Settings]
    normalize: Normalize = "none"
    scale: Setting = 1.0

    @model_validator(mode="after")
    def _some_task(self) -> TaskVectors:
        if not set(self.models) - {self.base}:
            raise ValueError("no model is named beside the base")
        return self

    def thinning(self, values: Values) -> Thinning | None:
        """How one model's task vector is thinned; None where all of it stays."""
        return None

    @property
    def elects(self) -> bool:
        return self.consensus

    @property
    def l1(self) -> bool:
        return False

    def donor(self, models: Mapping[str, Values], step: Values) -> str | None:
        """The base where nothing is added; the model where its whole task vector is."""
        if not step["scale"] or not any(values["weight"] for values in models.values()):
            return self.base
        if len(models) > 1 or self.normalize == "norms":
            return None
        ((name, values),) = models.items()
        gain = step["scale"] * (1.0 if self.normalize == "weights" else values["weight"])
        return name if gain == 1.0 and self._thinning(name, values) is None else None

    def kernel(
        self, labels: Sequence[str], models: Mapping[str, Values], step: Values, ref: TensorRef
    ) -> MethodKernel:
        return TaskVectorKernel(
            self.op,
            labels,
            [self._thinning(name, values) or Everything() for name, values in models.items()],
            [values["weight"] for values in models.values()],
            scale=step["scale"], consensus=self.elects, normalize=self.normalize, l1=self.l1,
        )  # fmt: skip

    def _thinning(self, model: str, values: Values) -> Thinning | None:
        try:
            return self.thinning(values)
        except ValueError as error:
            raise RecipeError(str(error), path=("models", model)) from error


class RandomTaskVectors(TaskVectors):
    """Base of the random ones: a seed, and the rule that makes up for what is dropped."""

    seed: int = Field(default=0, strict=True)
    rescale: Rescale = "keep"

    @property
    def l1(self) -> bool:
        return self.rescale == "l1"

    def extra_inputs(self, ref: TensorRef, models: Sequence[str]) -> tuple[TensorRef, ...]:
        return tuple(NoiseRef(ref, self.seed, model) for model in models)


def share(values: Values, name: str, *, least: float = 0.0) -> float:
    """A setting that is a share; ValueError where it is not from `least` to 1."""
    found = values[name]
    if not least <= found <= 1.0:
        raise ValueError(f"{name} is {found:g}; it must be at least {least:.3g} and at most 1")
    return found
