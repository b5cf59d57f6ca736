"""Tensors under other names and in other places: renumbered experts, and matrices that keep some rows.

Bytes that only move are copied as stored: a renumbered expert of a fused tensor is read from its old slab
and written to its new one, whatever its form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError
from surgery.stream.checkpoint import (
    ComputedRef,
    Decision,
    Kernel,
    Part,
    ReadContext,
    StoredRef,
    Sums,
    TensorRef,
)
from surgery.stream.files import StoredTensor
from surgery.stream.header import tensor_nbytes
from surgery.stream.roles import TensorInfo

if TYPE_CHECKING:
    import torch


class MovedRef(StoredRef):
    """A tensor that is written to other places than it lies in; `places` are its parts as they lie."""

    __slots__ = ("places",)

    def __init__(
        self, name: str, ref: StoredRef, info: TensorInfo, parts: tuple[Part, ...], places: tuple[Part, ...]
    ) -> None:
        super().__init__(name, ref.shape, info, ref.codec, parts, ref.origin)
        self.places = places

    def place(self, part: Part) -> Part:
        return next((each for each in self.places if each.key == part.key), part)


def renamed(ref: TensorRef, name: str, info: TensorInfo, parts: tuple[Part, ...]) -> TensorRef:
    """The same values under another name, written to `parts` (same keys, in the same order)."""
    if isinstance(ref, StoredRef):
        return MovedRef(name, ref, info, parts, tuple(ref.place(part) for part in ref.parts))
    if isinstance(ref, ComputedRef):
        other = ref.with_form(ref.codec, parts)
        other.name, other.info = name, info
        return other
    raise TypeError(f"{ref!r} cannot be renamed")


def rename_parts(ref: TensorRef, rename: Callable[[str], str]) -> tuple[Part, ...]:
    """The parts of a tensor under other stored names."""
    return tuple(
        part._replace(stored=replace(part.stored, name=rename(part.stored.name))) for part in ref.parts
    )


def slab_parts(ref: TensorRef, index: int, count: int) -> tuple[Part, ...]:
    """The parts of an expert as number `index` of a fused tensor that holds `count` experts."""
    parts = []
    for part in ref.parts:
        if part.view is None:
            raise CheckpointError(f"{ref.name} is no part of a fused tensor")
        old = part.stored
        shape = (count, *old.shape[1:])
        stored = StoredTensor(old.name, old.dtype, shape, tensor_nbytes(old.dtype, shape))
        parts.append(Part(part.key, stored, replace(part.view, index=index)))
    return tuple(parts)


@dataclass(frozen=True)
class Rows:
    """The kernel of a tensor that keeps some rows of another."""

    rows: tuple[int, ...]

    def decide(self, inputs: Sequence[TensorRef], context: ReadContext) -> Decision:
        return Decision()

    def combine(self, tiles: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sums]:
        import torch

        return tiles[0][torch.tensor(self.rows)], ()

    def metrics(self, sums: Sums, numel: int) -> dict[str, Any]:
        return {}

    def lineage(self) -> dict[str, Any]:
        return {"op": "rows"}


class RowsRef(ComputedRef):
    """Rows of a small tensor (a router's), in the given order. It is read whole whatever rows are pulled."""

    __slots__ = ()

    def __init__(self, ref: TensorRef, rows: tuple[int, ...]) -> None:
        if ref.is_view:
            raise CheckpointError(f"{ref.name} is part of a fused tensor, whose rows cannot be selected")
        super().__init__(ref, (ref,), Rows(rows))
        self.shape, self.rows = (len(rows), *ref.shape[1:]), len(rows)
        parts = []
        for spec, part in zip(self.codec.parts(self.shape), ref.parts, strict=True):
            nbytes = tensor_nbytes(spec.dtype, spec.shape)
            parts.append(Part(spec.key, StoredTensor(part.stored.name, spec.dtype, spec.shape, nbytes), None))
        self.parts = tuple(parts)

    def with_form(self, codec: Any, parts: tuple[Part, ...]) -> ComputedRef:
        kernel = self.kernel
        if not isinstance(kernel, Rows):
            raise TypeError(f"{kernel!r} selects no rows")
        other = RowsRef(self.inputs[0], kernel.rows)
        other.codec, other.parts = codec, parts
        return other

    def pull(self, start: int, stop: int, context: ReadContext) -> torch.Tensor:
        source = self.inputs[0]
        whole, _ = self.kernel.combine([source.pull(0, source.rows, context)])
        return whole[start:stop]

    def tile_rows(self) -> int:
        return max(self.rows, 1)


class WholeRef(ComputedRef):
    """A matrix that a kernel can only make at once, from one input."""

    __slots__ = ()

    def __init__(self, ref: TensorRef, kernel: Kernel) -> None:
        super().__init__(ref, (ref,), kernel)

    def with_form(self, codec: Any, parts: tuple[Part, ...]) -> ComputedRef:
        other = WholeRef(self.inputs[0], self.kernel)
        other.codec, other.parts = codec, parts
        return other

    def tile_rows(self) -> int:
        return max(self.rows, 1)
