"""Computed rows from stored bytes to stored bytes in one pass, where a kernel can do that.

It is the same arithmetic as `pull` followed by `encode`, to the last bit, without float32 tiles in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from surgery.stream.checkpoint import ComputedRef, ReadContext, StoredRef, Sums, TensorRef
from surgery.stream.rounding import RoundedRef

if TYPE_CHECKING:
    import numpy as np

    Parts = dict[str, np.ndarray[Any, Any]]


@runtime_checkable
class FusedKernel(Protocol):
    """A kernel that also has a fused form."""

    def fuse(
        self, inputs: Sequence[StoredRef], target: ComputedRef, start: int, stop: int, context: ReadContext
    ) -> tuple[Parts, Sums] | None:
        """The bytes of each part of rows start..stop and their sums; None where it cannot."""


def encoded(ref: TensorRef, start: int, stop: int, context: ReadContext) -> Parts:
    """Stored bytes of rows start..stop, fused where the kernel and the inputs allow. What follows from the
    shape alone comes with the first rows."""
    constants = {} if start else ref.codec.constants(ref.shape)
    return constants | _encoded(ref, start, stop, context)


def _encoded(ref: TensorRef, start: int, stop: int, context: ReadContext) -> Parts:
    if isinstance(ref, ComputedRef) and isinstance(ref.kernel, FusedKernel):
        stored = [each for each in ref.inputs if isinstance(each, StoredRef)]
        if len(stored) == len(ref.inputs) and ref.decision(context).copy is None:
            fused = ref.kernel.fuse(stored, ref, start, stop, context)
            if fused is not None:
                if context.record:
                    context.record(ref, start, fused[1])
                return fused[0]
    if isinstance(ref, RoundedRef):
        return ref.stored(start, stop, context)
    return ref.codec.encode(ref.pull(start, stop, context))
