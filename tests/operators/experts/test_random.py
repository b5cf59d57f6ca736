"""Random experts: seeded by layer, spread evenly, groups respected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from folders import file_hashes, strict_manifest
from walk_models import Families

import surgery
from surgery.errors import RecipeError
from surgery.operators.experts.random import random_scores


def kept(folder: Path, out: Path, **params: Any) -> dict[str, list[int]]:
    surgery.run({"parents": {"m": str(folder)}, "steps": [{"op": "experts.random", **params}]}, out)
    found: dict[str, list[int]] = strict_manifest(out)["steps"][-1]["decision"]["layers"]
    return found


def test_a_seed_gives_one_draw(tiny: Families, tmp_path: Path) -> None:
    folder = tiny("deepseek_v3", n_routed_experts=32)
    lists = [kept(folder, tmp_path / str(n), keep=16, seed=seed) for n, seed in enumerate((1, 1, 2))]
    assert (
        lists[0] == lists[1]
        and file_hashes(tmp_path / "0")["model.safetensors"]
        == (file_hashes(tmp_path / "1")["model.safetensors"])
    )
    assert lists[0] != lists[2] and lists[0]["1"] != lists[0]["2"]


def test_groups_are_respected(tiny: Families, tmp_path: Path) -> None:
    folder = tiny("deepseek_v3", n_routed_experts=32, n_group=4, topk_group=2)
    for layer in kept(folder, tmp_path / "a", keep=16, seed=3, groups="equal_per_group").values():
        assert [sum(expert // 8 == group for expert in layer) for group in range(4)] == [4] * 4
    for layer in kept(folder, tmp_path / "b", keep=16, seed=3, groups="best_groups").values():
        assert sorted(sum(expert // 8 == group for expert in layer) for group in range(4)) == [0, 0, 8, 8]


def test_its_list_can_be_given_again(tiny: Families, tmp_path: Path) -> None:
    lists = kept(tiny("olmoe"), tmp_path / "a", keep=3, seed=8)
    step = {"op": "experts.drop", "keep_list": str(tmp_path / "a" / "surgery_keep.json")}
    surgery.run({"parents": {"m": str(tiny("olmoe"))}, "steps": [step]}, tmp_path / "b")
    assert strict_manifest(tmp_path / "b")["steps"][-1]["decision"]["layers"] == lists
    one, two = (file_hashes(tmp_path / name)["model.safetensors"] for name in ("a", "b"))
    assert one == two


def test_every_expert_is_as_likely() -> None:
    """Over many layers each of 16 experts is among the best 8 about half the time (5 σ)."""
    counts = [0] * 16
    for layer in range(2000):
        scores = random_scores(16, 7, layer)
        for expert in sorted(range(16), key=scores.__getitem__)[8:]:
            counts[expert] += 1
    assert all(abs(count - 1000) < 5 * (2000 * 0.25) ** 0.5 for count in counts)
    assert random_scores(4, 0, 1) != random_scores(4, 1, 0)


@pytest.mark.parametrize("seed", [-1, 1.5, "x"])
def test_seeds_that_are_none(seed: Any) -> None:
    with pytest.raises(RecipeError, match="seed"):
        surgery.validate(
            {"parents": {"m": "m"}, "steps": [{"op": "experts.random", "keep": 2, "seed": seed}]}
        )
