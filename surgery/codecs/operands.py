"""Stored bytes as operands of the native kernels: FP8 blocks, bf16 and float32 matrices, without decoding
them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import Codec, matrix_shape
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.plain import Plain

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.codecs.ops import Operand


def fusable(codec: Codec) -> bool:
    """Whether the kernels read and write this form as it is stored."""
    if isinstance(codec, Fp8Block):
        return not codec.half_scales
    return isinstance(codec, Plain) and codec.dtype in ("BF16", "F32")


def operand(
    codec: Codec, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
) -> Operand:
    """Rows start..stop of a `fusable` form."""
    import torch

    from surgery.codecs.ops import Operand

    if isinstance(codec, Fp8Block):
        return Operand(*codec.tensors(shape, start, stop, raw))
    values = torch.from_numpy(raw["weight"]).view(result_dtype(codec))
    return Operand(values.view(stop - start, matrix_shape(shape)[1]))


def result_dtype(codec: Codec) -> torch.dtype:
    """What `ops.assemble` calls this form."""
    import torch

    if isinstance(codec, Fp8Block):
        return torch.uint8
    return torch.bfloat16 if isinstance(codec, Plain) and codec.dtype == "BF16" else torch.float32


def stored(codec: Codec, result: Operand) -> dict[str, np.ndarray[Any, Any]]:
    """The bytes of each part."""
    import torch

    if isinstance(codec, Fp8Block) and result.scales is not None:
        return codec.stored(result.values, result.scales)
    return {"weight": result.values.view(-1).view(torch.uint8).numpy()}
