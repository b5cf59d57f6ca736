"""`experts.drop`: where its list is looked for, and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from walk_models import Families

import surgery
from surgery.errors import CheckpointError, PlanError, RecipeError, UsageError

DOCUMENT = {
    "kind": "surgery-keep-list", "schema": 1, "n_group": 1, "topk_group": 1,
    "layers": {"0": [0, 3, 5], "1": [1, 2, 4]},
}  # fmt: skip


def recipe(folder: Path, keep_list: str) -> dict[str, object]:
    return {"parents": {"m": str(folder)}, "steps": [{"op": "experts.drop", "keep_list": keep_list}]}


def test_a_list_beside_the_recipe(tiny: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned and run from another folder, with a file name that is relative to the recipe."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "k.json").write_text(json.dumps(DOCUMENT))
    text = f"parents: {{m: {tiny('qwen3_moe')}}}\nsteps:\n  - op: experts.drop\n    keep_list: lists/k.json\n"
    (tmp_path / "r.yaml").write_text(text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    plan = surgery.plan(tmp_path / "r.yaml")
    assert plan.checkpoint.config["num_experts"] == 3 and plan.walks == ()
    result = surgery.run(tmp_path / "r.yaml", tmp_path / "out")
    assert surgery.open(result.folder).config["num_experts"] == 3


@pytest.mark.parametrize("how", ["missing", "uneven", "duplicate", "layers", "many", "words"])
def test_refused_before_anything_is_written(tiny: Families, tmp_path: Path, how: str) -> None:
    layers: dict[str, object] = {
        "uneven": {"0": [0, 3, 5], "1": [1, 2]},
        "duplicate": {"0": [0, 3, 3], "1": [1, 2, 4]},
        "layers": {"0": [0, 3, 5]},
        "many": {"0": [0, 3, 6], "1": [1, 2, 4]},
        "words": {"0": ["a"], "1": [1]},
    }.get(how, {})
    path = tmp_path / "k.json"
    if how != "missing":
        path.write_text(json.dumps(DOCUMENT | {"layers": layers}))
    before = sorted(tmp_path.iterdir())
    wanted = UsageError if how in ("missing", "words") else PlanError
    for action in (surgery.plan, lambda r: surgery.run(r, tmp_path / "out")):
        with pytest.raises(wanted) as caught:
            action(recipe(tiny("qwen3_moe"), str(path)))
        assert caught.value.message and "Traceback" not in caught.value.message
    assert sorted(tmp_path.iterdir()) == before


def test_a_dense_model_is_refused(tiny: Families, tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text(json.dumps(DOCUMENT))
    with pytest.raises(CheckpointError, match="no routed experts"):
        surgery.run(recipe(tiny("llama"), str(tmp_path / "k.json")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_step_without_a_list_is_no_recipe(tiny: Families) -> None:
    with pytest.raises(RecipeError, match="keep_list"):
        surgery.validate({"parents": {"m": "m"}, "steps": [{"op": "experts.drop"}]})
