"""gpt-oss' fused experts in their two stored forms, and the way from one to the other.

    published     X_blocks [experts, rows, groups, 16] and X_scales [experts, rows, groups] (`codecs.mxfp4`)
    unquantized   X [experts, columns, rows], inputs first

An expert's projection is the same rows of both (gate and up are interleaved), so its view keeps its place and
only turns.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from surgery.codecs.codec import Codec
from surgery.codecs.mxfp4 import GROUP, GROUP_BYTES, Mxfp4Blocks
from surgery.stream.checkpoint import Part, TensorRef
from surgery.stream.files import StoredTensor
from surgery.stream.header import tensor_nbytes

BLOCKS, SCALES = "_blocks", "_scales"


def block_codec(parts: tuple[Part, ...]) -> tuple[Codec, tuple[int, ...], str]:
    """The codec and the logical shape [rows, cols] of `blocks` and `scales`, and what is wrong with them."""
    stored = {part.key: part.stored for part in parts}
    blocks, scales, view = stored["blocks"], stored["scales"], parts[0].view
    told, wanted = list(blocks.shape), list(blocks.shape[:-1])
    fault = ""
    if len(told) != 4 or told[-1] != GROUP_BYTES:
        fault = f"shape {told}, [experts, rows, groups, {GROUP_BYTES}] expected"
    elif list(scales.shape) != wanted:
        fault = f"scales of shape {list(scales.shape)} beside it, {wanted} expected"
    elif {blocks.dtype, scales.dtype} != {"U8"}:
        fault = f"dtypes {blocks.dtype} and {scales.dtype}, U8 expected"
    if fault:
        return Mxfp4Blocks(), (), fault
    rows = view.shape(blocks.shape)[0] if view else blocks.shape[1]
    return Mxfp4Blocks(), (rows, blocks.shape[2] * GROUP), ""


def value_parts(ref: TensorRef, dtype: str = "BF16") -> tuple[Part, ...]:
    """Where the values of an MXFP4 expert are in the unquantized form."""
    blocks = next(part for part in ref.parts if part.key == "blocks")
    experts, rows, *inner = blocks.stored.shape
    shape = (experts, prod(inner) * 2, rows)
    name = blocks.stored.name.removesuffix(BLOCKS)
    view = replace(blocks.view, transpose=True) if blocks.view else None
    return (Part("weight", StoredTensor(name, dtype, shape, tensor_nbytes(dtype, shape)), view),)


def block_parts(ref: TensorRef) -> tuple[Part, ...]:
    """Where an expert of the unquantized form is as MXFP4."""
    (weight,) = ref.parts
    experts, cols, rows = weight.stored.shape
    view = replace(weight.view, transpose=False) if weight.view else None
    parts = []
    for key, suffix, shape in (
        ("blocks", BLOCKS, (experts, rows, cols // GROUP, GROUP_BYTES)),
        ("scales", SCALES, (experts, rows, cols // GROUP)),
    ):
        stored = StoredTensor(weight.stored.name + suffix, "U8", shape, tensor_nbytes("U8", shape))
        parts.append(Part(key, stored, view))
    return tuple(parts)
