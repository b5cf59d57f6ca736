"""What a reader of quantized checkpoints gives back: logical tensors, and what it found wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from surgery.codecs.codec import Codec
from surgery.stream.checkpoint import Part
from surgery.stream.files import StoredTensor


class Logical(NamedTuple):
    """What will be a StoredRef."""

    name: str
    shape: tuple[int, ...]
    codec: Codec
    parts: tuple[Part, ...]


@dataclass
class Grouping:
    """Logical tensors, and pairs of a stored tensor and what is wrong with it."""

    tensors: list[Logical] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def taken(self) -> set[str]:
        """Names of the stored tensors that are part of a logical one."""
        return {part.stored.name for tensor in self.tensors for part in tensor.parts}

    def add(
        self, name: str, shape: tuple[int, ...], codec: Codec, stored: Mapping[str, StoredTensor]
    ) -> None:
        """The tensor that `codec` says to be in `stored`, or what of it is missing or misshapen."""
        parts = []
        for spec in codec.parts(shape):
            tensor = stored.get(spec.stored_name(name))
            if tensor is None:
                self.faults.append((name, f"{spec.stored_name(name)} is missing"))
            elif tensor.dtype != spec.dtype:
                self.faults.append((tensor.name, f"dtype {tensor.dtype}, {spec.dtype} expected"))
            elif not same_shape(tensor.shape, spec.shape):
                told, wanted = list(tensor.shape), list(spec.shape)
                self.faults.append((tensor.name, f"shape {told}, {wanted} expected"))
            else:
                parts.append(Part(spec.key, tensor, None))
                continue
            return
        self.tensors.append(Logical(name, shape, codec, tuple(parts)))


def same_shape(told: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two shapes hold the same values in the same order, sides of 1 aside."""
    if prod(told) != prod(wanted):
        return False
    return [side for side in told if side != 1] == [side for side in wanted if side != 1]
