"""Compare two checkpoints tensor by tensor, summed up by layer and role.

Distances and cosines are exact: every weight is read, in tiles, with float64 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt
from typing import Any

from surgery.stream.checkpoint import Checkpoint, StoredRef, TensorRef
from surgery.stream.execute import one_thread_per_job


@dataclass(frozen=True)
class TensorDiff:
    """Float64 sums over one tensor: ‖A‖², ‖B‖², ‖A − B‖², A·B. `computed` is False where the stored
    form cannot be decoded and only bytes were compared."""

    ref: TensorRef
    equal_bytes: bool
    computed: bool
    sums: tuple[float, float, float, float]


@dataclass(frozen=True)
class DiffRow:
    """Tensors that belong together. `rms`, `relative`, `cosine` are None where nothing could be decoded."""

    what: str
    layer: int | None
    role: str
    mtp: bool
    tensors: int
    equal_bytes: int
    rms: float | None
    relative: float | None
    cosine: float | None

    def as_dict(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.__dataclass_fields__}


@dataclass(frozen=True)
class Diff:
    tensors: tuple[TensorDiff, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    other_shape: tuple[str, ...]

    @property
    def identical(self) -> bool:
        """Whether both hold the same tensors byte for byte."""
        missing = self.only_in_a or self.only_in_b or self.other_shape
        return not missing and all(each.equal_bytes for each in self.tensors)

    @property
    def rows(self) -> tuple[DiffRow, ...]:
        """By layer (those without one first) and role."""
        return self._rows(lambda ref: (ref.info.layer, ref.info.role, ref.info.mtp))

    def by_role(self) -> tuple[DiffRow, ...]:
        return self._rows(lambda ref: (None, ref.info.role, ref.info.mtp))

    def by_tensor(self) -> tuple[DiffRow, ...]:
        return tuple(_row(each.ref.name, each.ref.info.layer, [each]) for each in self.tensors)

    def _rows(self, key: Callable[[TensorRef], tuple[int | None, str, bool]]) -> tuple[DiffRow, ...]:
        groups: dict[tuple[int | None, str, bool], list[TensorDiff]] = {}
        for each in self.tensors:
            groups.setdefault(key(each.ref), []).append(each)
        ordered = sorted(
            groups.items(), key=lambda item: (item[0][0] is not None, item[0][0] or 0, item[0][1:])
        )
        return tuple(
            _row("all layers" if layer is None else f"layer {layer}", layer, members)
            for (layer, _, _), members in ordered
        )

    def as_dict(self, by_tensor: bool = False) -> dict[str, Any]:
        """The JSON document of `surgery diff --json`."""
        return {
            "schema": 1,
            "identical": self.identical,
            "tensors": len(self.tensors),
            "equal_bytes": sum(each.equal_bytes for each in self.tensors),
            "roles": [row.as_dict() for row in self.by_role()],
            "rows": [row.as_dict() for row in (self.by_tensor() if by_tensor else self.rows)],
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "other_shape": list(self.other_shape),
        }


def diff_checkpoints(
    a: Checkpoint, b: Checkpoint, threads: int = 2, progress: Callable[[str, int, int], None] | None = None
) -> Diff:
    """All tensors of both, by logical name."""
    import torch  # noqa: F401  (loaded before the threads start)

    common = [name for name in a.tensors if name in b.tensors]
    other_shape = tuple(name for name in common if a.tensors[name].shape != b.tensors[name].shape)
    pairs = [(a.tensors[name], b.tensors[name]) for name in common if name not in set(other_shape)]
    found: list[TensorDiff] = []
    with one_thread_per_job(), ThreadPoolExecutor(threads) as pool:
        for each in pool.map(lambda pair: diff_tensor(*pair), pairs):
            found.append(each)
            if progress:
                progress("compare", len(found), len(pairs))
    return Diff(
        tensors=tuple(found),
        only_in_a=tuple(name for name in a.tensors if name not in b.tensors),
        only_in_b=tuple(name for name in b.tensors if name not in a.tensors),
        other_shape=other_shape,
    )


def diff_tensor(a: TensorRef, b: TensorRef) -> TensorDiff:
    """Sums over two tensors of one shape."""
    import torch

    equal = same_bytes_throughout(a, b)
    if not (a.codec.decodable and b.codec.decodable):
        return TensorDiff(a, equal, False, (0.0, 0.0, 0.0, 0.0))
    sums = [0.0, 0.0, 0.0, 0.0]
    grid = a if a.tile_rows() >= b.tile_rows() else b
    for start, stop in grid.tiles():
        left = a.read(slice(start, stop)).double()
        right = b.read(slice(start, stop)).double()
        for index, product in enumerate((left * left, right * right, (left - right) ** 2, left * right)):
            sums[index] += float(torch.sum(product))
    return TensorDiff(a, equal, True, (sums[0], sums[1], sums[2], sums[3]))


def same_bytes_throughout(a: TensorRef, b: TensorRef) -> bool:
    """Whether both are stored in the same form with the same bytes."""
    if not (isinstance(a, StoredRef) and isinstance(b, StoredRef) and a.same_form(b)):
        return False
    sliced = a.tiles() if a.codec.decodable else ((0, a.rows),)
    return all(
        a.raw(mine, start, stop).tobytes() == b.raw(theirs, start, stop).tobytes()
        for start, stop in sliced
        for mine, theirs in zip(a.parts, b.parts, strict=True)
    )


def _row(what: str, layer: int | None, members: list[TensorDiff]) -> DiffRow:
    computed = [each for each in members if each.computed]
    a2, b2, d2, ab = (sum(each.sums[index] for each in computed) for index in range(4))
    count = sum(each.ref.numel for each in computed)
    info = members[0].ref.info
    return DiffRow(
        what, layer, info.role, info.mtp, len(members),
        sum(each.equal_bytes for each in members),
        sqrt(d2 / count) if count else None,
        (sqrt(d2 / a2) if a2 else (1.0 if d2 else 0.0)) if count else None,
        (ab / sqrt(a2 * b2) if a2 and b2 else None) if count else None,
    )  # fmt: skip
