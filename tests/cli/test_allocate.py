"""`surgery allocate` on the command line: what it writes, and what that makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tokenizer
from walk_models import Families, demos
from walk_runs import CONTEXT, Killed, killer

import surgery
from surgery.cli.app import main
from surgery.errors import PlanError, RecipeError, SurgeryError, UsageError
from surgery.recipe.allocate import allocate
from surgery.recipe.bits import open_task
from surgery.recipe.load import load_recipe
from surgery.recipe.run import plan_recipe
from surgery.recipe.walks import walk_folder

SCHEMES = "int2-g16,int3-g16,int4-g16,int8-g16"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return demos(tmp_path / "d.jsonl", repeat=2)


def ask(model: Path, data: Path, out: Path, budget: str, *more: str, schemes: str = SCHEMES) -> int:
    return main([
        "allocate", str(model), "--calibration", str(data), "--budget", budget, "--schemes", schemes,
        "-o", str(out), *more,
    ])  # fmt: skip


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_recipe_makes_a_model_of_the_bytes_that_were_said(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    folder = tiny("deepseek_v3")
    assert ask(folder, data, recipe, "4.3bpw", "--json", "--set", "damping=0.05") == 0
    told = document(capsys)
    assert not walk_folder(recipe).exists()
    text = recipe.read_text()
    assert "damping: 0.05" in text and "under a budget of 4.3bpw" in text
    surgery.run(recipe, tmp_path / "out", context=CONTEXT, threads=1)
    child = surgery.open(tmp_path / "out")
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert told["output_bytes"] - 256 <= files <= told["output_bytes"]
    packed = [ref for ref in child.tensors.values() if ref.codec.name.startswith("packed")]
    assert told["bytes"] == sum(ref.nbytes for ref in packed)
    assert told["bpw"] == pytest.approx(8 * told["bytes"] / sum(ref.numel for ref in packed))
    assert 4.1 < told["bpw"] <= 4.3
    assert {ref.info.role for ref in packed} == {"attention", "dense_mlp", "shared_expert", "routed_expert"}
    chosen = {(unit["layer"], unit["role"]): unit["scheme"] for unit in told["units"]}
    assert len(chosen) == 2 + 3 + 3 and len(set(chosen.values())) > 1
    for ref in packed:
        assert ref.codec.name == f"packed-{chosen[ref.info.layer, ref.info.role]}", ref.name
    assert child.quantization["quant_method"] == "compressed-tensors"
    uniform = told["uniform"]["int3-g16"]
    assert told["uniform"]["int2-g16"]["error"] > uniform["error"] > told["error"]


def test_bytes_of_all_files(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheme that is settled and matrices that stay: all of it within the budget."""
    folder, recipe = tiny("deepseek_v3"), tmp_path / "recipe.yaml"
    given = ("--protect", "layers:0", "--set", "schemes.shared_expert=int8-g16", "--json")
    assert ask(folder, data, recipe, "200kB", *given) == 5
    assert "between" in document(capsys)["error"]["message"]
    ends = open_task(folder, str(data), SCHEMES.split(","), ("layers:0",), given[3:4]).ends()
    budget = (ends["least_output_bytes"] + ends["most_output_bytes"]) // 2
    assert ask(folder, data, recipe, str(budget), *given) == 0
    told = document(capsys)
    assert {(unit["layer"], unit["role"]) for unit in told["units"]} == {
        (layer, role) for layer in (1, 2) for role in ("attention", "routed_expert")
    }
    schemes = list(load_recipe(recipe).recipe.steps[0].operator.schemes.items())  # type: ignore[attr-defined]
    assert schemes[:2] == [("layers:0", "keep"), ("shared_expert", "int8-g16")]
    surgery.run(recipe, tmp_path / "out", context=CONTEXT, threads=1)
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0.98 * budget < files <= told["output_bytes"] <= budget
    kept = surgery.open(tmp_path / "out").tensors["model.layers.0.mlp.up_proj.weight"]
    assert kept.codec.name == "f32"


def test_a_parent_in_float8_and_its_mtp_layer(parents: dict[str, Path], tmp_path: Path, data: Path) -> None:
    """The MTP layer keeps its bytes beside packed integers, or has a scheme of its own."""
    folder = Path(shutil.copytree(parents["base"], tmp_path / "model"))
    write_tokenizer(folder)
    kept = open_task(folder, str(data), SCHEMES.split(","))
    assert kept.budget("5bpw").nbytes > kept.least
    with pytest.raises(PlanError, match="has no scheme"):
        open_task(folder, str(data), SCHEMES.split(","), overrides=["mtp=rtn"]).budget("5bpw")
    settled = ["mtp=rtn", "schemes.mtp=int8-g16"]
    task = open_task(folder, str(data), SCHEMES.split(","), overrides=settled)
    assert task.budget("5bpw").nbytes > task.least and task.fixed_bytes > 0


def test_a_budget_that_cannot_be_met_says_what_can(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert ask(tiny("llama"), data, recipe, "2bpw", "--json") == 5
    said = document(capsys)["error"]["message"]
    assert "2bpw is less than" in said and "between 3." in said and "and 9." in said
    assert not recipe.exists() and not walk_folder(recipe).exists()
    assert ask(tiny("llama"), data, recipe, "50bpw") == 0
    assert "buys nothing" in capsys.readouterr().err
    assert "attention: int8-g16" in recipe.read_text()
    assert ask(tiny("llama"), data, recipe, "4bpw") == 5
    assert "there already" in capsys.readouterr().err
    assert ask(tiny("llama"), data, recipe, "4bpw", "--overwrite", "--quiet") == 0


def test_more_bytes_never_lose(tiny: Families, tmp_path: Path, data: Path) -> None:
    errors = []
    for bits in ("3.2", "3.6", "4.4", "6"):
        found = surgery.allocate(tiny("llama"), f"{bits}bpw", str(data), schemes=SCHEMES.split(","))
        assert found.task.bpw(found.nbytes) <= float(bits)
        errors.append(found.error)
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1]


def test_forms_that_are_no_whole_numbers_are_rounded_to(tiny: Families, tmp_path: Path, data: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert ask(tiny("llama"), data, recipe, "6bpw", schemes="mxfp4,fp8,int3-g16") == 0
    step = load_recipe(recipe).recipe.steps[0]
    assert step.op == "quantize.rtn"
    plan_recipe(load_recipe(recipe), context=CONTEXT)
    with pytest.raises(UsageError, match="damping"):
        allocate(tiny("llama"), "6bpw", str(data), schemes=("mxfp4", "fp8"), overrides=["damping=0.1"])
    with pytest.raises(PlanError, match="cannot express"):
        allocate(tiny("llama"), "6bpw", str(data), schemes=("nf4", "int4-g16"))


def test_it_goes_on_where_it_was_stopped(tiny: Families, tmp_path: Path, data: Path) -> None:
    folder, schemes = tiny("deepseek_v3"), SCHEMES.split(",")
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    told: list[int] = []
    allocate(folder, "4bpw", str(data), schemes=schemes, out=one, context=CONTEXT)
    with pytest.raises(Killed):
        stopped = surgery.RunContext(snapshot_seconds=0, progress=killer("walk", 3))
        allocate(folder, "4bpw", str(data), schemes=schemes, out=two, context=stopped)
    assert walk_folder(two).is_dir() and not two.exists()
    listening = surgery.RunContext(progress=lambda stage, done, total: told.append(done))
    allocate(folder, "4bpw", str(data), schemes=schemes, out=two, context=listening)
    assert len(told) == 1 + 1 and one.read_text() == two.read_text()
    assert not walk_folder(two).exists()


def test_a_dry_run_says_what_it_takes(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tiny("mixtral"), data, tmp_path / "r.yaml", "4bpw", "--dry-run", "--json") == 0
    told = document(capsys)
    assert told["units"] == 4 and told["matrices"] == 2 * (4 + 6 * 3) and told["bytes_read"] > 0
    assert told["least_bpw"] < 4 < told["most_bpw"]
    assert not (tmp_path / "r.yaml").exists()


@pytest.mark.parametrize(
    ("family", "options", "error", "said"),
    [
        ("llama", {"schemes": ("int4-g16",)}, UsageError, "nothing to choose"),
        ("llama", {"schemes": ("int4-g16", "int9")}, UsageError, "no scheme"),
        ("llama", {"schemes": ("int4-g16", "keep")}, UsageError, "no candidate"),
        ("llama", {"schemes": ("int4-g16", "int8-g100")}, PlanError, "groups of 100 do not divide"),
        ("llama", {"overrides": ["bits=3"]}, UsageError, "`bits` is what is to be found"),
        ("llama", {"budget": "many"}, UsageError, "no budget"),
        ("llama", {"protect": ("atention",)}, RecipeError, "did you mean `attention`"),
        ("llama", {"protect": ("all",)}, PlanError, "nothing to work on"),
        ("qwen3_moe", {"protect": (r"re:experts\.0\.",)}, PlanError, "share one scheme"),
        ("gpt_oss", {}, PlanError, "fused"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_the_walk(
    tiny: Families, data: Path, family: str, options: dict[str, Any], error: type[SurgeryError], said: str
) -> None:
    given = {"schemes": SCHEMES.split(","), "budget": "4bpw", **options}
    context = surgery.RunContext(progress=killer("walk", 1))
    with pytest.raises(error, match=said):
        allocate(tiny(family), given.pop("budget"), str(data), context=context, **given)
