"""The torch form of the merge operations of `merges.py`: their oracle, and the path without kernels.

Sums of products run as sums of squares do (`reference.py`): exact in float64, down the columns of a block,
then halves onto halves. exp and log are written out in float64 sums and products, each rounded by itself,
because those of libraries differ in the last bit from one to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.codecs.reference import BLOCK

TINY = 1e-8
ROWS = 16
"""Rows at a time, for the sake of memory: they take 20 float32 copies."""
UPPER_BINS, LOWER_BINS = 1 << 15, 1 << 16
_ROUNDER = 6755399441055744.0
_ROUNDER_BITS = 0x4338000000000000
_LN2_HIGH, _LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
_HALF_ROOT_BITS = 0x3FE6A09E667F3BCD
_EXP = tuple(
    1.0 / n for n in (362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0)
)  # fmt: skip
_LOG = tuple(1.0 / n for n in (11.0, 9.0, 7.0, 5.0, 3.0, 1.0))


def products(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Dot products of float32 matrices by block, the lower triangle row by row: float64 [blocks, pairs]."""
    columns = [_by_lane(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i + 1)]
    return torch.stack(columns, dim=1)


def task_sums(base: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """‖base‖², ‖δ_1‖², …, then δ_2·δ_1, δ_3·δ_1, δ_3·δ_2, … by block, δ_i = other_i − base."""
    deltas = [other - base for other in others]
    columns = [_by_lane(base, base), *(_by_lane(delta, delta) for delta in deltas)]
    columns += [_by_lane(deltas[i], deltas[j]) for i in range(len(deltas)) for j in range(i)]
    return torch.stack(columns, dim=1)


def sizes(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ |v| of float32 matrices by block: float64 [blocks, vectors]."""
    return torch.stack([_by_lane(each.abs(), torch.ones_like(each)) for each in vectors], dim=1)


def _by_lane(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    rows, cols = left.shape
    down, across = -(-rows // BLOCK), -(-cols // BLOCK)
    lanes = torch.zeros(down, across * BLOCK, dtype=torch.float64, device=left.device)
    for row in range(min(BLOCK, rows)):
        each = slice(row, None, BLOCK)
        found = left[each].double() * right[each].double()
        lanes[: found.shape[0], :cols] += found
    return _folded(lanes.view(down * across, BLOCK))


def _folded(lanes: torch.Tensor) -> torch.Tensor:
    half = BLOCK // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half:]
        half //= 2
    return lanes.reshape(-1)


def upper_counts(sizes: torch.Tensor) -> torch.Tensor:
    """How many non-negative float32 numbers share their upper 16 bits: int64 [32768]."""
    return torch.bincount(_bits(sizes) >> 16, minlength=UPPER_BINS)


def lower_counts(sizes: torch.Tensor, digit: int) -> torch.Tensor:
    """The same of the lower 16 bits of those whose upper ones are `digit`: int64 [65536]."""
    bits = _bits(sizes)
    return torch.bincount(bits[bits >> 16 == digit] & (LOWER_BINS - 1), minlength=LOWER_BINS)


def _bits(sizes: torch.Tensor) -> torch.Tensor:
    return sizes.reshape(-1).view(torch.int32) & 0x7FFF_FFFF  # a NaN may have a sign


def row_divergence(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """KL(softmax(model) + 10⁻⁸ ‖ softmax(base) + 10⁻⁸) of each row of float32 matrices: float32 [rows],
    not below 0."""
    found = []
    for start in range(0, base.shape[0], ROWS):
        p, q = (_softmax(each[start : start + ROWS]) + TINY for each in (model, base))
        found.append(_row_sums(p * log_of_ratio(p, q)))
    sums = torch.cat(found) if found else torch.zeros(0)
    return torch.where(sums > 0, sums, 0.0).float()


def _softmax(values: torch.Tensor) -> torch.Tensor:
    wide = values.double()
    powers = exp_of_negative(wide - wide.amax(-1, keepdim=True))
    return powers * (1.0 / _row_sums(powers)).unsqueeze(-1)


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    lanes = torch.zeros(values.shape[0], BLOCK, dtype=torch.float64, device=values.device)
    for begin in range(0, values.shape[1], BLOCK):
        piece = values[:, begin : begin + BLOCK]
        lanes[:, : piece.shape[1]] += piece
    return _folded(lanes)


def exp_of_negative(x: torch.Tensor) -> torch.Tensor:
    """eˣ of float64 numbers up to 0, to 1e-11; below −700 it is e⁻⁷⁰⁰."""
    x = torch.where(x > -700.0, x, -700.0)
    rounded = x * 1.44269504088896338700 + _ROUNDER
    whole = rounded - _ROUNDER
    r = x - whole * _LN2_HIGH - whole * _LN2_LOW
    total = torch.full_like(x, _EXP[0])
    for coefficient in _EXP[1:]:
        total = total * r + coefficient
    exponent = rounded.view(torch.int64) - _ROUNDER_BITS + 1023
    return total * (exponent << 52).view(torch.float64)


def log_of_ratio(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """ln(p / q) of positive normal float64 numbers, to 1e-10 of itself."""
    gap, total = p - q, p + q
    near = gap.abs() <= 0.17 * total
    return torch.where(near, _log_series(gap / total), log_of_positive(p / q))


def log_of_positive(x: torch.Tensor) -> torch.Tensor:
    """ln x of positive normal float64 numbers, to 1e-10."""
    bits = x.contiguous().view(torch.int64)
    exponent = (bits - _HALF_ROOT_BITS) >> 52
    m = (bits - (exponent << 52)).view(torch.float64)
    whole = (exponent + _ROUNDER_BITS).view(torch.float64) - _ROUNDER
    return whole * (_LN2_HIGH + _LN2_LOW) + _log_series((m - 1.0) / (m + 1.0))


def _log_series(s: torch.Tensor) -> torch.Tensor:
    """ln((1 + s) / (1 − s)) of |s| up to 0.172."""
    z = s * s
    total = torch.full_like(z, _LOG[0])
    for coefficient in _LOG[1:]:
        total = total * z + coefficient
    return (s + s) * total
