"""GPTQ (arXiv 2210.17323): round column by column, and let the columns that remain make up for it.

    q_c = nearest point of the grid,   e_c = (w_c − q_c) / U_cc,   w_j ← w_j − e_c U_cj  (j > c)

with U the upper Cholesky factor of the inverse Hessian. The grid of a group is taken from its weights when
the sweep reaches it, all columns before it applied; with static groups from the weights before the sweep.
Factors in the order of the inputs' squares (`factorize(act_order=True)`) take the heaviest columns first;
groups stay runs of neighbours in the matrix as stored, for which static groups are needed (else readers
would need a `g_idx`).

Deviations: where groups are narrower than a block, the paper's code takes grids from weights that lack the
block's own updates; here they are up to date. Weights of inputs that never occur are rounded to nearest,
where the paper's code makes them 0: calibration has not seen them, a user may.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator

from surgery.codecs.column_sweep import BlockGrid
from surgery.codecs.grid import Grid, GridMethod, Quantized, fit_grid
from surgery.codecs.schemes import IntScheme
from surgery.operators.layerwise.hessian import Factors, factorize
from surgery.operators.layerwise.operator import MatrixOperator
from surgery.operators.layerwise.problem import Problem, Solved
from surgery.operators.layerwise.sweep import Decision, Solution, sweep_columns
from surgery.operators.quantize.precision import Precision, int_scheme_of
from surgery.operators.quantize.rtn import rtn


def gptq(
    weights: torch.Tensor,
    factors: Factors,
    scheme: IntScheme,
    *,
    grid: GridMethod = "absmax",
    static_groups: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    block_size: int = 128,
    keep_zeros: bool = False,
) -> Solution:
    """Weights [B, R, C] in a scheme, columns as they are in `weights` whatever the order of the factors.

    `keep_zeros` leaves weights that are 0 at 0, for sparse matrices. Raises ValueError where groups do not
    divide C, and for reordered columns without static groups.
    """
    cols = weights.shape[-1]
    width, order = scheme.width(cols), factors.order
    if order is not None and not static_groups and width < cols:
        raise ValueError("columns in the order of their inputs need static groups")
    static = static_groups or width == cols
    found = fit_grid(weights, scheme, grid, scale_dtype) if static else _empty(weights, scheme, scale_dtype)
    places = torch.arange(cols, device=weights.device).expand(len(weights), cols) if order is None else order
    current = (
        weights.clone(memory_format=torch.contiguous_format) if order is None else _columns(weights, order)
    )
    group = (places // width).to(torch.int32)
    zeros = (current == 0).to(torch.uint8) if keep_zeros else None

    def decide(now: torch.Tensor, first: int, last: int) -> Decision:
        if not static and first % width == 0:
            fitted = fit_grid(
                now[..., first : first + width],
                IntScheme(scheme.bits, 0, scheme.symmetric),
                grid,
                scale_dtype,
            )
            found.scales[..., first // width] = fitted.scales[..., 0]
            found.zeros[..., first // width] = fitted.zeros[..., 0]
        return Decision(
            mask=None if zeros is None else zeros[..., first:last].contiguous(),
            grid=BlockGrid(found.scales, found.zeros, group[:, first:last].contiguous(), scheme.top),
        )

    codes = sweep_columns(current, factors.upper, decide, block_size=block_size, group=1 if static else width)
    if codes is None:
        raise ValueError("a matrix without columns has no codes")
    if order is not None:
        back = order.argsort(-1)
        current, codes = _columns(current, back), _columns(codes, back)
    return Solution(current, Quantized(codes, found.scales, found.zeros))


def _columns(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The columns of [B, R, C] in the order [B, C] of their matrix."""
    return values.gather(-1, order[:, None].expand(values.shape))


def _empty(weights: torch.Tensor, scheme: IntScheme, scale_dtype: torch.dtype) -> Grid:
    shape = (*weights.shape[:-1], scheme.groups(weights.shape[-1]))
    return Grid(weights.new_empty(shape, dtype=torch.float32), weights.new_empty(shape, dtype=torch.uint8))


class GPTQ(Precision, MatrixOperator):
    """Params of `quantize.gptq`."""

    op: ClassVar[str] = "quantize.gptq"

    damping: float = Field(default=0.01, gt=0, le=1)
    """Share of the mean squared input that is added to every one."""
    act_order: bool = Field(default=False, strict=True)
    """Take the columns with the largest inputs first. Groups are then fixed beforehand (`static_groups`), so
    that no reader needs a table of them."""
    static_groups: bool = Field(default=False, strict=True)
    """Choose every group's grid from the weights as they were."""
    grid: GridMethod = "absmax"
    """`absmax` spans all values of a group, `mse` shrinks the grid to the least error."""
    block_size: int = Field(default=128, ge=1)

    @model_validator(mode="after")
    def _whole_numbers(self) -> Self:
        self.check_whole_numbers()
        return self

    @property
    def asked_damping(self) -> float:
        return self.damping

    def solve(self, problem: Problem) -> Solved:
        factors = factorize(problem.known_gram, self.damping, act_order=self.act_order)
        found = gptq(
            problem.weights, factors, int_scheme_of(problem), grid=self.grid,
            static_groups=self.static_groups or self.act_order,
            scale_dtype=getattr(torch, self.scale_dtype), block_size=self.block_size,
        )  # fmt: skip
        return Solved(found.values, found.quantized, factors.damping, list(factors.faults))

    def fall_back(self, problem: Problem) -> Solved:
        found = rtn(
            problem.weights, int_scheme_of(problem), grid=self.grid,
            scale_dtype=getattr(torch, self.scale_dtype),
        )  # fmt: skip
        return Solved(found.values(), found)
