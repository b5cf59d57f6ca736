"""The codec operations as torch operators `torch.ops.surgery.*`, for torch.compile, export and graph tools.

Registered when this module is imported, and only then; those of merges are in `merge_library`, which comes
along. Operands and results are those of `ops`, `packed_ops` and `encode_ops`; FP8 codes are uint8 views.
Shapes of results follow from the operands' alone, so that a traced program needs no data. Operators have no
gradients: rounding has none.
"""

from __future__ import annotations

import torch

from surgery.codecs import (
    bitstream,
    encode_ops,
    magnitude,
    merge_library,  # noqa: F401  (registers its operators)
    ops,
    packed_ops,
)
from surgery.codecs.column_sweep import BlockGrid
from surgery.codecs.schemes import IntScheme


@torch.library.custom_op("surgery::decode_fp8_block", mutates_args=())
def decode_fp8_block(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 codes [R, C] · float32 scales [⌈R/128⌉, ⌈C/128⌉] as float32, bf16 or fp16 [R, C]."""
    return ops.decode_fp8_block(codes, scales, dtype)


@decode_fp8_block.register_fake
def _(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


@torch.library.custom_op("surgery::encode_fp8_block", mutates_args=())
def encode_fp8_block(values: torch.Tensor, *, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 codes [R, C], float32 scales [⌈R/128⌉, ⌈C/128⌉]) of float32 or bf16 values [R, C]."""
    return ops.encode_fp8_block(values, ue8m0=ue8m0)


@encode_fp8_block.register_fake
def _(values: torch.Tensor, *, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    return codes, torch.empty(ops.scale_shape(values.shape), dtype=torch.float32, device=values.device)


@torch.library.custom_op("surgery::decode_stream", mutates_args=())
def decode_stream(
    words: torch.Tensor,
    bits: int,
    cols: int,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    zero: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[rows, cols] of int32 words; zero points are `zeros` [rows, groups], or `zero` where that is None."""
    return packed_ops.decode_stream(words, bits, cols, scales, zero if zeros is None else zeros, dtype)


@decode_stream.register_fake
def _(
    words: torch.Tensor,
    bits: int,
    cols: int,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    zero: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty(scales.shape[0], cols, dtype=dtype, device=words.device)


@torch.library.custom_op("surgery::decode_nibbles", mutates_args=())
def decode_nibbles(
    packed: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    count: int,
    *,
    block: int,
    high_first: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[count] of uint8 bytes [⌈count / 2⌉], 16 levels and float32 scales [⌈count / block⌉]."""
    return packed_ops.decode_nibbles(
        packed, levels, scales, count, block=block, high_first=high_first, dtype=dtype
    )


@decode_nibbles.register_fake
def _(
    packed: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    count: int,
    *,
    block: int,
    high_first: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty(count, dtype=dtype, device=packed.device)


@torch.library.custom_op("surgery::decode_awq", mutates_args=())
def decode_awq(
    words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[rows, cols] of int32 words [cols, rows / 8] and [groups, rows / 8] and fp16 scales [groups, rows]."""
    return packed_ops.decode_awq(words, zeros, scales, dtype)


@decode_awq.register_fake
def _(words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(scales.shape[1], words.shape[0], dtype=dtype, device=words.device)


@torch.library.custom_op("surgery::encode_stream", mutates_args=())
def encode_stream(
    values: torch.Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(int32 words, float32 scales, uint8 zero points) of values [rows, cols]; `group_size` 0: whole rows."""
    return encode_ops.encode_stream(values, IntScheme(bits, group_size, symmetric), scale_dtype)


@encode_stream.register_fake
def _(
    values: torch.Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, cols = values.shape
    groups = cols // group_size if group_size else 1
    scales = torch.empty(rows, groups, dtype=torch.float32, device=values.device)
    shape = (rows, bitstream.word_count(cols, bits))
    words = torch.empty(shape, dtype=torch.int32, device=values.device)
    return words, scales, torch.empty_like(scales, dtype=torch.uint8)


@torch.library.custom_op("surgery::encode_nf4", mutates_args=())
def encode_nf4(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 bytes [⌈n / 2⌉], float32 absmax [⌈n / block⌉]) of values [n]."""
    return encode_ops.encode_nf4(values, block)


@encode_nf4.register_fake
def _(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = values.shape[0]
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=values.device)
    return packed, torch.empty(-(-count // block), dtype=torch.float32, device=values.device)


@torch.library.custom_op("surgery::largest_magnitude", mutates_args=())
def largest_magnitude(values: torch.Tensor) -> torch.Tensor:
    """int64 [1]: the bits of the largest magnitude (uint8: of e4m3 codes)."""
    return magnitude.largest_magnitude(values)


@largest_magnitude.register_fake
def _(values: torch.Tensor) -> torch.Tensor:
    return torch.empty(1, dtype=torch.int64, device=values.device)


@torch.library.custom_op("surgery::sweep_block", mutates_args=())
def sweep_block(
    weights: torch.Tensor,
    factor: torch.Tensor,
    mask: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    top: int = 0,
    prune: int = 0,
    of: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, errors, uint8 codes) of float32 weights [batch, rows, cols]; the pattern is `prune`:`of`
    (0: none), the grid `scales`, `zeros`, `group` and `top` (without scales: none, and no codes: [0])."""
    grid = None
    if scales is not None and zeros is not None and group is not None:
        grid = BlockGrid(scales, zeros, group, top)
    pattern = (prune, of) if of else None
    swept = ops.sweep_block(weights, factor, mask=mask, pattern=pattern, grid=grid)
    codes = torch.empty(0, dtype=torch.uint8, device=weights.device) if swept.codes is None else swept.codes
    return swept.values, swept.errors, codes


@sweep_block.register_fake
def _(
    weights: torch.Tensor,
    factor: torch.Tensor,
    mask: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    top: int = 0,
    prune: int = 0,
    of: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    places = [torch.empty(weights.shape, dtype=weights.dtype, device=weights.device) for _ in range(2)]
    shape = (0,) if scales is None else weights.shape
    return places[0], places[1], torch.empty(shape, dtype=torch.uint8, device=weights.device)
