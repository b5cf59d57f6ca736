"""Optimal brain surgery from its definition, in float64: the inverse of what remains, after every column."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Choose = Callable[[Tensor, Tensor, int], Tensor | None]
Round = Callable[[Tensor, Tensor, int], Tensor]


def correlated_gram(batch: int, cols: int, seed: int, tokens: int = 0) -> Tensor:
    """Σ x xᵀ of inputs that are strongly correlated and differ in size, float64 [batch, cols, cols]."""
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, cols, tokens or 4 * cols)
    common = torch.randn(batch, cols, cols // 3 + 1, generator=rng, dtype=torch.float64)
    inputs = common @ torch.randn(batch, cols // 3 + 1, shape[-1], generator=rng, dtype=torch.float64)
    inputs = inputs + torch.randn(shape, generator=rng, dtype=torch.float64)
    inputs = inputs * torch.rand(batch, cols, 1, generator=rng, dtype=torch.float64).add(0.1)
    return inputs @ inputs.mT


def random_weights(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def brain_surgery(
    weights: Tensor, hessian: Tensor, choose: Choose, rounded: Round | None = None
) -> tuple[Tensor, Tensor]:
    """(values, mask) of weights [R, C] swept from the left.

    choose(costs [R, C], weights, c) gives, at the columns where something is to be decided, the mask of the
    columns from c on, [R, any]; rounded(weights, column, c) what a kept column becomes.
    """
    current, cols = weights.clone(), weights.shape[1]
    mask = torch.zeros_like(current, dtype=torch.bool)
    for c in range(cols):
        costs = torch.stack(
            [current[:, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(cols)], 1
        )
        found = choose(costs, current, c)
        if found is not None:
            mask[:, c : c + found.shape[1]] = found
        inverse = torch.linalg.inv(hessian[c:, c:])
        kept = current[:, c] if rounded is None else rounded(current, current[:, c], c)
        target = torch.where(mask[:, c], 0.0, kept)
        current[:, c:] -= ((current[:, c] - target) / inverse[0, 0])[:, None] * inverse[0]
        current[:, c] = target
    return current, mask


def first_smallest(scores: list[float], count: int) -> set[int]:
    """The places of the `count` smallest, the first of equals."""
    return set(sorted(range(len(scores)), key=lambda place: (scores[place], place))[:count])


def relative(out: Tensor, ref: Tensor) -> float:
    return float((out.double() - ref.double()).norm() / ref.double().norm())
