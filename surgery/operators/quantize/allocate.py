"""Bits per unit of a model: the least sum of errors that a number of bytes can buy.

Every unit takes one of its choices, of known error and size (a knapsack of multiple choice). Units are
joined one by one; of all that can be had so far, only what no smaller one beats is kept. Where choices have
few sizes, as layers of one shape do, that stays short and the result is exact. A longer list is thinned to
the best of `points` ranges of bytes: each choice still fits, and the last bytes may be spent a little worse.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

POINTS = 1 << 14


def allocate_bits(
    errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, *, points: int = POINTS
) -> list[int]:
    """The choice of each unit: the least Σ errors with Σ sizes ≤ budget. Raises ValueError where the
    smallest choices do not fit."""
    least = [min(each) for each in sizes]
    rest = sum(least)
    if rest > budget:
        raise ValueError(f"the smallest choices take {rest} bytes, more than {budget}")
    sums, costs = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for unit_errors, unit_sizes, smallest in zip(errors, sizes, least, strict=True):
        rest -= smallest
        count = len(unit_sizes)
        joined = (sums[:, None] + np.asarray(unit_sizes, np.int64)).ravel()
        cost = (costs[:, None] + np.asarray(unit_errors, np.float64)).ravel()
        order = np.lexsort((cost, joined))
        order = order[joined[order] + rest <= budget]
        kept = _thinned(joined, order[_falling(cost[order])], points)
        sums, costs = joined[kept], cost[kept]
        steps.append((kept // count, kept % count))
    place, chosen = len(sums) - 1, []
    for before, choices in reversed(steps):
        chosen.append(int(choices[place]))
        place = int(before[place])
    return chosen[::-1]


def _falling(costs: np.ndarray) -> np.ndarray:
    """Places whose cost is below all before them."""
    best = np.minimum.accumulate(costs)
    return np.flatnonzero(np.concatenate(([True], costs[1:] < best[:-1])))


def _thinned(sums: np.ndarray, kept: np.ndarray, points: int) -> np.ndarray:
    """Of places by rising size and falling cost, the first, and the last in each of `points` ranges."""
    if len(kept) <= points:
        return kept
    found = sums[kept]
    ranges = (found - found[0]) * points // (found[-1] - found[0] + 1)
    last = np.flatnonzero(np.append(ranges[1:] != ranges[:-1], True))
    thinned: np.ndarray = kept[np.unique(np.append(0, last))]
    return thinned
