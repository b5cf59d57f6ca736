"""One block of columns in optimal brain surgery: prune or round a column, make up for it in those behind it.

For the columns c of a block in order, with U the upper Cholesky factor of the inverse Hessian (GPTQ, arXiv
2210.17323; SparseGPT, arXiv 2301.00774),

    q_c = 0 where pruned, else the nearest point of the grid (w_c itself without one)
    e_c = (w_c − q_c) / U_cc
    w_j ← w_j − e_c · U_cj        for the columns j > c of the block

Rows are independent. This is the torch form: the oracle of the kernels and the path without them. Every
product, quotient and difference is rounded by itself in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class SweptBlock(NamedTuple):
    """Of [batch, rows, cols]: the values that stay, the scaled errors e, and uint8 codes (None: no grid)."""

    values: torch.Tensor
    errors: torch.Tensor
    codes: torch.Tensor | None


class BlockGrid(NamedTuple):
    """The grid of each column: float32 scales and uint8 zero points [batch, rows, groups], the group of each
    column as int32 [batch, cols], and the largest code."""

    scales: torch.Tensor
    zeros: torch.Tensor
    group: torch.Tensor
    top: int


def sweep_block(
    weights: torch.Tensor,
    factor: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    pattern: tuple[int, int] | None = None,
    grid: BlockGrid | None = None,
) -> SweptBlock:
    """Sweep float32 weights [batch, rows, cols] with the diagonal block [batch, cols, cols] of U.

    `mask` (uint8, 1: pruned) is decided beforehand; `pattern` (n, m) prunes the n of m columns whose w²/U²
    is smallest, the first of equals, once the sweep gets to them (m divides cols). With a grid a pruned
    value is 0 and its code the zero point.
    """
    current = weights.clone()
    values, errors = torch.empty_like(weights), torch.empty_like(weights)
    codes = torch.empty_like(weights, dtype=torch.uint8) if grid is not None else None
    pruned = torch.zeros_like(weights, dtype=torch.bool) if mask is None else mask.bool()
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    for c in range(weights.shape[-1]):
        if pattern is not None and c % pattern[1] == 0:
            ahead = slice(c, c + pattern[1])
            ratio = current[..., ahead] / diagonal[:, None, ahead]
            pruned = pruned.clone() if c == 0 else pruned
            pruned[..., ahead] = smallest(ratio * ratio, pattern[0])
        w, gone = current[..., c], pruned[..., c]
        q = w
        if grid is not None and codes is not None:
            index = grid.group[:, None, c, None].long().expand(*w.shape, 1)
            scale = grid.scales.gather(-1, index)[..., 0]
            zero = grid.zeros.gather(-1, index)[..., 0]
            code = (torch.round(w / scale) + zero.float()).clamp(0, grid.top)
            q = (code - zero.float()) * scale
            codes[..., c] = torch.where(gone, zero, code.to(torch.uint8))
        q = torch.where(gone, 0.0, q)
        e = (w - q) / diagonal[:, None, c]
        values[..., c], errors[..., c] = q, e
        current[..., c + 1 :] -= e[..., None] * factor[:, None, c, c + 1 :]
    return SweptBlock(values, errors, codes)


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for the `count` smallest of the last dimension, the first of equals."""
    order = torch.sort(scores, dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
