"""Computed rows from stored bytes to stored bytes in one pass, where a kernel can do that.

It is the same arithmetic as `pull` followed by `encode`, to the last bit, without float32 tiles in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.operands import fusable, operand, result_dtype, stored
from surgery.stream.checkpoint import ComputedRef, ReadContext, StoredRef, Sums, TensorRef
from surgery.stream.rounding import RoundedRef

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.codecs.ops import Operand

    Parts = dict[str, np.ndarray[Any, Any]]

Result = TypeVar("Result")


class FusedKernel(Protocol):
    """A kernel that also has a fused form."""

    def fuse(
        self, inputs: Sequence[TensorRef], target: ComputedRef, start: int, stop: int, context: ReadContext
    ) -> tuple[Parts, Sums] | None:
        """The bytes of each part of rows start..stop and their sums; None where it cannot."""


def encoded(ref: TensorRef, start: int, stop: int, context: ReadContext) -> Parts:
    """Stored bytes of rows start..stop, fused where the kernel and the inputs allow. What follows from the
    shape alone comes with the first rows."""
    constants = {} if start else ref.codec.constants(ref.shape)
    fused = _fused(ref, start, stop, context) if isinstance(ref, ComputedRef) else None
    if fused is not None:
        return constants | fused
    if isinstance(ref, RoundedRef):
        return constants | ref.stored(start, stop, context)
    return constants | ref.codec.encode(ref.pull(start, stop, context))


def _fused(ref: ComputedRef, start: int, stop: int, context: ReadContext) -> Parts | None:
    # Not isinstance: with a protocol it takes longer than a small tensor.
    if not hasattr(ref.kernel, "fuse") or ref.decision(context).copy is not None:
        return None
    made = cast("FusedKernel", ref.kernel).fuse(ref.inputs, ref, start, stop, context)
    if made is None:
        return None
    if context.record:
        context.record(ref, start, made[1])
    return made[0]


def operands(inputs: Sequence[TensorRef], start: int, stop: int, context: ReadContext) -> list[Operand]:
    """Rows start..stop as the kernels take them: stored bytes where they read that form, else float32; a
    one-dimensional tensor is one row. Valid until this thread asks again."""
    from surgery.codecs.ops import Operand

    found: dict[int, Operand] = {}
    slot = 0
    # What is computed may ask for operands itself, so it comes before the buffers are filled.
    for index, ref in enumerate(inputs):
        if not (isinstance(ref, StoredRef) and fusable(ref.codec)):
            tile = ref.pull(start, stop, context)
            found[index] = Operand(_matrix(tile).contiguous())
    for index, ref in enumerate(inputs):
        if index in found or not isinstance(ref, StoredRef):
            continue
        raw = {}
        for part in ref.parts:
            slot += 1
            # What several outputs are made from has to stay as it is until the last of them.
            raw[part.key] = ref.raw(part, start, stop, context, slot=None if context.several else slot)
        ref.check_finite(raw, context)
        made = operand(ref.codec, ref.shape, start, stop, raw)
        found[index] = made if len(ref.shape) > 1 else Operand(made.values.view(1, -1), made.scales)
    return [found[index] for index in range(len(inputs))]


def computed(
    parents: Sequence[Operand], context: ReadContext, work: Callable[[Sequence[Operand]], Result]
) -> Result:
    """`work(parents)`, on the context's GPU where it has one that takes them; valid until this thread asks
    again."""
    lanes = context.lanes
    return work(parents) if lanes is None or not lanes.takes(parents) else lanes.computed(parents, work)


def form_of(target: TensorRef) -> tuple[torch.dtype, bool]:
    """What kernels are to write for `target`: the dtype, and whether scales are powers of two."""
    import torch

    if not fusable(target.codec):
        return torch.float32, False
    return result_dtype(target.codec), isinstance(target.codec, Fp8Block) and target.codec.ue8m0


def parts_of(target: TensorRef, result: Operand) -> Parts:
    """A kernel's result in `form_of` the target, as stored bytes."""
    if fusable(target.codec):
        return stored(target.codec, result)
    values = result.values
    return target.codec.encode(values if len(target.shape) > 1 else values.view(-1))


def _matrix(tile: torch.Tensor) -> torch.Tensor:
    return tile.view(1, -1) if tile.dim() < 2 else tile
