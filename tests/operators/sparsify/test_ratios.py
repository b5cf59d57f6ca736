"""Sparsities of layers against loops over numbers."""

from __future__ import annotations

import pytest
import torch
from brain_surgery import correlated_gram, random_weights

from surgery.operators.layerwise.reconstruction import reconstruction_error
from surgery.operators.sparsify.ratios import half_error, lsa, outlier_share, owl


def test_owl_gives_layers_with_outliers_fewer_zeros() -> None:
    shares = [0.01, 0.05, 0.02, 0.03]
    found = owl(shares, 0.7, beta=0.1)
    d = [(share - 0.01) / 0.04 * 0.2 for share in shares]
    assert found == pytest.approx([0.7 + sum(d) / 4 - each for each in d])
    assert sum(found) / 4 == pytest.approx(0.7) and found[1] == min(found)


def test_sizes_weigh_the_mean() -> None:
    found = lsa([3.0, 1.0, 2.0], 0.6, beta=0.05, sizes=(5, 1, 2))
    assert (5 * found[0] + found[1] + 2 * found[2]) / 8 == pytest.approx(0.6)
    assert found[0] - found[1] == pytest.approx(0.1) and found[2] - found[1] == pytest.approx(0.05)


def test_layers_that_are_alike_get_the_mean_and_no_layer_leaves_the_range() -> None:
    assert owl([0.2, 0.2], 0.5) == [0.5, 0.5]
    with pytest.raises(ValueError, match="sparsity"):
        owl([0.1, 0.2], 0.05, beta=0.2)


def test_outliers_are_counted_over_all_matrices_of_a_layer() -> None:
    matrices = [(random_weights(n, 6, seed=n) ** 3, random_weights(6, seed=9) ** 2) for n in (3, 5)]
    scores = [
        abs(float(weights[r, c])) * float(squares[c]) ** 0.5
        for weights, squares in matrices
        for r in range(len(weights))
        for c in range(6)
    ]
    bound = 2.5 * sum(scores) / len(scores)
    expected = sum(score > bound for score in scores) / len(scores)
    assert 0 < expected < 1 and outlier_share(matrices, multiple=2.5) == pytest.approx(expected)


@pytest.mark.parametrize(("cols", "block"), [(12, 12), (13, 5), (16, 128)])
def test_half_error_is_what_the_greedy_choice_loses(cols: int, block: int) -> None:
    gram, weights = correlated_gram(1, cols, seed=cols)[0], random_weights(4, cols, seed=1)
    pruned = weights.clone()
    for r in range(4):
        gone: list[int] = []
        for start in range(0, cols, block):
            inside = range(start, min(start + block, cols))
            for _ in range(len(inside) // 2):
                w = weights[r]

                def added(c: int, w: torch.Tensor = w, gone: list[int] = gone) -> float:
                    cross = sum(float(w[c] * w[p] * gram[c, p]) for p in gone)
                    return float(w[c] ** 2 * gram[c, c]) + 2 * cross

                gone.append(min((c for c in inside if c not in gone), key=added))
        pruned[r, gone] = 0
    lost = float(reconstruction_error(weights[None], pruned[None], gram[None]).error)
    kept = weights.clone()
    assert half_error(weights, gram, block_size=block) == pytest.approx(lost)
    assert torch.equal(weights, kept)
