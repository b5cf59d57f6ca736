"""How sparse each layer is to be, from what is known of all: OWL (arXiv 2310.05175) and LSA.

    OWL    importance = share of a layer's Wanda scores above M times their mean                (M = 5)
    LSA    importance = 1 − e / Σ e, e the least output error of losing half of the weights

Importances are stretched over [0, 2β] and shifted so that the mean is the wanted sparsity:

    sparsity[l] = s + mean(d) − d[l],    d = 2β (importance − min) / (max − min)

LSA sums e over the rows w of a matrix: with S = H ∘ (w wᵀ), columns whose submatrix of S sums least are
chosen greedily, half of each block of columns; after a block its choice counts in the costs of those behind
it. This is what the paper's code does. Note that a layer with a larger error is given more zeros.

Deviation: the mean weighs layers by their size where sizes are given, so that the model's sparsity is met.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from surgery.operators.sparsify.wanda import wanda_scores


def owl(
    shares: Sequence[float], sparsity: float, *, beta: float = 0.08, sizes: Sequence[int] = ()
) -> list[float]:
    """The sparsity of each layer from its share of outliers. Raises ValueError where one leaves 0 … 1."""
    return spread(shares, sparsity, beta, sizes)


def lsa(
    errors: Sequence[float], sparsity: float, *, beta: float = 0.1, sizes: Sequence[int] = ()
) -> list[float]:
    """The sparsity of each layer from its `half_error`. Raises ValueError where one leaves 0 … 1."""
    total = sum(errors) or 1.0
    return spread([1 - error / total for error in errors], sparsity, beta, sizes)


def spread(
    importances: Sequence[float], sparsity: float, beta: float, sizes: Sequence[int] = ()
) -> list[float]:
    """Sparsities whose mean is `sparsity`, 2β between the least and the most important layer."""
    low, high = min(importances), max(importances)
    scale = 2 * beta / (high - low) if high > low else 0.0
    offsets = [scale * (importance - low) for importance in importances]
    weights = sizes or [1] * len(offsets)
    mean = sum(w * offset for w, offset in zip(weights, offsets, strict=True)) / sum(weights)
    found = [sparsity + mean - offset for offset in offsets]
    if min(found) < 0 or max(found) > 1:
        raise ValueError(
            f"with a mean sparsity of {sparsity} layers would get {min(found):.3f} to {max(found):.3f}"
        )
    return found


def outlier_share(matrices: Iterable[tuple[torch.Tensor, torch.Tensor]], *, multiple: float = 5.0) -> float:
    """The share of Wanda scores above `multiple` times their mean, of all matrices of a layer: weights
    [..., R, C] and Σ x² [..., C] of each. They are gone through twice."""
    count, total = 0, 0.0
    for weights, squares in matrices:
        count += weights.numel()
        total += float(wanda_scores(weights, squares).sum(dtype=torch.float64))
    bound = multiple * total / count
    return sum(int((wanda_scores(*pair) > bound).sum()) for pair in matrices) / count


def half_error(weights: torch.Tensor, gram: torch.Tensor, *, block_size: int = 128) -> torch.Tensor:
    """Σ over the rows of [..., R, C] of the least ‖w_P X‖² found for sets P of half the columns, with Gram
    matrices [..., C, C]: float64 [...]."""
    cols = weights.shape[-1]
    costs = weights.square() * gram.diagonal(dim1=-2, dim2=-1)[..., None, :]
    error = torch.zeros(weights.shape[:-2], dtype=torch.float64, device=weights.device)
    for start in range(0, cols, block_size):
        block = slice(start, min(start + block_size, cols))
        here, own, inner = weights[..., block], costs[..., block], gram[..., block, block]
        lost = torch.zeros_like(here)
        for _ in range(here.shape[-1] // 2):
            chosen = own.argmin(-1, keepdim=True)
            error += own.gather(-1, chosen).sum((-2, -1), dtype=torch.float64)
            w = here.gather(-1, chosen)
            own += 2 * here * w * inner.gather(-2, chosen.expand_as(here))
            own.scatter_(-1, chosen, torch.inf)
            lost.scatter_(-1, chosen, w)
        behind = slice(block.stop, cols)
        costs[..., behind] += 2 * weights[..., behind] * (lost @ gram[..., block, behind])
    return error
