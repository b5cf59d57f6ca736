"""The same values stored otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import Codec
from surgery.stream.checkpoint import ComputedRef, Decision, Part, ReadContext, Sums, TensorRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Recode:
    """The kernel of a change of stored form: values pass through."""

    def decide(self, inputs: Sequence[TensorRef], context: ReadContext) -> Decision:
        return Decision()

    def combine(self, tiles: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sums]:
        return tiles[0], ()

    def metrics(self, sums: Sums, numel: int) -> dict[str, Any]:
        return {}

    def lineage(self) -> dict[str, Any]:
        return {"op": "recode"}


def recode(ref: TensorRef, codec: Codec, parts: tuple[Part, ...]) -> TensorRef:
    """`ref` stored in another form; refs that already have it come back unchanged."""
    if ref.codec == codec and ref.parts == parts:
        return ref
    if isinstance(ref, ComputedRef):
        return ref.with_form(codec, parts)
    return ComputedRef(ref, (ref,), Recode()).with_form(codec, parts)
