"""SparseGPT (arXiv 2301.00774): prune column by column, and let the columns that remain make up for it.

With U the upper Cholesky factor of the inverse Hessian, U_cc² is the c-th diagonal element of the inverse
over the columns c, c+1, …, so w_c²/U_cc² is what setting w_c to 0 costs once the later columns have made up
for it. Blocks of 128 columns are decided on when the sweep reaches them: the share of lowest costs of the
whole block of each matrix, or the n lowest of every m columns. In the joint form what stays is rounded to a
grid in the same sweep, taken from the dense weights; a pruned weight is exactly 0.

Deviations: exactly round(rows · columns · sparsity) weights of a block go, the first of equals, where the
paper's code takes one more and all ties.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.codecs.column_sweep import BlockGrid
from surgery.codecs.grid import GridMethod, Quantized, fit_grid
from surgery.codecs.schemes import IntScheme
from surgery.operators.layerwise.hessian import Factors
from surgery.operators.layerwise.sweep import Decision, Solution, sweep_columns
from surgery.operators.sparsify.masks import Sparsity, check_pattern, lowest_of_matrices


def sparsegpt(
    weights: torch.Tensor,
    factors: Factors,
    sparsity: Sparsity,
    *,
    splits: Sequence[int] | None = None,
    block_size: int = 128,
    scheme: IntScheme | None = None,
    grid: GridMethod = "absmax",
    scale_dtype: torch.dtype = torch.float32,
) -> Solution:
    """Weights [B, R, C] at a share of zeros or an (n, m) pattern, quantized as well with a `scheme`.

    Inputs that never occur lose all their weights. Raises ValueError for factors of reordered columns and for
    patterns or groups that do not divide C.
    """
    if factors.order is not None:
        raise ValueError("sparsegpt takes columns as they are, the factors have another order")
    cols = weights.shape[-1]
    pattern = sparsity if isinstance(sparsity, tuple) else None
    if pattern is not None:
        check_pattern(pattern, cols)
        block_size = max(1, block_size // pattern[1]) * pattern[1]
    found = None if scheme is None else fit_grid(weights, scheme, grid, scale_dtype)
    group = torch.arange(cols, dtype=torch.int32, device=weights.device).expand(len(weights), cols)
    diagonal = factors.upper.diagonal(dim1=-2, dim2=-1)
    current = weights.masked_fill(factors.dead[:, None], 0.0)

    def decide(now: torch.Tensor, first: int, last: int) -> Decision:
        block_grid = None
        if found is not None and scheme is not None:
            columns = group[:, first:last] // scheme.width(cols)
            block_grid = BlockGrid(found.scales, found.zeros, columns, scheme.top)
        if pattern is not None:
            return Decision(pattern=pattern, grid=block_grid)
        costs = (now[..., first:last] / diagonal[:, None, first:last]).square()
        return Decision(mask=lowest_of_matrices(costs, sparsity, splits).to(torch.uint8), grid=block_grid)

    codes = sweep_columns(current, factors.upper, decide, block_size=block_size)
    if codes is None or found is None:
        return Solution(current)
    return Solution(current, Quantized(codes, found.scales, found.zeros))
