"""Which experts stay where a router chooses among groups of experts first (DeepSeek-V2, V3).

Such a router cuts its experts into `n_group` groups of equal size, by number; a token chooses among those in
its `topk_group` best groups. Engines cut the pruned checkpoint the same way, so what is left must again be
groups of equal size:

    ungrouped         the best experts of the layer; no groups any more (n_group = topk_group = 1)
    equal_per_group   the same number of each group, the best of it; n_group and topk_group stay
    regrouped         the best experts of the layer, cut anew into n_group groups in their order
    best_groups       whole groups, those whose scores sum highest; n_group shrinks, topk_group at most to it

Keeping n_group with uneven groups would mix experts of different groups and is not offered. Each of these
gives a checkpoint that engines compute as it says; docs/experts.md has what each cost in quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from surgery.errors import PlanError

Strategy = Literal["ungrouped", "equal_per_group", "regrouped", "best_groups"]
LEAST_GROUP = 2
"""Experts of a group at least: DeepSeek-V3 scores a group by its two best experts."""


@dataclass(frozen=True)
class Groups:
    """A router's groups; 1 and 1 is no limit."""

    count: int = 1
    chosen: int = 1

    @property
    def limited(self) -> bool:
        return self.count > 1


def groups_after(groups: Groups, num_experts: int, keep: int, top_k: int, strategy: Strategy) -> Groups:
    """The groups of a layer that keeps `keep` of `num_experts`. Raises PlanError where the strategy cannot
    keep that many, or where a token could not find `top_k` experts."""
    if keep < top_k:
        raise PlanError(
            f"{keep} experts are fewer than the {top_k} that every token chooses", hint="keep more of them"
        )
    if not groups.limited or strategy == "ungrouped":
        return Groups()
    size = num_experts // groups.count
    if strategy == "best_groups":
        if keep % size:
            raise PlanError(
                f"best_groups keeps whole groups of {size} experts, and {keep} is no multiple of {size}",
                hint=f"keep {max(size, keep // size * size)}, or use another strategy",
            )
        after = Groups(keep // size, min(groups.chosen, keep // size))
    else:
        if keep % groups.count or keep // groups.count < LEAST_GROUP:
            raise PlanError(
                f"{keep} experts do not make {groups.count} equal groups of {LEAST_GROUP} or more",
                hint=f"keep a multiple of {groups.count}, or use groups: ungrouped",
            )
        after = groups
    reachable = after.chosen * (keep // after.count)
    if reachable < top_k:
        raise PlanError(
            f"{strategy} leaves a token {reachable} experts in {after.chosen} of {after.count} groups, "
            f"and it chooses {top_k}",
            hint="keep more experts, or use groups: ungrouped",
        )
    return after


def choose(scores: Sequence[float], keep: int, groups: Groups, strategy: Strategy) -> tuple[int, ...]:
    """The numbers of the experts that stay, in order. Higher scores stay; of equal ones the first."""
    num_experts = len(scores)
    if not groups.limited or strategy in ("ungrouped", "regrouped"):
        return _best(range(num_experts), scores, keep)
    size = num_experts // groups.count
    members = [range(start, start + size) for start in range(0, num_experts, size)]
    if strategy == "equal_per_group":
        kept = (expert for group in members for expert in _best(group, scores, keep // groups.count))
        return tuple(sorted(kept))
    sums = [sum(scores[expert] for expert in group) for group in members]
    best = _best(range(groups.count), sums, keep // size)
    return tuple(expert for group in best for expert in members[group])


def _best(candidates: Sequence[int], scores: Sequence[float], count: int) -> tuple[int, ...]:
    ranked = sorted(candidates, key=lambda each: (-scores[each], each))
    return tuple(sorted(ranked[:count]))
