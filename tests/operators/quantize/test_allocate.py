"""Bits under a budget against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from surgery.operators.quantize.allocate import allocate_bits


def best(errors: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    """The least sum of errors of all choices that fit."""
    found = [
        sum(errors[unit][index] for unit, index in enumerate(choice))
        for choice in product(*(range(len(each)) for each in sizes))
        if sum(sizes[unit][index] for unit, index in enumerate(choice)) <= budget
    ]
    return min(found)


def total(values: list[list[float]] | list[list[int]], choice: list[int]) -> float:
    return sum(each[index] for each, index in zip(values, choice, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_nothing_that_fits_is_better(seed: int) -> None:
    """Odd sizes, errors that need not fall with bytes, every kind of budget."""
    generator = np.random.default_rng(seed)
    units = int(generator.integers(1, 7))
    sizes = [generator.integers(1, 60, generator.integers(1, 5)).tolist() for _ in range(units)]
    errors = [generator.exponential(1.0, len(each)).tolist() for each in sizes]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for budget in {least, least + 1, (least + most) // 2, most - 1, most, most + 7}:
        if budget < least:
            continue
        choice = allocate_bits(errors, sizes, budget)
        assert total(sizes, choice) <= budget
        assert total(errors, choice) == pytest.approx(best(errors, sizes, budget))


def test_layers_of_one_shape_are_solved_exactly_however_many() -> None:
    """Errors of the form c · 4^-b: the bits that each c deserves follow from the slopes of its hull."""
    generator = np.random.default_rng(7)
    scale = generator.lognormal(0, 1.5, 80)
    bits = np.array([2, 3, 4, 6])
    errors = (scale[:, None] * 4.0**-bits).tolist()
    sizes = [(bits * 100).tolist()] * 80
    budget = 80 * 350
    choice = allocate_bits(errors, sizes, budget)
    steps = sorted(
        ((errors[u][i] - errors[u][i + 1]) / (sizes[u][i + 1] - sizes[u][i]), u, i)
        for u in range(80) for i in range(3)
    )[::-1]  # fmt: skip
    by_slope, spent = [0] * 80, 80 * 200
    for _, u, i in steps:
        if spent + sizes[u][i + 1] - sizes[u][i] > budget:
            break
        by_slope[u], spent = i + 1, spent + sizes[u][i + 1] - sizes[u][i]
    assert total(sizes, choice) <= budget
    assert total(errors, choice) <= total(errors, by_slope) + 1e-12
    # Lagrange: no choice can be below the hull's error at the budget.
    slope = next(s for s, u, i in steps if by_slope[u] == i)
    bound = sum(min(e + slope * s for e, s in zip(errors[u], sizes[u], strict=True)) for u in range(80))
    assert total(errors, choice) >= bound - slope * budget - 1e-12
    assert total(errors, choice) <= (bound - slope * budget) * 1.01


def test_a_thinned_list_fits_and_is_nearly_as_good() -> None:
    generator = np.random.default_rng(3)
    sizes = [np.sort(generator.integers(1000, 9000, 4)).tolist() for _ in range(30)]
    errors = [np.sort(generator.exponential(1.0, 4))[::-1].tolist() for _ in range(30)]
    budget = 30 * 4000
    exact = allocate_bits(errors, sizes, budget, points=1 << 20)
    for points in (64, 512):
        choice = allocate_bits(errors, sizes, budget, points=points)
        assert total(sizes, choice) <= budget
        assert total(errors, exact) <= total(errors, choice) < 1.2 * total(errors, exact)
    assert total(sizes, allocate_bits(errors, sizes, sum(map(min, sizes)), points=2)) == sum(map(min, sizes))


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(ValueError, match="take 5 bytes, more than 4"):
        allocate_bits([[1.0, 0.5], [1.0]], [[2, 9], [3]], 4)
    assert allocate_bits([], [], 0) == []
