"""ADMM against a plain transcription of its recipe, in float64 with the inputs' side first."""

from __future__ import annotations

import pytest
import torch
from brain_surgery import correlated_gram, first_smallest, random_weights, relative
from torch import Tensor

from surgery.operators.layerwise.hessian import factorize
from surgery.operators.layerwise.reconstruction import reconstruction_error
from surgery.operators.sparsify.admm import Pool, admm
from surgery.operators.sparsify.magnitude import magnitude
from surgery.operators.sparsify.masks import Sparsity
from surgery.operators.sparsify.sparsegpt import sparsegpt
from surgery.operators.sparsify.wanda import wanda


def kept(scores: Tensor, sparsity: Sparsity, part: float, pool: Pool) -> Tensor:
    """1 where a weight [outputs, inputs] stays, when `part` of the zeros are to be there."""
    rows, cols = scores.shape
    mask = torch.ones(rows * cols, dtype=torch.float64)
    flat = scores.flatten().tolist()
    if isinstance(sparsity, tuple):
        zeros, group = sparsity
        candidates = [
            start + i
            for start in range(0, rows * cols, group)
            for i in first_smallest(flat[start : start + group], zeros)
        ]
        candidates.sort(key=lambda place: (flat[place], place))
        mask[candidates[: round(rows * cols * part * zeros / group)]] = 0
    elif pool == "row":
        for r in range(rows):
            gone = first_smallest(scores[r].tolist(), round(cols * sparsity * part))
            mask[[r * cols + c for c in gone]] = 0
    else:
        mask[list(first_smallest(flat, round(rows * cols * sparsity * part)))] = 0
    return mask.view(rows, cols)


def recipe(weights: Tensor, gram: Tensor, sparsity: Sparsity, pool: Pool, gradual: bool) -> Tensor:
    nu = gram.diagonal().sqrt() + 1e-8
    g = gram / torch.outer(nu, nu)
    v = (weights * nu).T
    eye = torch.eye(len(g), dtype=g.dtype)
    g = g + 0.1 * g.diagonal().mean() * eye
    y, inverse = g @ v, torch.linalg.inv(g + eye)
    u = torch.zeros_like(v)
    for step in range(20):
        if step < 15:
            part = 1 - (1 - (step + 1) / 15) ** 3 if gradual else 1.0
            mask = kept((v + u).T.abs(), sparsity, part, pool).T
        z = (v + u) * mask
        u = u + v - z
        v = inverse @ (y + z - u)
    return ((v + u) * mask).T / nu


@pytest.mark.parametrize("gradual", [True, False])
@pytest.mark.parametrize(
    ("sparsity", "pool"), [(0.5, "matrix"), (0.7, "row"), ((2, 4), "matrix"), ((1, 3), "row")]
)
def test_it_is_the_recipe(sparsity: Sparsity, pool: Pool, gradual: bool) -> None:
    gram, weights = correlated_gram(2, 12, seed=1), random_weights(2, 7, 12, seed=2)
    found = admm(weights, gram, sparsity, pool=pool, gradual=gradual)
    for b in range(2):
        expected = recipe(weights[b], gram[b], sparsity, pool, gradual)
        assert torch.equal(found[b] == 0, expected == 0)
        assert relative(found[b], expected) < 1e-10


def test_stacked_matrices_have_pools_of_their_own() -> None:
    gram, weights = correlated_gram(1, 10, seed=3), random_weights(1, 8, 10, seed=4)
    weights[:, :3] *= 5
    found = admm(weights, gram, 0.5, splits=(3, 5))
    for rows in (slice(0, 3), slice(3, 8)):
        assert relative(found[:, rows], admm(weights[:, rows], gram, 0.5)) < 1e-10


@pytest.mark.parametrize(("zeros", "group"), [(2, 4), (3, 5)])
def test_patterns_hold_and_less_is_lost_than_by_sparsegpt(zeros: int, group: int) -> None:
    gram = correlated_gram(1, 80, seed=5).float()
    weights = random_weights(1, 40, 80, seed=6).float()
    found = admm(weights, gram, (zeros, group))
    assert ((found.view(40, -1, group) == 0).sum(-1) == zeros).all()
    swept = sparsegpt(weights, factorize(gram, 0.01), (zeros, group)).values
    masked = wanda(weights, gram.diagonal(dim1=1, dim2=2), (zeros, group))
    errors = [reconstruction_error(weights, new, gram).error for new in (found, swept, masked)]
    assert errors[0] < errors[1] < errors[2]


def test_matrices_at_fault_are_pruned_by_magnitude_alone() -> None:
    gram, weights = correlated_gram(3, 8, seed=7), random_weights(3, 4, 8, seed=8)
    gram[0] = 0
    gram[2, 1, 1] = torch.nan
    found = admm(weights, gram, 0.5)
    for b in (0, 2):
        expected = magnitude(weights[b : b + 1], 0.5)[0]
        assert torch.equal(found[b] == 0, expected == 0) and relative(found[b], expected) < 1e-12
    assert relative(found[1], admm(weights[1:2], gram[1:2], 0.5)[0]) < 1e-12


def test_a_mask_that_no_iteration_chooses_is_refused() -> None:
    gram, weights = correlated_gram(1, 4, seed=9), random_weights(1, 2, 4, seed=10)
    with pytest.raises(ValueError, match="mask"):
        admm(weights, gram, 0.5, iterations=3, mask_iterations=5)
