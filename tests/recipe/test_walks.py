"""Walks of a recipe: resumed after any kill to the same bytes, refused for anything else, cleaned up."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import change_shards, check_written, file_hashes, strict_manifest
from walk_models import DEMOS, Families, demos
from walk_runs import CONTEXT, kill, layers_walked, same

import surgery
from surgery.errors import PlanError, SurgeryError
from surgery.operators import together
from surgery.operators.protocol import RunContext
from surgery.recipe.verify import verify
from surgery.recipe.walks import walk_folder, walk_place


def recipe(folder: Path, data: Path | str, op: str = "experts.easy_ep", **params: Any) -> dict[str, Any]:
    step = {"op": op, "keep": 0.5, "calibration": str(data), **params}
    return {"parents": {"model": str(folder)}, "steps": [step]}


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("propagate", ["original", "changed"])
def test_resumed_after_any_layer(tiny: Families, tmp_path: Path, at: int, propagate: str) -> None:
    """Three layers: killed in front of each, and behind the last."""
    document = recipe(tiny("deepseek_v3"), demos(tmp_path / "d.jsonl"), propagate=propagate)
    surgery.run(document, tmp_path / "whole", context=CONTEXT, threads=1)
    out = tmp_path / "out"
    kill(document, out, "walk", at)
    assert walk_folder(out).is_dir()
    assert layers_walked(document, out) == 3 - (at - 1)
    same(out, tmp_path / "whole")
    check_written(out, surgery.open(out).tensors)
    assert not walk_folder(out).exists()


def test_killed_twice_and_with_hidden_states_on_disk(
    tiny: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = recipe(tiny("glm4_moe"), demos(tmp_path / "d.jsonl"))
    surgery.run(document, tmp_path / "whole", context=CONTEXT, threads=1)
    monkeypatch.setattr(together, "host_share", lambda memory: 0)
    monkeypatch.setattr("surgery.calibrate.walk.expert_share", lambda memory: 0)
    out = tmp_path / "out"
    kill(document, out, "walk", 2)
    assert list(walk_folder(out).glob("step-00/hidden-*.bin"))
    kill(document, out, "walk", 2)
    assert layers_walked(document, out) == 1
    same(out, tmp_path / "whole")


def test_killed_between_walk_and_output(tiny: Families, tmp_path: Path) -> None:
    """The decision is kept, so that nothing is walked again; snapshots are gone by then."""
    document = recipe(tiny("qwen3_moe"), demos(tmp_path / "d.jsonl"))
    surgery.run(document, tmp_path / "whole", context=CONTEXT, threads=1)
    out = tmp_path / "out"
    stages: list[str] = []
    surgery.run(
        document, tmp_path / "look", context=CONTEXT, progress=lambda s, *_: stages.append(s), threads=1
    )
    stage = next(each for each in stages if each != "walk")
    kill(document, out, stage, 1)
    assert [path.name for path in (walk_folder(out) / "step-00").iterdir()] == ["decision.json"]
    assert layers_walked(document, out) == 0
    same(out, tmp_path / "whole")
    assert not walk_folder(out).exists()


@pytest.mark.parametrize("at", ["walk", "output"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keep": 2}, "keep"),
        ({"op": "experts.reap"}, "op|easy_ep"),
        ({"groups": "regrouped"}, "groups"),
        ({"propagate": "changed"}, "propagate"),
        ({"calibration": {"num_samples": 2}}, "calibration|num_samples"),
    ],
)
def test_another_step_is_refused(
    tiny: Families, tmp_path: Path, change: dict[str, Any], named: str, at: str
) -> None:
    demos(tmp_path / "d.jsonl")
    document = recipe(tiny("deepseek_v3"), tmp_path / "d.jsonl")
    out = tmp_path / "out"
    kill(document, out, *(("walk", 2) if at == "walk" else ("walk", 4)))
    if "calibration" in change:
        change = {"calibration": {"files": str(tmp_path / "d.jsonl"), **change["calibration"]}}
    other = {**document, "steps": [{**document["steps"][0], **change}]}
    with pytest.raises(PlanError, match=named) as caught:
        surgery.run(other, out, context=CONTEXT, threads=1)
    assert "--fresh" in caught.value.hint and not out.exists()
    assert layers_walked(other, out, fresh=True) == 3
    surgery.run(other, tmp_path / "whole", context=CONTEXT, threads=1)
    same(out, tmp_path / "whole")


@pytest.mark.parametrize("what", ["calibration", "dtype", "weights"])
def test_other_data_is_refused(tiny: Families, tmp_path: Path, what: str) -> None:
    """The same words of the recipe, but not the same walk."""
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    document = recipe(folder, demos(tmp_path / "d.jsonl"))
    out = tmp_path / "out"
    kill(document, out, "walk", 2)
    context = CONTEXT
    if what == "calibration":
        demos(tmp_path / "d.jsonl", (*DEMOS[:3], "something else"))
    elif what == "dtype":
        context = replace(CONTEXT, dtype="bfloat16")
    else:
        change_shards(folder, lambda tensors: {name: each + 1 for name, each in tensors.items()})
    named = {"calibration": "calibration", "dtype": "dtype", "weights": "model|files"}[what]
    with pytest.raises(PlanError, match=named) as caught:
        surgery.run(document, out, context=context, threads=1)
    assert "--fresh" in caught.value.hint and not out.exists()


@pytest.mark.parametrize("what", ["calibration", "dtype", "weights"])
def test_a_decision_from_other_data_is_refused(tiny: Families, tmp_path: Path, what: str) -> None:
    """Killed between walk and output, then the data changed under the same names."""
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    document = recipe(folder, demos(tmp_path / "d.jsonl"))
    out = tmp_path / "out"
    stages: list[str] = []
    surgery.run(
        document, tmp_path / "look", context=CONTEXT, progress=lambda s, *_: stages.append(s), threads=1
    )
    kill(document, out, next(each for each in stages if each != "walk"), 1)
    context = CONTEXT
    if what == "calibration":
        demos(tmp_path / "d.jsonl", (*DEMOS[:3], "something else"))
    elif what == "dtype":
        context = replace(CONTEXT, dtype="bfloat16")
    else:
        change_shards(folder, lambda tensors: {name: each + 1 for name, each in tensors.items()})
    with pytest.raises(PlanError) as caught:
        surgery.run(document, out, context=context, threads=1)
    assert "--fresh" in caught.value.hint and not out.exists()


def test_a_foreign_folder_is_refused(tiny: Families, tmp_path: Path) -> None:
    document = recipe(tiny("qwen3_moe"), demos(tmp_path / "d.jsonl"))
    place = walk_folder(tmp_path / "out")
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(PlanError, match="not made by surgery"):
            surgery.run(document, tmp_path / "out", fresh=fresh)
    assert [path.name for path in place.iterdir()] == ["thesis.tex"]
    (place / "thesis.tex").unlink()
    surgery.run(document, tmp_path / "out")
    assert not place.exists()


def test_a_file_in_the_way(tiny: Families, tmp_path: Path) -> None:
    document = recipe(tiny("qwen3_moe"), demos(tmp_path / "d.jsonl"))
    walk_folder(tmp_path / "out").write_text("mine")
    with pytest.raises(PlanError):
        surgery.run(document, tmp_path / "out")
    assert walk_folder(tmp_path / "out").read_text() == "mine" and not (tmp_path / "out").exists()


def test_another_process_holds_the_folder(tiny: Families, tmp_path: Path) -> None:
    document = recipe(tiny("qwen3_moe"), demos(tmp_path / "d.jsonl"))
    with walk_place(tmp_path / "out", [], fresh=False), pytest.raises(PlanError, match="another process"):
        surgery.run(document, tmp_path / "out")
    surgery.run(document, tmp_path / "out")


def test_a_finished_output_is_not_walked_over(tiny: Families, tmp_path: Path) -> None:
    document = recipe(tiny("qwen3_moe"), demos(tmp_path / "d.jsonl"))
    surgery.run(document, tmp_path / "out")
    before = file_hashes(tmp_path / "out")
    told: list[str] = []
    with pytest.raises(PlanError):
        surgery.run(document, tmp_path / "out", progress=lambda stage, *_: told.append(stage))
    assert not told and file_hashes(tmp_path / "out") == before
    surgery.run(
        {**document, "steps": [{**document["steps"][0], "keep": 2}]}, tmp_path / "out", overwrite=True
    )
    assert surgery.open(tmp_path / "out").config["num_experts"] == 2


def test_merged_and_pruned_in_one_pass(parents: dict[str, Path], tmp_path: Path) -> None:
    """The same weights as merging to disk first and pruning that."""
    data = demos(tmp_path / "d.jsonl")
    merge = {"op": "merge.aoe", "base": "base", "weights": {"reasoner": 0.5}}
    both = {name: str(parents[name]) for name in ("base", "reasoner")}
    prune = {"op": "experts.easy_ep", "keep": 0.5, "calibration": str(data)}
    surgery.run({"parents": both, "steps": [merge]}, tmp_path / "merged")
    surgery.run({"parents": {"m": str(tmp_path / "merged")}, "steps": [prune]}, tmp_path / "two")
    surgery.run({"parents": both, "steps": [merge, prune]}, tmp_path / "one")
    check_written(tmp_path / "one", surgery.open(tmp_path / "one").tensors)
    one, two = (
        {k: v for k, v in file_hashes(tmp_path / n).items() if k.endswith(".safetensors")}
        for n in ("one", "two")
    )
    assert one == two and one
    lists = [strict_manifest(tmp_path / n)["steps"][-1]["decision"]["layers"] for n in ("one", "two")]
    assert lists[0] == lists[1]
    assert verify(tmp_path / "one", recompute=None).ok


def test_two_walks_in_a_recipe_resume_apart(tiny: Families, tmp_path: Path) -> None:
    """Half, then half of that; killed in the second walk, the first is not walked again."""
    data = demos(tmp_path / "d.jsonl")
    document = recipe(tiny("olmoe", num_experts=12), data)
    document["steps"].append({**document["steps"][0], "op": "experts.frequency"})
    surgery.run(document, tmp_path / "whole", context=CONTEXT, threads=1)
    assert surgery.open(tmp_path / "whole").config["num_experts"] == 3
    kill(document, tmp_path / "out", "walk", 3 + 2)
    assert layers_walked(document, tmp_path / "out") == 1
    same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("memory", [256 << 20, 8 << 30])
def test_budgets_give_the_same_bytes(tiny: Families, tmp_path: Path, memory: int) -> None:
    document = recipe(tiny("mixtral"), demos(tmp_path / "d.jsonl"))
    surgery.run(document, tmp_path / "a", threads=1)
    surgery.run(document, tmp_path / "b", threads=1, memory_bytes=memory)
    same(tmp_path / "a", tmp_path / "b")


def test_nan_stops_the_walk(tiny: Families, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("mixtral"), tmp_path / "model"))

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in tensors:
            if "layers.0.block_sparse_moe.experts" in name and "w2" in name:
                tensors[name][3, 5] = float("nan")
        return tensors

    change_shards(folder, spoil)
    with pytest.raises(SurgeryError, match=r"layer 0.*NaN"):
        surgery.run(recipe(folder, demos(tmp_path / "d.jsonl")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_has_the_walk_and_reads_no_weights(tiny: Families, tmp_path: Path) -> None:
    """Bodies of zeros (sparse): a plan says what the walk needs all the same."""
    folder = Path(shutil.copytree(tiny("deepseek_v3"), tmp_path / "model"))
    path = folder / "model.safetensors"
    size = path.stat().st_size
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(raw[:header])
    with open(path, "r+b") as file:
        file.truncate(size)
    data = demos(tmp_path / "d.jsonl")
    full, sparse = (surgery.plan(recipe(each, data)).as_dict() for each in (tiny("deepseek_v3"), folder))
    assert full["passes"] == sparse["passes"] and full["output"] == sparse["output"]
    walk, write = sparse["passes"]
    assert walk["walk"] is True and write["walk"] is False
    assert walk["steps"] == ["experts.easy_ep"] and walk["tokens"] >= walk["calibration"]["tokens"] > 0
    for key in ("device_bytes", "host_bytes", "disk_bytes", "bytes_read", "dtype", "device", "parts"):
        assert walk[key], key
    assert json.loads(json.dumps(sparse)) == sparse
    assert sparse["disk"]["needed"] >= walk["disk_bytes"]


def test_a_plan_for_a_gpu_needs_none(tiny: Families, tmp_path: Path) -> None:
    document = recipe(tiny("mixtral"), demos(tmp_path / "d.jsonl"))
    (walk,) = surgery.plan(document, context=RunContext(device="cuda")).walks
    assert (walk["device"], walk["dtype"]) == ("cuda", "bfloat16")
    (walk,) = surgery.plan(document, context=RunContext(dtype="bfloat16")).walks
    assert (walk["device"], walk["dtype"]) == ("cpu", "bfloat16")


def test_a_walk_that_does_not_fit_is_refused(
    tiny: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = recipe(tiny("mixtral"), demos(tmp_path / "d.jsonl"))
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else 4096)
    with pytest.raises(PlanError, match="this machine has"):
        surgery.run(document, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl"]
