"""The torch form of every native operation: the oracle of the kernels and the path without them.

One written rule for both: values in float32, each product, sum and quotient rounded by itself, to
nearest, ties to even; blocks are 128 × 128, shorter at ragged edges; scales are taken over the finite
values of a block; NaN is stored as the code 0x7F. Squares are exact in float64 and added down the
columns of a block, then halves of the columns onto halves, so that sums can be equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK = 128
LARGEST_CODE = 448.0
NAN_CODE = 0x7F


def decode_fp8_block(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 codes [R, C] · float32 scales [⌈R/128⌉, ⌈C/128⌉], rounded to `dtype`."""
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    values = table.to(codes.device).index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
    return scale_blocks(values, scales).to(dtype)


def encode_fp8_block(values: torch.Tensor, *, ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 codes [R, C], float32 scales) of float32 or bf16 values [R, C]."""
    values = values.to(torch.float32)
    scales = block_amax(values)
    broken = not bool(torch.isfinite(scales).all())
    if broken:
        scales = block_amax(torch.where(torch.isfinite(values), values, 0.0))
    # By a tensor: CUDA divides by a number through its reciprocal, which rounds otherwise.
    scales = scales.div_(torch.full_like(scales, LARGEST_CODE))
    if ue8m0:
        scales = ceil_to_power_of_two(scales)
    scales = torch.where(scales > 0, scales, 1.0)
    coded = divide_blocks(values, scales).clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn)
    codes = coded.view(torch.uint8)
    return (torch.where(values.isnan(), NAN_CODE, codes) if broken else codes), scales


def weighted_sum(parents: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ weights[i] · parents[i] in float32, from left to right, every operation rounded by itself.

    Parents of weight 0 take no part; at least one weight must not be 0.
    """
    total: torch.Tensor | None = None
    for parent, weight in zip(parents, weights, strict=True):
        if weight:
            term = parent * weight
            total = term if total is None else total.add_(term)
    if total is None:
        raise ValueError("every weight is 0")
    return total


def block_squares(base: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """‖base‖² and ‖base − other‖² of float32 matrices by block: float64 [blocks, 1 + others]."""
    return torch.stack([_square_sums(base), *(_square_sums(base - other) for other in others)], dim=1)


def _square_sums(values: torch.Tensor) -> torch.Tensor:
    blocks = _blocks(_padded(values))
    lanes = torch.zeros(blocks.shape[0], blocks.shape[2], BLOCK, dtype=torch.float64, device=values.device)
    for row in range(min(BLOCK, values.shape[0])):
        wide = blocks[:, row].double()
        lanes += wide * wide
    half = BLOCK // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half:]
        half //= 2
    return lanes.reshape(-1)


def scale_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """values [R, C] · scales [⌈R/128⌉, ⌈C/128⌉], in place."""
    if _is_whole(values):
        _blocks(values).mul_(scales[:, None, :, None])
        return values
    return values.mul_(_spread(scales, values))


def divide_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """values [R, C] / scales [⌈R/128⌉, ⌈C/128⌉] as a new tensor, by IEEE division."""
    if _is_whole(values):
        return (_blocks(values) / scales[:, None, :, None]).view(values.shape)
    return values / _spread(scales, values)


def block_amax(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block of [R, C], as [⌈R/128⌉, ⌈C/128⌉]."""
    return _blocks(_padded(values)).abs().amax(dim=(1, 3))


def ceil_to_power_of_two(values: torch.Tensor) -> torch.Tensor:
    """Positive float32 values rounded up to the next power of two (normal range)."""
    bits = values.contiguous().view(torch.int32)
    return (((bits + 0x7F_FFFF) >> 23) << 23).view(torch.float32)


def _is_whole(values: torch.Tensor) -> bool:
    return values.shape[0] % BLOCK == 0 and values.shape[1] % BLOCK == 0


def _padded(values: torch.Tensor) -> torch.Tensor:
    if _is_whole(values):
        return values
    return torch.nn.functional.pad(values, (0, -values.shape[1] % BLOCK, 0, -values.shape[0] % BLOCK))


def _blocks(values: torch.Tensor) -> torch.Tensor:
    rows, cols = values.shape
    return values.view(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)


def _spread(scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    spread = scales.repeat_interleave(BLOCK, 0)[: like.shape[0]]
    return spread.repeat_interleave(BLOCK, 1)[:, : like.shape[1]]
