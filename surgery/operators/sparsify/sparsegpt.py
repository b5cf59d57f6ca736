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

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator

from surgery.codecs.codec import Codec
from surgery.codecs.column_sweep import BlockGrid
from surgery.codecs.forms import ScaleDtype, codec_of
from surgery.codecs.grid import GridMethod, Quantized, fit_grid, quantize
from surgery.codecs.schemes import IntScheme, parse_scheme
from surgery.operators.layerwise.hessian import Factors, factorize
from surgery.operators.layerwise.operator import Tensors, check_groups, quantized_together
from surgery.operators.layerwise.problem import Problem, Solved
from surgery.operators.layerwise.sweep import Decision, Solution, sweep_columns
from surgery.operators.sparsify.allocating import Allocating
from surgery.operators.sparsify.magnitude import magnitude
from surgery.operators.sparsify.masks import Sparsity, check_pattern, lowest_of_matrices
from surgery.operators.sparsify.sparsity import sparsity_of
from surgery.stream.checkpoint import Checkpoint, TensorRef


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


class SparseGPT(Allocating):
    """Params of `sparsify.sparsegpt`."""

    op: ClassVar[str] = "sparsify.sparsegpt"

    damping: float = Field(default=0.01, gt=0, le=1)
    """Share of the mean squared input that is added to every one."""
    block_size: int = Field(default=128, ge=1)
    """Columns that are decided on together."""
    quantize: str | None = None
    """A scheme of whole numbers (int4-g64) that what stays is rounded to in the same sweep."""
    scale_dtype: ScaleDtype = "bfloat16"
    """The dtype of the scales of `quantize`."""

    @field_validator("quantize")
    @classmethod
    def _whole_numbers(cls, value: str | None) -> str | None:
        if value is not None and not isinstance(parse_scheme(value), IntScheme):
            raise ValueError(f"`{value}`: a sweep rounds to whole numbers, int2 to int8")
        return value

    @property
    def asked_damping(self) -> float:
        return self.damping

    @property
    def joint(self) -> IntScheme | None:
        """The scheme of what stays."""
        found = parse_scheme(self.quantize) if self.quantize else None
        return found if isinstance(found, IntScheme) else None

    def codec_of(self, ref: TensorRef) -> Codec:
        if self.joint is None:
            return ref.codec
        check_groups(ref, self.joint)
        return codec_of(self.joint, self.scale_dtype)

    def described(self, checkpoint: Checkpoint, tensors: Tensors) -> tuple[Tensors, Mapping[str, Any]]:
        if self.joint is None:
            return tensors, checkpoint.config
        return quantized_together(checkpoint, tensors)

    def solve(self, problem: Problem) -> Solved:
        factors = factorize(problem.known_gram, self.damping)
        found = sparsegpt(
            problem.weights, factors, sparsity_of(problem), splits=problem.splits,
            block_size=self.block_size, scheme=self.joint, scale_dtype=getattr(torch, self.scale_dtype),
        )  # fmt: skip
        return Solved(found.values, found.quantized, factors.damping, list(factors.faults))

    def fall_back(self, problem: Problem) -> Solved:
        values = magnitude(problem.weights, sparsity_of(problem), splits=problem.splits)
        if self.joint is None:
            return Solved(values)
        grid = fit_grid(problem.weights, self.joint, "absmax", getattr(torch, self.scale_dtype))
        codes = quantize(values, grid, self.joint)
        return Solved(codes.values(), codes)
