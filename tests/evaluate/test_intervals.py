"""Intervals against published values and against the textbook formula."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from surgery.evaluate.intervals import Mean, Share, student_t, student_t_mass, wilson


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I: method 3 (score)
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_against_published_values(count: int, total: int, low: float, high: float) -> None:
    assert wilson(count, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert Share.of(0, 0).value == 0.0


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (30, 2.0423), (120, 1.9799), (1000, 1.9623)],
)
def test_student_t_against_the_table(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, abs=5e-5)


def test_the_expansion_meets_the_exact_quantile() -> None:
    assert student_t_mass(student_t(301), 301) == pytest.approx(0.95, abs=1e-10)
    assert student_t_mass(student_t(5000), 5000) == pytest.approx(0.95, abs=1e-10)


def test_mean_is_the_textbook_interval() -> None:
    values = [random.Random(1).gauss(3, 2) for _ in range(12)]
    found = Mean.of(values)
    reach = 2.200985 * statistics.stdev(values) / math.sqrt(12)
    assert found.value == pytest.approx(statistics.fmean(values))
    assert (found.low, found.high) == pytest.approx((found.value - reach, found.value + reach), rel=1e-6)
    assert found.count == 12


def test_sizes_weigh_the_mean_and_equal_sizes_leave_the_interval() -> None:
    sums = [3.0, 5.0, 10.0]
    assert Mean.of(sums, [1, 2, 4]).value == pytest.approx(18 / 7)
    plain = Mean.of([each / 5 for each in sums])
    weighed = Mean.of(sums, [5, 5, 5])
    assert [weighed.value, weighed.low, weighed.high] == pytest.approx([plain.value, plain.low, plain.high])


def test_one_observation_has_no_interval_and_none_has_no_mean() -> None:
    assert Mean.of([2.5]) == Mean(2.5, None, None, 1)
    with pytest.raises(ValueError, match="no mean"):
        Mean.of([])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    chance = random.Random(7)
    covered = 0
    for _ in range(1000):
        hits = sum(chance.random() < 0.3 for _ in range(40))
        low, high = wilson(hits, 40)
        covered += low <= 0.3 <= high
    assert 920 <= covered <= 980
