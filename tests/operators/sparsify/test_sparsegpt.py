"""SparseGPT against optimal brain surgery from its definition, and what its masks promise."""

from __future__ import annotations

import pytest
import torch
from brain_surgery import (
    Choose,
    brain_surgery,
    correlated_gram,
    damped,
    first_smallest,
    random_weights,
    relative,
)
from torch import Tensor

from surgery.codecs.schemes import IntScheme
from surgery.operators.layerwise.hessian import factorize
from surgery.operators.layerwise.reconstruction import reconstruction_error
from surgery.operators.sparsify.magnitude import magnitude
from surgery.operators.sparsify.sparsegpt import sparsegpt
from surgery.operators.sparsify.wanda import wanda


def by_blocks(block: int, share: float, splits: tuple[int, ...]) -> Choose:
    """The choice of a block's mask in each of the stacked matrices."""

    def choose(costs: Tensor, weights: Tensor, c: int) -> Tensor | None:
        if c % block:
            return None
        part, start = costs[:, c : c + block], 0
        mask = torch.zeros_like(part, dtype=torch.bool)
        for rows in splits:
            pool = part[start : start + rows].flatten()
            gone = first_smallest(pool.tolist(), round(len(pool) * share))
            for place in gone:
                mask[start + place // part.shape[1], place % part.shape[1]] = True
            start += rows
        return mask

    return choose


def by_pattern(zeros: int, group: int) -> Choose:
    """The choice of the first n:m group that a column begins."""

    def choose(costs: Tensor, weights: Tensor, c: int) -> Tensor | None:
        if c % group:
            return None
        mask = torch.zeros(len(costs), group, dtype=torch.bool)
        for r, row in enumerate(costs[:, c : c + group].tolist()):
            mask[r, list(first_smallest(row, zeros))] = True
        return mask

    return choose


@pytest.mark.parametrize(
    ("rows", "cols", "block", "share", "splits"),
    [(7, 21, 8, 0.5, (7,)), (9, 17, 128, 0.3, (2, 3, 4)), (4, 24, 5, 0.9, (1, 3)), (3, 8, 8, 1.0, (3,))],
)
def test_shares_prune_what_the_definition_prunes(
    rows: int, cols: int, block: int, share: float, splits: tuple[int, ...]
) -> None:
    gram, weights = correlated_gram(2, cols, seed=1), random_weights(2, rows, cols, seed=2)
    found = sparsegpt(weights, factorize(gram, 0.01), share, splits=splits, block_size=block).values
    for b in range(2):
        expected, mask = brain_surgery(weights[b], damped(gram[b], 0.01), by_blocks(block, share, splits))
        assert torch.equal(found[b] == 0, mask)
        assert relative(found[b], expected) < 1e-9 if share < 1 else not found[b].any()
    counts = [
        int((matrix == 0).sum()) == round(matrix[0].numel() * share) * 2
        for stack in found.split(splits, 1)
        for matrix in stack.split(block, 2)
    ]
    assert all(counts)


@pytest.mark.parametrize(("zeros", "group", "block"), [(2, 4, 8), (1, 3, 8), (4, 8, 6), (3, 6, 128)])
def test_patterns_prune_what_the_definition_prunes(zeros: int, group: int, block: int) -> None:
    gram, weights = correlated_gram(2, 24, seed=3), random_weights(2, 6, 24, seed=4)
    found = sparsegpt(weights, factorize(gram, 0.05), (zeros, group), block_size=block).values
    for b in range(2):
        expected, mask = brain_surgery(weights[b], damped(gram[b], 0.05), by_pattern(zeros, group))
        assert torch.equal(found[b] == 0, mask)
        assert relative(found[b], expected) < 1e-9
    assert ((found.view(2, 6, -1, group) == 0).sum(-1) == zeros).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
def test_the_joint_sweep_does_both(symmetric: bool, sparsity: float | tuple[int, int]) -> None:
    scheme = IntScheme(3, 8, symmetric)
    gram, weights = correlated_gram(1, 24, seed=5), random_weights(1, 5, 24, seed=6)
    found = sparsegpt(weights, factorize(gram, 0.01), sparsity, block_size=8, scheme=scheme)
    dense = weights[0].view(5, 3, 8)
    low, high = dense.amin(-1).clamp(max=0), dense.amax(-1).clamp(min=0)
    scale = (2 * torch.maximum(-low, high) if symmetric else high - low) / 7
    scale = scale.float().double()
    zero = torch.full_like(scale, 4) if symmetric else (-low / scale).round()

    def rounded(weights: Tensor, column: Tensor, c: int) -> Tensor:
        s, z = scale[:, c // 8], zero[:, c // 8]
        return ((column / s).round() + z).clamp(0, 7).sub(z) * s

    choose = by_pattern(*sparsity) if isinstance(sparsity, tuple) else by_blocks(8, sparsity, (5,))
    expected, mask = brain_surgery(weights[0], damped(gram[0], 0.01), choose, rounded)
    assert found.quantized is not None
    assert relative(found.values[0], expected) < 1e-6
    assert not found.values[0][mask].any()
    assert torch.equal(found.values.float(), found.quantized.values())
    spread = zero.repeat_interleave(8, 1)[mask]
    assert torch.equal(found.quantized.codes[0][mask].double(), spread)


def test_dead_inputs_lose_their_weights_and_count_as_pruned() -> None:
    gram, weights = correlated_gram(1, 16, seed=7), random_weights(1, 8, 16, seed=8)
    gram[:, 5] = 0
    gram[:, :, 5] = 0
    found = sparsegpt(weights, factorize(gram, 0.01), 0.5).values
    assert not found[0, :, 5].any() and int((found == 0).sum()) == 64 and found.isfinite().all()


def test_a_matrix_at_fault_is_pruned_by_magnitude_and_spoils_no_other() -> None:
    gram, weights = correlated_gram(3, 12, seed=9), random_weights(3, 4, 12, seed=10)
    gram[1, 0, 0] = torch.nan
    found = sparsegpt(weights, factorize(gram, 0.01), 0.25).values
    assert torch.equal(found[1], magnitude(weights[1:2], 0.25)[0])
    for b in (0, 2):
        alone = sparsegpt(weights[b : b + 1], factorize(gram[b : b + 1], 0.01), 0.25).values[0]
        assert torch.equal(found[b] == 0, alone == 0) and relative(found[b], alone) < 1e-12


@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
def test_updates_beat_masks_beat_blindness(sparsity: float | tuple[int, int]) -> None:
    gram = correlated_gram(2, 96, seed=11).float()
    weights = random_weights(2, 64, 96, seed=12).float()
    squares = gram.diagonal(dim1=-2, dim2=-1)
    error = [
        reconstruction_error(weights, new, gram).relative
        for new in (
            sparsegpt(weights, factorize(gram, 0.01), sparsity).values,
            wanda(weights, squares, sparsity),
            magnitude(weights, sparsity),
        )
    ]
    assert (error[0] < 0.5 * error[1]).all() and (error[1] < error[2]).all()


def test_what_cannot_be_is_refused() -> None:
    gram, weights = correlated_gram(1, 10, seed=13), random_weights(1, 2, 10, seed=14)
    with pytest.raises(ValueError, match="do not divide"):
        sparsegpt(weights, factorize(gram, 0.01), (2, 4))
    with pytest.raises(ValueError, match="no pattern"):
        sparsegpt(weights, factorize(gram, 0.01), (6, 5))
    with pytest.raises(ValueError, match="order"):
        sparsegpt(weights, factorize(gram, 0.01, act_order=True), 0.5)
    with pytest.raises(ValueError, match="stack"):
        sparsegpt(weights, factorize(gram, 0.01), 0.5, splits=(1, 2))
