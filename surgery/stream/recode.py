"""A change of stored form: values pass through, or codes where both forms have them (see `codecs.carry`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.codecs.carry import carries, carry
from surgery.codecs.codec import Codec
from surgery.codecs.mxfp4 import Mxfp4Blocks
from surgery.codecs.plain import Plain
from surgery.stream.checkpoint import (
    ComputedRef,
    Decision,
    Part,
    ReadContext,
    StoredRef,
    Sums,
    TensorRef,
)
from surgery.stream.files import StoredTensor
from surgery.stream.header import tensor_nbytes
from surgery.stream.mxfp4 import value_parts

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Recode:
    """The kernel of a change of stored form."""

    def decide(self, inputs: Sequence[TensorRef], context: ReadContext) -> Decision:
        return Decision()

    def combine(self, tiles: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sums]:
        return tiles[0], ()

    def metrics(self, sums: Sums, numel: int) -> dict[str, Any]:
        return {}

    def lineage(self) -> dict[str, Any]:
        return {"op": "recode"}

    def fuse(
        self, inputs: Sequence[TensorRef], target: ComputedRef, start: int, stop: int, context: ReadContext
    ) -> tuple[dict[str, np.ndarray[Any, Any]], Sums] | None:
        """See `surgery.stream.fused.FusedKernel`."""
        source = inputs[0]
        if not isinstance(source, StoredRef) or not carries(source.codec, target.codec, target.shape):
            return None
        raw = {part.key: source.raw(part, start, stop, context) for part in source.parts}
        source.check_finite(raw, context)
        return carry(source.codec, target.codec, target.shape, start, stop, raw), ()


def recode(ref: TensorRef, codec: Codec, parts: tuple[Part, ...]) -> TensorRef:
    """`ref` stored in another form; refs that already have it come back unchanged."""
    if ref.codec == codec and ref.parts == parts:
        return ref
    if isinstance(ref, ComputedRef):
        return ref.with_form(codec, parts)
    return ComputedRef(ref, (ref,), Recode()).with_form(codec, parts)


def stored_as(ref: TensorRef, codec: Codec) -> TensorRef:
    """`ref` under its own name (and in its place of a fused tensor) in the form of `codec`."""
    if isinstance(ref.codec, Mxfp4Blocks) and isinstance(codec, Plain) and ref.is_view:
        return recode(ref, codec, value_parts(ref, codec.dtype))
    parts = []
    for spec in codec.parts(ref.shape):
        first = ref.parts[0]
        name = first.stored.name + spec.suffix if first.view is not None else spec.stored_name(ref.name)
        shape = first.stored.shape if first.view is not None else spec.shape
        stored = StoredTensor(name, spec.dtype, shape, tensor_nbytes(spec.dtype, shape))
        parts.append(Part(spec.key, stored, first.view))
    return recode(ref, codec, tuple(parts))
