"""Every merge method on every tiny architecture, through plan, run and verify; every shipped recipe
planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import pytest

from surgery.recipe.api import plan, run
from surgery.recipe.load import load_recipe, shipped_recipes
from surgery.recipe.table import OPERATORS
from surgery.recipe.verify import verify

Make = Callable[[Path, int], Path]
FAMILIES: dict[str, Make] = {
    "deepseek_v3": lambda folder, seed: factories.deepseek_v3(
        folder, seed, layers=2, experts=2, hidden=160, moe_intermediate=96
    ),
    "llama": factories.llama,
    "llama_tied": lambda folder, seed: factories.llama(folder, seed, tied=True),
    "qwen3_moe": factories.qwen3_moe,
    "gpt_oss_bf16": factories.gpt_oss_bf16,
    "gpt_oss_mxfp4": factories.gpt_oss_mxfp4,
    "llama4": factories.llama4_text,
}
TWO: dict[str, Any] = {"a": {"density": 0.5}, "b": {"density": 0.6}}
PARAMS: dict[str, dict[str, Any]] = {
    "arcee_fusion": {"base": "base", "models": {"a": {}}},
    "aoe": {"base": "base", "weights": {"a": 0.5}},
    "breadcrumbs": {"base": "base", "models": TWO},
    "dare_linear": {"base": "base", "models": TWO},
    "dare_ties": {"base": "base", "models": TWO, "rescale": "l1"},
    "della": {"base": "base", "models": TWO},
    "della_linear": {"base": "base", "models": TWO},
    "karcher": {"models": {"a": 1, "b": 2}},
    "linear": {"models": {"a": 0.4, "b": 0.6}},
    "model_stock": {"base": "base", "models": {"a": {}, "b": {}}},
    "nuslerp": {"base": "base", "models": {"a": 1, "b": 2}, "rows": True},
    "passthrough": {"slices": [{"model": "a", "layers": 0}, {"model": "b", "layers": 1}]},
    "sce": {"base": "base", "models": {"a": {}, "b": {}}, "topk": 0.5},
    "slerp": {"base": "base", "models": {"a": {}}, "t": [0.2, 0.8]},
    "task_arithmetic": {"base": "base", "models": {"a": 0.4, "b": 0.6}, "normalize": "norms"},
    "ties": {"base": "base", "models": TWO},
}


@pytest.fixture(scope="module", params=FAMILIES)
def parents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("matrix")
    make = FAMILIES[request.param]
    return {name: str(make(folder / name, seed)) for seed, name in enumerate(("base", "a", "b"), 1)}


def test_the_matrix_has_every_method() -> None:
    assert {f"merge.{name}" for name in PARAMS} == {op for op in OPERATORS if op.startswith("merge.")}


@pytest.mark.parametrize("method", PARAMS)
def test_plan_run_verify(method: str, parents: dict[str, str], tmp_path: Path) -> None:
    used = {name: parents[name] for name in ("base", "a", "b") if f"'{name}'" in str(PARAMS[method])}
    step = {"op": f"merge.{method}", **PARAMS[method]}
    recipe = {"parents": used, "steps": [step]}
    planned = plan(recipe, tmp_path / "out")
    result = run(recipe, tmp_path / "out")
    assert len(planned.checkpoint.tensors) > 10
    assert result.manifest["output"]["tensors"] == len(planned.checkpoint.tensors)
    checked = verify(tmp_path / "out", recompute=None, load=False)
    assert checked.ok, checked.checks


LLAMA = sorted(name for name in shipped_recipes() if name.startswith(("merge/", "branch-merge/")))


@pytest.mark.parametrize("name", LLAMA)
def test_shipped_recipes_plan(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(name)
    overrides = []
    for seed, parent in enumerate(loaded.recipe.parents):
        factories.llama(tmp_path / parent, seed)
        overrides.append(f"parents.{parent}={tmp_path / parent}")
    if name == "merge/stack":
        overrides += ["steps.0.slices.0.layers=0-1", "steps.0.slices.1.layers=1"]
    made = plan(name, tmp_path / "out", overrides=overrides)
    assert made.checkpoint.tensors
