"""Matrices that are stored in few bits by rounding each weight, without looking at anything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.codecs.carry import carries, carry
from surgery.codecs.codec import Codec
from surgery.stream.checkpoint import ComputedRef, Decision, Part, ReadContext, Sums, TensorRef

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Rounding:
    """The kernel of a tensor that is stored in fewer bits by rounding, for its own sake: what is computed
    with, behind it, are the rounded values."""

    op: str
    codec: Codec

    def decide(self, inputs: Sequence[TensorRef], context: ReadContext) -> Decision:
        return Decision()

    def combine(self, tiles: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sums]:
        tile = tiles[0]
        return self.codec.decode(tuple(tile.shape), 0, tile.shape[0], self._raw(tile)), ()

    def metrics(self, sums: Sums, numel: int) -> dict[str, Any]:
        return {}

    def lineage(self) -> dict[str, Any]:
        return {"op": self.op}

    def stored(self, tile: torch.Tensor, target: Codec) -> dict[str, np.ndarray[Any, Any]]:
        """Unrounded rows in the form of `target`, which may be another than the one that they are rounded
        in: codes are carried over, so that nothing is rounded twice."""
        shape, rows = tuple(tile.shape), tile.shape[0]
        raw = self._raw(tile)
        if target == self.codec:
            return raw
        if carries(self.codec, target, shape):
            return carry(self.codec, target, shape, 0, rows, raw)
        return target.encode(self.codec.decode(shape, 0, rows, raw))

    def _raw(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        return {**self.codec.encode(tile), **self.codec.constants(tuple(tile.shape))}


class RoundedRef(ComputedRef):
    """A matrix rounded in the form of its kernel."""

    __slots__ = ()

    def __init__(self, ref: TensorRef, kernel: Rounding) -> None:
        super().__init__(ref, (ref,), kernel)

    def with_form(self, codec: Codec, parts: tuple[Part, ...]) -> ComputedRef:
        other = RoundedRef(self.inputs[0], self._rounding)
        other.codec, other.parts = codec, parts
        return other

    @property
    def granule(self) -> int:
        return max(super().granule, self._rounding.codec.granule)

    @property
    def _rounding(self) -> Rounding:
        if not isinstance(self.kernel, Rounding):
            raise TypeError(f"{self.kernel!r} does not round")
        return self.kernel

    def stored(self, start: int, stop: int, context: ReadContext) -> dict[str, np.ndarray[Any, Any]]:
        """The stored bytes of rows start..stop."""
        return self._rounding.stored(self.inputs[0].pull(start, stop, context), self.codec)
