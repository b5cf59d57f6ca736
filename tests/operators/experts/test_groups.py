"""Group strategies against a brute force over all sets that they may keep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from surgery.errors import PlanError
from surgery.operators.experts.groups import Groups, Strategy, choose, groups_after

STRATEGIES: tuple[Strategy, ...] = ("ungrouped", "equal_per_group", "regrouped", "best_groups")


def allowed(num: int, keep: int, groups: int, strategy: Strategy) -> Iterator[tuple[int, ...]]:
    """Every set that the strategy may keep, by its definition."""
    size = num // groups
    for kept in itertools.combinations(range(num), keep):
        counts = [sum(expert // size == group for expert in kept) for group in range(groups)]
        if strategy == "equal_per_group" and len(set(counts)) > 1:
            continue
        if strategy == "best_groups" and any(count not in (0, size) for count in counts):
            continue
        yield kept


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("num", "groups", "keep"), [(8, 2, 4), (9, 3, 6), (12, 3, 8), (12, 4, 6), (8, 1, 3)])
def test_the_best_of_all_sets(num: int, groups: int, keep: int, strategy: Strategy) -> None:
    generator = np.random.default_rng([num, groups, keep])
    for _ in range(5):
        scores = generator.standard_normal(num).tolist()
        sets = list(allowed(num, keep, groups, strategy))
        if not sets:
            continue
        best = max(sets, key=lambda kept: sum(scores[expert] for expert in kept))
        assert choose(scores, keep, Groups(groups, 1), strategy) == best


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_of_equal_scores_the_first_stay(strategy: Strategy) -> None:
    kept = choose([1.0] * 8, 4, Groups(2, 1), strategy)
    assert kept == ((0, 1, 4, 5) if strategy == "equal_per_group" else (0, 1, 2, 3))
    assert choose([0.0, 1.0, 1.0, 1.0], 2, Groups(), "ungrouped") == (1, 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_token_always_finds_its_experts(strategy: Strategy) -> None:
    """For every count: refused, or groups of one size of which those a token chooses hold enough."""
    fine = 0
    for groups, chosen, size, top_k in itertools.product((1, 2, 4), (1, 2), (2, 3, 4), (1, 2, 3)):
        num = groups * size
        if chosen > groups or chosen * size < top_k:
            continue
        for keep in range(1, num):
            try:
                after = groups_after(Groups(groups, chosen), num, keep, top_k, strategy)
            except PlanError:
                if groups == 1 or strategy == "ungrouped":
                    assert keep < top_k  # nothing else speaks against it
                continue
            fine += 1
            assert keep % after.count == 0 and after.chosen <= after.count
            assert after.chosen * (keep // after.count) >= top_k
            if after.count > 1:
                assert keep // after.count >= 2  # the two best of a group make its score
            kept = choose([0.5] * num, keep, Groups(groups, chosen), strategy)
            assert len(kept) == keep == len(set(kept)) and set(kept) <= set(range(num))
    assert fine > 30


def test_refusals_say_what_to_do() -> None:
    v3 = Groups(8, 4)
    with pytest.raises(PlanError, match="fewer than the 8") as caught:
        groups_after(v3, 256, 7, 8, "ungrouped")
    assert caught.value.hint
    with pytest.raises(PlanError, match="no multiple of 32") as caught:
        groups_after(v3, 256, 130, 8, "best_groups")
    assert "128" in caught.value.hint
    for strategy in ("equal_per_group", "regrouped"):
        with pytest.raises(PlanError, match="8 equal groups"):
            groups_after(v3, 256, 132, 8, strategy)
        with pytest.raises(PlanError, match="8 equal groups"):
            groups_after(v3, 256, 8, 8, strategy)
    with pytest.raises(PlanError, match="a token 8 experts"):
        groups_after(v3, 256, 16, 9, "equal_per_group")
    assert groups_after(v3, 256, 128, 8, "best_groups") == Groups(4, 4)
    assert groups_after(v3, 256, 64, 8, "best_groups") == Groups(2, 2)
    assert groups_after(v3, 256, 128, 8, "equal_per_group") == v3
    assert groups_after(v3, 256, 128, 8, "ungrouped") == Groups()
