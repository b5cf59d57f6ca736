"""Optimal brain surgery over all columns, in blocks whose errors reach what is behind in one product.

Within a block, `sweep_block` eliminates column after column; what it leaves to the columns j behind the block
is applied lazily (GPTQ, arXiv 2210.17323):

    W[:, j] ← W[:, j] − E · U[block, j],    E the scaled errors of the block's columns

A block may be swept in segments, so that a group of columns is decided on when all before it is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from surgery.codecs.column_sweep import BlockGrid, SweptBlock
from surgery.codecs.grid import Quantized
from surgery.codecs.ops import sweep_block


class Solution(NamedTuple):
    """float32 values [B, R, C] that replace the weights, and the codes that they are where they were
    quantized."""

    values: torch.Tensor
    quantized: Quantized | None = None


class Decision(NamedTuple):
    """What happens to the columns of one block: the arguments of `sweep_block`."""

    mask: torch.Tensor | None = None
    pattern: tuple[int, int] | None = None
    grid: BlockGrid | None = None


Decide = Callable[[torch.Tensor, int, int], Decision]
"""decide(current weights [B, R, C], first, last), where the columns from `first` on are up to date as far as
the block (or the group that it starts) goes."""


def sweep_columns(
    weights: torch.Tensor, upper: torch.Tensor, decide: Decide, *, block_size: int, group: int = 1
) -> torch.Tensor | None:
    """Sweep weights [B, R, C] in place with the factors `upper` [B, C, C], by blocks of at most `block_size`
    columns that keep to multiples of `group`; gives the uint8 codes where `decide` gives grids.

    Groups wider than a block begin one, and their columns are up to date then; narrower ones are segments of
    a block.
    """
    cols = weights.shape[-1]
    segment = block_size if group == 1 else min(group, block_size)
    codes: torch.Tensor | None = None
    for start, stop in column_blocks(cols, block_size, group):
        errors = weights.new_empty(*weights.shape[:-1], stop - start)
        for first in range(start, stop, segment):
            last = min(first + segment, stop)
            now, error = weights[..., first:last], errors[..., first - start : last - start]
            mask, pattern, grid = decide(weights, first, last)
            if grid is not None and codes is None:
                codes = torch.empty_like(weights, dtype=torch.uint8)
            sweep_block(
                now,
                upper[:, first:last, first:last],
                mask=mask,
                pattern=pattern,
                grid=grid,
                into=SweptBlock(now, error, None if codes is None else codes[..., first:last]),
            )
            if last < stop:
                weights[..., last:stop] -= error @ upper[:, first:last, last:stop]
        if stop < cols:
            weights[..., stop:].baddbmm_(errors, upper[:, start:stop, stop:], alpha=-1)
    return codes


def column_blocks(cols: int, size: int, group: int) -> list[tuple[int, int]]:
    """Blocks of at most `size` columns: whole groups each, or the pieces of one group."""
    span = group if group > size else size // group * group
    return [
        (start, min(start + size, base + span, cols))
        for base in range(0, cols, span)
        for start in range(base, min(base + span, cols), size)
    ]
