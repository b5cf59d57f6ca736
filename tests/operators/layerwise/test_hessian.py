"""Factors against explicit inverses, and matrices that are none of the easy ones."""

from __future__ import annotations

import pytest
import torch
from brain_surgery import correlated_gram, damped, random_weights, relative

from surgery.operators.layerwise import hessian
from surgery.operators.layerwise.hessian import factorize, invert_lower
from surgery.operators.layerwise.reconstruction import matrices, reconstruction_error


@pytest.mark.parametrize("size", [1, 7, 128, 129, 300, 517])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_triangular_inverse_is_in_place_and_exact(size: int, transposed: bool) -> None:
    lower = torch.tril(random_weights(3, size, size, seed=size) / size**0.5)
    lower.diagonal(dim1=-2, dim2=-1).abs_().add_(1)
    place = lower.mT.clone(memory_format=torch.contiguous_format).mT if transposed else lower.clone()
    invert_lower(place)
    eye = torch.eye(size, dtype=torch.float64)
    assert (place @ lower - eye).abs().max() < 1e-10
    assert torch.equal(place, place.tril())


@pytest.mark.parametrize("size", [1, 5, 130, 260])
def test_factors_are_upper_and_square_to_the_inverse(size: int) -> None:
    gram = correlated_gram(3, size, seed=1)
    kept = gram.clone()
    found = factorize(gram, 0.01)
    assert torch.equal(gram, kept), "the Gram matrices are left as they are"
    for b in range(3):
        expected = torch.linalg.inv(damped(gram[b], 0.01))
        assert relative(found.upper[b].T @ found.upper[b], expected) < 1e-10
        assert torch.equal(found.upper[b], found.upper[b].triu())
    assert found.faults == [None] * 3 and found.damping == [0.01] * 3
    assert not found.dead.any() and found.order is None
    single = factorize(gram.float(), 0.01)
    assert single.upper.dtype == torch.float32 and relative(single.upper, found.upper) < 1e-4


def test_act_order_factorizes_the_reordered_matrix() -> None:
    gram = correlated_gram(2, 33, seed=2)
    found = factorize(gram, 0.1, act_order=True)
    assert found.order is not None
    for b in range(2):
        order = sorted(range(33), key=lambda c: -float(gram[b, c, c]))
        assert found.order[b].tolist() == order
        expected = torch.linalg.inv(damped(gram[b], 0.1)[order][:, order])
        assert relative(found.upper[b].T @ found.upper[b], expected) < 1e-10


def test_inputs_that_never_occur_neither_matter_nor_change_the_others() -> None:
    gram = correlated_gram(1, 20, seed=3)
    wide = torch.zeros(1, 23, 23, dtype=torch.float64)
    alive = [c for c in range(23) if c not in (0, 11, 22)]
    wide[0, torch.tensor(alive)[:, None], torch.tensor(alive)] = gram[0]
    found = factorize(wide, 0.01)
    assert [c for c in range(23) if found.dead[0, c]] == [0, 11, 22]
    assert relative(found.upper[0][alive][:, alive], factorize(gram, 0.01).upper[0]) < 1e-12
    assert found.upper.isfinite().all()


def test_a_matrix_that_cannot_be_factorized_raises_its_own_damping() -> None:
    gram = correlated_gram(4, 24, seed=4).float()
    # Eigenvalues down to −3 % of the mean: the damping of 0.001 and 0.01 fails, 0.1 does.
    basis = torch.linalg.qr(random_weights(24, 24, seed=5)).Q
    values = torch.linspace(1, 3, 24, dtype=torch.float64)
    values[0] = -0.03 * values.mean()
    gram[1] = (basis * values @ basis.T).float()
    values[0] = -2 * values.abs().mean()
    gram[3] = (basis * values @ basis.T).float()
    found = factorize(gram, 0.001)
    assert found.damping == pytest.approx([0.001, 0.1, 0.001, 0.0])
    assert found.faults == [None, None, None, "not positive definite"]
    assert torch.equal(found.upper[3], torch.eye(24))
    expected = torch.linalg.inv(damped(gram[1].double(), found.damping[1]))
    assert relative(found.upper[1].T @ found.upper[1], expected) < 1e-3
    alone = factorize(gram[::2], 0.001)
    assert relative(found.upper[::2], alone.upper) < 1e-6


def test_faults_are_named_and_do_not_poison_the_batch() -> None:
    gram = correlated_gram(5, 9, seed=6)
    gram[0, 3, 4] = torch.nan
    gram[1] = 0
    gram[3, 8, 8] = torch.inf
    found = factorize(gram, 0.01)
    assert found.faults == ["not finite", "no inputs", None, "not finite", None]
    for b in (0, 1, 3):
        assert torch.equal(found.upper[b], torch.eye(9, dtype=torch.float64))
    assert not found.dead.any()
    assert torch.equal(found.upper[2], factorize(gram[2:3], 0.01).upper[0])


def test_a_singular_matrix_needs_its_damping_and_no_damping_finds_one() -> None:
    few = correlated_gram(1, 40, seed=7, tokens=8).float()
    assert factorize(few, 0.01).faults == [None]
    found = factorize(few - 1e-3 * few.diagonal(dim1=1, dim2=2).mean() * torch.eye(40), 0.0)
    assert found.faults == [None] and 0 < found.damping[0] <= 0.01 + 1e-9


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = correlated_gram(7, 12, seed=8)
    gram[5, 0, 0] = -1e6
    whole = factorize(gram, 0.01, act_order=True)
    monkeypatch.setattr(hessian, "_CHUNK", 2 * 12 * 12)
    parts = factorize(gram, 0.01, act_order=True)
    assert torch.equal(whole.upper, parts.upper)
    assert whole.damping == parts.damping and whole.faults == parts.faults


def test_reconstruction_error_is_that_of_the_outputs() -> None:
    inputs = random_weights(2, 11, 60, seed=9)
    weights, new = random_weights(2, 9, 11, seed=10), random_weights(2, 9, 11, seed=11)
    found = reconstruction_error(weights, new, inputs @ inputs.mT, (2, 4, 3))
    for b in range(2):
        for s, rows in enumerate([slice(0, 2), slice(2, 6), slice(6, 9)]):
            lost = float((((weights - new)[b, rows] @ inputs[b]) ** 2).sum())
            size = float(((weights[b, rows] @ inputs[b]) ** 2).sum())
            assert float(found.error[b, s]) == pytest.approx(lost)
            assert float(found.relative[b, s]) == pytest.approx(lost / size)
    same = reconstruction_error(weights * 0, weights * 0, inputs @ inputs.mT)
    assert same.relative.tolist() == [[0.0], [0.0]]
    with pytest.raises(ValueError, match="do not stack"):
        matrices(9, (2, 4))
