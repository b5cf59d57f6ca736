"""How far parents are apart: the normalised Frobenius distances that merges report and gate on.

    rms       ‖A − B‖_F / √(number of elements)
    relative  ‖A − B‖_F / ‖A‖_F                      (A is the base)

Tensors that a merge decodes anyway are measured whole. Those that it copies are measured on a stated
sample of rows, read with NumPy alone, and not at all where they would be read over the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import TYPE_CHECKING, Any

from surgery.codecs.peek import peek
from surgery.stream.checkpoint import StoredRef, Sums, TensorRef

if TYPE_CHECKING:
    import torch

SAMPLED_TENSORS = 4
"""Tensors of a layer and role that a sample looks into."""
SAMPLED_ROWS, SAMPLED_COLUMNS = 128, 1024


def squares(base: torch.Tensor, others: Sequence[torch.Tensor]) -> Sums:
    """‖base‖² and ‖base − other‖² of every other, of one float32 tile, summed in float64."""
    from surgery.codecs.ops import block_squares

    shape = (1, base.numel()) if base.dim() < 2 else (base.shape[0], base.numel() // max(base.shape[0], 1))
    return totals(block_squares(base.reshape(shape), [other.reshape(shape) for other in others]))


def tau_sums(tiles: Sequence[torch.Tensor]) -> Sums:
    """‖base‖², ‖δ_1‖², …, then δ_2·δ_1, δ_3·δ_1, δ_3·δ_2, … of one float32 tile, summed in float64."""
    from surgery.codecs.merges import task_sums
    from surgery.codecs.ops import Operand

    rows = [tile.reshape(1, -1) if tile.dim() < 2 else tile.reshape(tile.shape[0], -1) for tile in tiles]
    return totals(task_sums([Operand(each.contiguous()) for each in rows]))


def cosines(sums: Sums, labels: Sequence[str]) -> dict[str, Any]:
    """`{"cosine": {later: {earlier: cos}}}` of task vectors from summed `tau_sums`, for a manifest; empty for
    fewer than two models. None stands for the cosine of nothing."""
    if len(labels) < 2 or len(sums) <= len(labels) + 1:
        return {}
    squared, products = sums[1 : len(labels) + 1], iter(sums[len(labels) + 1 :])
    found: dict[str, dict[str, float | None]] = {}
    for later in range(1, len(labels)):
        for earlier in range(later):
            size = sqrt(squared[later]) * sqrt(squared[earlier])
            value = next(products) / size if size else inf
            found.setdefault(labels[later], {})[labels[earlier]] = value if isfinite(value) else None
    return {"cosine": found}


def totals(sums: torch.Tensor) -> Sums:
    """Sums by block [blocks, parents], added up in the order of the blocks."""
    return tuple(float(each) for each in sums.numpy().sum(axis=0))


def as_json(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Distances for a manifest; None stands for what is not finite, which JSON has no word for."""
    return {
        label: {key: value if isfinite(value) else None for key, value in each.items()}
        for label, each in found.items()
    }


def distances(sums: Sums, numel: int, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """By parent label, from summed `squares`."""
    norm, *differences = sums
    return {
        label: {
            "rms": sqrt(difference / numel) if numel else 0.0,
            "relative": sqrt(difference / norm) if norm else (inf if difference else 0.0),
        }
        for label, difference in zip(labels, differences, strict=True)
    }


@dataclass(frozen=True)
class SampledDistance:
    """Distance of one parent from the base over the tensors of one layer and role."""

    parent: str
    layer: int | None
    role: str
    mtp: bool
    pairs: tuple[tuple[StoredRef, StoredRef], ...]

    def measure(self) -> dict[str, Any]:
        """One row; `weights` of `of_weights` were read."""
        difference = norm = 0.0
        count = 0
        for base, other in self.pairs[:: max(1, len(self.pairs) // SAMPLED_TENSORS)][:SAMPLED_TENSORS]:
            start = base.rows // 2 // SAMPLED_ROWS * SAMPLED_ROWS
            stop = min(start + SAMPLED_ROWS, base.rows)
            left, right = _look(base, start, stop), _look(other, start, stop)
            if left is None or right is None:
                continue
            gap = left.astype("float64") - right
            difference += float((gap * gap).sum())
            norm += float((left.astype("float64") ** 2).sum())
            count += left.size
        found = as_json(distances((norm, difference), count, (self.parent,)))[self.parent]
        return {
            "kind": "parent distance",
            "parent": self.parent,
            "layer": self.layer,
            "role": self.role,
            "mtp": self.mtp,
            "tensors": len(self.pairs),
            "weights": count,
            "of_weights": sum(base.numel for base, _ in self.pairs),
            **(found if count else {"rms": None, "relative": None}),
        }


def _look(ref: StoredRef, start: int, stop: int) -> Any:
    if any(part.stored.file is not None and not part.stored.file.local for part in ref.parts):
        return None  # a sample is not worth thousands of requests for bytes that the merge has no use for
    if ref.is_view:
        start, stop = 0, ref.rows
    raw = {part.key: ref.raw(part, start, stop) for part in ref.parts}
    return peek(ref.codec, stop - start, raw, SAMPLED_COLUMNS)


def sample_distances(
    pairs: Iterable[tuple[TensorRef, TensorRef]], parent: str
) -> tuple[SampledDistance, ...]:
    """Probes over (base, other) pairs of stored tensors of equal shape, by layer and role."""
    groups: dict[tuple[int | None, str, bool], list[tuple[StoredRef, StoredRef]]] = {}
    for base, other in pairs:
        if not (isinstance(base, StoredRef) and isinstance(other, StoredRef)):
            continue
        if base.codec.decodable and other.codec.decodable:
            key = (base.info.layer, base.info.role, base.info.mtp)
            groups.setdefault(key, []).append((base, other))
    return tuple(SampledDistance(parent, *key, tuple(found)) for key, found in groups.items())
