"""Wanda, magnitude and the pools of masks against loops."""

from __future__ import annotations

import pytest
import torch
from brain_surgery import first_smallest, random_weights

from surgery.codecs.column_sweep import smallest
from surgery.operators.sparsify.magnitude import magnitude
from surgery.operators.sparsify.masks import lowest
from surgery.operators.sparsify.wanda import wanda


@pytest.mark.parametrize("count", [0, 1, 4, 10, 11])
def test_the_lowest_are_exact_in_number_and_the_first_of_equals(count: int) -> None:
    scores = torch.randint(0, 4, (6, 11), generator=torch.Generator().manual_seed(count)).float()
    found = lowest(scores, count)
    for row, mask in zip(scores.tolist(), found.tolist(), strict=True):
        assert {i for i, gone in enumerate(mask) if gone} == first_smallest(row, count)
    assert torch.equal(found, smallest(scores, count))


@pytest.mark.parametrize("sparsity", [0.5, 0.37, (2, 4), (1, 6)])
def test_wanda_compares_within_rows(sparsity: float | tuple[int, int]) -> None:
    weights = random_weights(2, 5, 12, seed=1)
    squares = random_weights(2, 12, seed=2) ** 2
    found = wanda(weights, squares, sparsity)
    zeros, group = sparsity if isinstance(sparsity, tuple) else (round(12 * sparsity), 12)
    for b in range(2):
        for r in range(5):
            for start in range(0, 12, group):
                cols = range(start, start + group)
                scores = [abs(float(weights[b, r, c])) * float(squares[b, c]) ** 0.5 for c in cols]
                gone = first_smallest(scores, zeros)
                for i, c in enumerate(cols):
                    assert float(found[b, r, c]) == (0.0 if i in gone else float(weights[b, r, c]))


def test_wanda_without_inputs_is_magnitude_in_rows() -> None:
    weights = random_weights(3, 4, 8, seed=3)
    squares = torch.ones(3, 8, dtype=torch.float64)
    squares[0], squares[1, 2] = 0, torch.nan
    assert torch.equal(wanda(weights, squares, 0.5), wanda(weights, torch.ones_like(squares), 0.5))


def test_magnitude_compares_within_each_stacked_matrix() -> None:
    weights = random_weights(2, 7, 5, seed=4)
    weights[:, :3] *= 10
    found = magnitude(weights, 0.4, splits=(3, 4))
    for b in range(2):
        for rows in (range(3), range(3, 7)):
            flat = [(r, c) for r in rows for c in range(5)]
            gone = first_smallest([abs(float(weights[b, r, c])) for r, c in flat], round(0.4 * len(flat)))
            for i, (r, c) in enumerate(flat):
                assert float(found[b, r, c]) == (0.0 if i in gone else float(weights[b, r, c]))
    assert ((magnitude(weights[..., :4], (1, 2)).view(2, 7, 2, 2) == 0).sum(-1) == 1).all()
