"""From one stored form to another without going through values: codes and scales as they are.

Decoding and encoding anew would choose other scales, so a packed checkpoint would lose a little with each
change of its layout. What can be carried:

    integers     any integer form to any other with the same bits and groups; a symmetric one also to an
                 asymmetric one. Scales are rounded where the new form stores a narrower dtype.
    FP8 blocks   to another name or dtype of the scales, where powers of two stay powers of two
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import Codec, IntCodec
from surgery.codecs.fp8_block import Fp8Block

if TYPE_CHECKING:
    import numpy as np

_EXACT = frozenset({("BF16", "F32"), ("F16", "F32"), ("F8_E8M0", "F32"), ("F8_E8M0", "BF16")})


def carries(source: Codec, target: Codec, shape: tuple[int, ...]) -> bool:
    """Whether the codes of a tensor of this shape can be carried over."""
    if isinstance(source, Fp8Block) and isinstance(target, Fp8Block):
        return source.ue8m0 == target.ue8m0 and not scales_change(source, target)
    if len(shape) != 2 or not (isinstance(source, IntCodec) and isinstance(target, IntCodec)):
        return False
    if getattr(source, "act_order", False):
        return False  # its groups are no runs of columns
    old, new = source.scheme, target.scheme
    same_groups = old.width(shape[1]) == new.width(shape[1])
    return old.bits == new.bits and same_groups and (old.symmetric or not new.symmetric)


def scales_change(source: Codec, target: Codec) -> bool:
    """Whether scales may lose digits on the way, because the new form stores another dtype."""
    old, new = getattr(source, "scale_dtype", None), getattr(target, "scale_dtype", None)
    return old is not None and new is not None and old != new and (old, new) not in _EXACT


def carry(
    source: Codec,
    target: Codec,
    shape: tuple[int, ...],
    start: int,
    stop: int,
    raw: Mapping[str, np.ndarray[Any, Any]],
) -> dict[str, np.ndarray[Any, Any]]:
    """The parts of rows start..stop in the target form, where `carries` says so; TypeError elsewhere."""
    if isinstance(source, Fp8Block) and isinstance(target, Fp8Block):
        return target.stored(*source.tensors(shape, start, stop, raw))
    if isinstance(source, IntCodec) and isinstance(target, IntCodec):
        return target.pack(source.quantized((stop - start, *shape[1:]), raw))
    raise TypeError(f"{source.name} cannot be carried over to {target.name}")
