"""The baseline of `solver_gpu.py`: GPTQ and SparseGPT column by column in eager torch.

Written here from what llm-compressor's modifiers do (their names of things, not their code): the Hessian in
float32, Cholesky, its inverse, and the upper Cholesky of that; blocks of 128 columns; for each column some
fifteen small operations; then one product for the columns behind the block. Grids are static, group 128.
On the CPU its codes and zeros are those of release 0.14.0.1 (`llmcompressor_parity.py`).

That release has more than this: on a GPU with Triton it sweeps a block in one kernel and takes matrices of a
shape together (GPTQ; its SparseGPT is the loop below), and its GPTQ divides the Hessian once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

Stage = Callable[[str], AbstractContextManager[None]]
"""What times the parts of a run by name."""
BLOCK = 128


def accumulate(hessian: torch.Tensor, inputs: torch.Tensor, tokens: int) -> int:
    """The running mean of 2 x xᵀ; gives the tokens so far."""
    added = inputs.shape[0]
    hessian *= tokens / (tokens + added)
    wide = (2 / (tokens + added)) ** 0.5 * inputs.t().float()
    hessian += wide.matmul(wide.t())
    return tokens + added


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the damped inverse, in three steps."""
    hessian = hessian.clone()
    diagonal = torch.arange(hessian.shape[0], device=hessian.device)
    hessian[diagonal, diagonal] += damping * torch.mean(torch.diag(hessian))
    lower = torch.linalg.cholesky(hessian)
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True)


def round_column(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    code = torch.clamp(torch.round(w / scale + zero), 0, top)
    return (code - zero) * scale


def untimed(_: str) -> AbstractContextManager[None]:
    return nullcontext()


def gptq(
    weights: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    top: int,
    stage: Stage = untimed,
    groups: Sequence[int] | None = None,
) -> torch.Tensor:
    """Weights [R, C] rounded with scales and zero points [R, C / 128]; `groups` has each column's group where
    columns come in another order."""
    group = groups or [i // BLOCK for i in range(weights.shape[1])]
    return _columns(
        weights,
        factor,
        lambda w, i, _: round_column(w, scales[:, group[i]], zeros[:, group[i]], top),
        lambda block, first: None,
        stage,
    )


def sparsegpt(
    weights: torch.Tensor,
    factor: torch.Tensor,
    sparsity: float,
    stage: Stage = untimed,
) -> torch.Tensor:
    """Weights [R, C] with a share of zeros in each block."""

    def decide(block: torch.Tensor, first: int) -> torch.Tensor:
        diagonal = torch.diag(factor)[first : first + block.shape[1]]
        costs = block**2 / diagonal.reshape(1, -1) ** 2
        threshold = torch.sort(costs.flatten())[0][int(costs.numel() * sparsity)]
        return costs <= threshold

    def prune(w: torch.Tensor, i: int, mask: torch.Tensor | None) -> torch.Tensor:
        assert mask is not None
        q = w.clone()
        q[mask[:, i % BLOCK]] = 0
        return q

    return _columns(weights, factor, prune, decide, stage)


def _columns(
    weights: torch.Tensor,
    factor: torch.Tensor,
    change: Callable[[torch.Tensor, int, torch.Tensor | None], torch.Tensor],
    decide: Callable[[torch.Tensor, int], torch.Tensor | None],
    stage: Stage,
) -> torch.Tensor:
    weights = weights.clone()
    losses = torch.zeros(weights.shape[0], device=weights.device)
    cols = weights.shape[1]
    for first in range(0, cols, BLOCK):
        last = min(first + BLOCK, cols)
        with stage("columns"):
            block = weights[:, first:last].clone()
            kept, errors = torch.zeros_like(block), torch.zeros_like(block)
            block_losses = torch.zeros_like(block)
            inverse = factor[first:last, first:last]
            mask = decide(block, first)
            for i in range(last - first):
                w, d = block[:, i], inverse[i, i]
                q = change(w, first + i, mask)
                kept[:, i] = q
                block_losses[:, i] = (w - q) ** 2 / d**2
                error = (w - q) / d
                block[:, i:] -= error.unsqueeze(1).matmul(inverse[i, i:].unsqueeze(0))
                errors[:, i] = error
            weights[:, first:last] = kept
            losses += torch.sum(block_losses, 1) / 2
        with stage("products"):
            weights[:, last:] -= errors.matmul(factor[first:last, last:])
    return weights
