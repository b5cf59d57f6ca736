"""Recipes that sparsify and quantize: what they write, whatever stops them and whatever the budget."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from folders import change_shards, file_hashes, strict_manifest
from tiny_models import to_fp8, write_tokenizer
from walk_models import Families, demos
from walk_runs import CONTEXT, kill, layers_walked, same

import surgery
from surgery.codecs.packed_int import PackedInt
from surgery.errors import PlanError, RecipeError, StrictError, SurgeryError
from surgery.operators.layerwise import operator
from surgery.recipe.verify import verify
from surgery.recipe.walks import walk_folder

GPTQ = {"op": "quantize.gptq", "bits": 4, "group_size": 16}
SPARSE = {"op": "sparsify.sparsegpt", "pattern": "2:4"}


def recipe(folder: Path, data: Path, *steps: dict[str, Any], **output: Any) -> dict[str, Any]:
    walked = [{**step, "calibration": str(data)} for step in steps]
    return {"parents": {"model": str(folder)}, "steps": walked, "output": output}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return demos(tmp_path / "d.jsonl", repeat=6)


def run(document: dict[str, Any], out: Path, **options: Any) -> dict[str, Any]:
    surgery.run(document, out, context=options.pop("context", CONTEXT), threads=1, **options)
    return strict_manifest(out)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "mixtral", "qwen2_moe", "gpt_oss"])
def test_half_of_every_four_go(tiny: Families, tmp_path: Path, data: Path, family: str) -> None:
    """Fused experts too: they stay in their slabs, in the form that they had."""
    folder = tiny(family)
    manifest = run(recipe(folder, data, SPARSE), tmp_path / "out")
    before, after = surgery.open(folder), surgery.open(tmp_path / "out")
    solved = {row[0] for row in manifest["measurements"][0]["rows"]}
    assert len(solved) > 10
    for name, ref in after.tensors.items():
        old = before.tensors[name]
        assert ref.codec == old.codec
        if name in solved:
            groups = ref.read().view(ref.shape[0], -1, 4)
            assert int(((groups == 0).sum(-1) < 2).sum()) == 0
        else:
            assert torch.equal(ref.read(), old.read()), name
    assert verify(tmp_path / "out", recompute=None).ok


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "mixtral", "qwen2_moe"])
def test_packed_integers_load_and_verify(tiny: Families, tmp_path: Path, data: Path, family: str) -> None:
    manifest = run(recipe(tiny(family), data, GPTQ), tmp_path / "out")
    child = surgery.open(tmp_path / "out")
    rows = [dict(zip(manifest["measurements"][0]["columns"], row, strict=True))
            for row in manifest["measurements"][0]["rows"]]  # fmt: skip
    packed = {name for name, ref in child.tensors.items() if isinstance(ref.codec, PackedInt)}
    assert packed == {row["tensor"] for row in rows}
    taken = [row for row in rows if row["fallback"] is None]
    assert sum(row["error"] for row in taken) < 0.95 * sum(row["error_plain"] for row in taken)
    assert child.quantization["quant_method"] == "compressed-tensors"
    assert verify(tmp_path / "out", recompute=None).ok
    assert not walk_folder(tmp_path / "out").exists()


def test_float8_parents(tiny: Families, tmp_path: Path, data: Path) -> None:
    """FP8 blocks in, FP8 blocks out where weights are cut, 4 bits where they are quantized."""
    folder = to_fp8(tiny("deepseek_v3"), tmp_path / "fp8")
    run(recipe(folder, data, SPARSE), tmp_path / "sparse")
    assert surgery.open(tmp_path / "sparse").quantization["quant_method"] == "fp8"
    run(recipe(folder, data, GPTQ), tmp_path / "packed")
    found = {ref.codec.name for ref in surgery.open(tmp_path / "packed").tensors.values()}
    assert "packed-int4-g16" in found and "fp8-block" not in found


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [SPARSE, GPTQ], ids=["sparsegpt", "gptq"])
def test_resumed_after_any_layer(
    tiny: Families, tmp_path: Path, data: Path, at: int, step: dict[str, Any]
) -> None:
    document = recipe(tiny("deepseek_v3"), data, step)
    run(document, tmp_path / "whole")
    out = tmp_path / "out"
    kill(document, out, "walk", at)
    assert layers_walked(document, out) == 3 - (at - 1)
    same(out, tmp_path / "whole")
    assert not walk_folder(out).exists()


def test_killed_while_writing(tiny: Families, tmp_path: Path, data: Path) -> None:
    """The solved tensors are kept until the output is whole."""
    document = recipe(tiny("mixtral"), data, GPTQ)
    run(document, tmp_path / "whole")
    out = tmp_path / "out"
    stages: list[str] = []
    run(document, tmp_path / "look", progress=lambda stage, *_: stages.append(stage))
    kill(document, out, next(each for each in stages if each != "walk"), 1)
    assert list((walk_folder(out) / "step-00").glob("solved-*"))
    assert layers_walked(document, out) == 0
    same(out, tmp_path / "whole")


@pytest.mark.parametrize(
    "step",
    [GPTQ, {**GPTQ, "op": "quantize.awq", "min_tokens": 4}, {**SPARSE, "sequential": True}],
    ids=["gptq", "awq", "in sequence"],
)
def test_waves_change_nothing(
    tiny: Families, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, step: dict[str, Any]
) -> None:
    """Room for one expert's inputs at a time, and for one matrix to be solved."""
    document = recipe(tiny("qwen3_moe"), data, step)
    run(document, tmp_path / "a")
    monkeypatch.setattr(operator, "sums_room", lambda context: 1)
    monkeypatch.setattr(operator, "solver_room", lambda context: 1)
    context = replace(CONTEXT, snapshot_seconds=0)
    plan = surgery.plan(document, context=context)
    assert plan.walks[0]["waves"] >= 6
    run(document, tmp_path / "b", context=context)
    one, two = (surgery.open(tmp_path / name) for name in "ab")
    for name, ref in one.tensors.items():
        assert torch.equal(ref.read(), two.tensors[name].read()), name


def test_one_walk_prunes_and_quantizes(tiny: Families, tmp_path: Path, data: Path) -> None:
    """The walk of two steps is as long as one; a step by itself afterwards is as good as in the recipe."""
    prune = {"op": "experts.reap", "keep": 4, "propagate": "changed"}
    document = recipe(tiny("olmoe"), data, prune, GPTQ)
    told: list[int] = []
    surgery.run(
        document, tmp_path / "out", context=CONTEXT, threads=1,
        progress=lambda stage, done, total: told.append(done) if stage == "walk" else None,
    )  # fmt: skip
    assert len(told) == 2 + 1
    child = surgery.open(tmp_path / "out")
    assert child.config["num_experts"] == 4
    assert verify(tmp_path / "out", recompute=None).ok
    manifest = strict_manifest(tmp_path / "out")
    assert [step["op"] for step in manifest["steps"]] == ["experts.reap", "quantize.gptq"]
    kill(document, tmp_path / "again", "walk", 2)
    assert layers_walked(document, tmp_path / "again") == 1
    same(tmp_path / "again", tmp_path / "out")


def test_sparse_then_packed_keeps_zeros_where_they_are_joint(
    tiny: Families, tmp_path: Path, data: Path
) -> None:
    step = {"op": "sparsify.sparsegpt", "sparsity": 0.5, "quantize": "int4-g16"}
    manifest = run(recipe(tiny("llama"), data, step), tmp_path / "out")
    zeros = manifest["measurements"][0]["columns"].index("zeros")
    assert all(row[zeros] >= 0.5 for row in manifest["measurements"][0]["rows"])
    assert surgery.open(tmp_path / "out").quantization["format"] == "pack-quantized"


def test_experts_without_tokens_fall_back_and_are_counted(tiny: Families, tmp_path: Path, data: Path) -> None:
    document = recipe(tiny("mixtral"), data, {**GPTQ, "min_tokens": 10_000})
    manifest = run(document, tmp_path / "out")
    events = [event for event in manifest["events"] if event["kind"] == "fallback"]
    assert len(events) == 1 and "fewer than 10000 tokens" in events[0]["message"]
    assert len(events[0]["tensors"]) == len(manifest["measurements"][0]["rows"])
    with pytest.raises(StrictError):
        run(document, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_other_precision_for_some(tiny: Families, tmp_path: Path, data: Path) -> None:
    schemes = {"layers:0": "int8-g16", "attention": "int8-channel", "re:down_proj": "keep"}
    run(recipe(tiny("llama"), data, {**GPTQ, "schemes": schemes}), tmp_path / "out")
    names = {name: ref.codec.name for name, ref in surgery.open(tmp_path / "out").tensors.items()}
    assert names["model.layers.0.self_attn.q_proj.weight"] == "packed-int8-g16"
    assert names["model.layers.1.self_attn.q_proj.weight"] == "packed-int8-channel"
    assert names["model.layers.1.mlp.up_proj.weight"] == "packed-int4-g16"
    assert names["model.layers.1.mlp.down_proj.weight"] in ("f32", "bf16")
    assert names["model.embed_tokens.weight"] in ("f32", "bf16")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({**GPTQ, "group_size": 100}, "groups of 100 do not divide"),
        ({**SPARSE, "pattern": "3:7"}, "3:7 does not divide"),
        ({**GPTQ, "schemes": {"attention": "int9"}}, "int9.* is no scheme"),
        ({**GPTQ, "scheme": "nf4"}, "`bits` or `scheme`"),
        ({"op": "quantize.gptq", "scheme": "nf4"}, "quantize.rtn takes nf4"),
        ({"op": "sparsify.sparsegpt"}, "none given"),
        ({**SPARSE, "sparsity": 0.5}, "sparsity and pattern"),
        ({"op": "sparsify.wanda", "sparsity": 1.5}, "less than 1"),
        ({**SPARSE, "pattern": "4:2"}, "no pattern"),
        ({**SPARSE, "select": ["atention"]}, "did you mean `attention`"),
        ({**SPARSE, "select": ["head"]}, "finds nothing to work on"),
        ({"op": "sparsify.wanda", "layer_sparsity": [0.5]}, "layer_sparsity has 1"),
    ],
)
def test_bad_params_are_refused_before_anything_runs(
    tiny: Families, tmp_path: Path, data: Path, step: dict[str, Any], said: str
) -> None:
    with pytest.raises((RecipeError, PlanError), match=said):
        run(recipe(tiny("llama"), data, step), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not walk_folder(tmp_path / "out").exists()


def test_packed_input_is_refused(tiny: Families, tmp_path: Path, data: Path) -> None:
    run(recipe(tiny("llama"), data, GPTQ), tmp_path / "packed")
    for step in (GPTQ, SPARSE, {"op": "experts.reap", "keep": 0.5}):
        with pytest.raises(SurgeryError, match=r"already stored as packed-int4|has no routed experts"):
            run(recipe(tmp_path / "packed", data, step), tmp_path / "out")


def test_nan_names_the_matrix(tiny: Families, tmp_path: Path, data: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        return tensors

    change_shards(folder, spoil)
    with pytest.raises(SurgeryError, match=r"layers\.1\.mlp\.\w+_proj.*NaN"):
        run(recipe(folder, data, GPTQ), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rounding_needs_no_walk_and_composes(tiny: Families, tmp_path: Path) -> None:
    document = {
        "parents": {"model": str(tiny("llama"))},
        "steps": [{"op": "sparsify.magnitude", "sparsity": 0.5}, {"op": "quantize.rtn", "group_size": 16}],
    }
    run(document, tmp_path / "out")
    assert verify(tmp_path / "out", recompute=None).ok
    child, model = surgery.open(tmp_path / "out"), surgery.open(tiny("llama"))
    ref = child.tensors["model.layers.0.mlp.up_proj.weight"]
    smallest = model.tensors[ref.name].read().abs().flatten().kthvalue(ref.numel // 2).values
    gone = model.tensors[ref.name].read().abs() <= smallest
    assert bool((ref.read()[gone] == 0).all())


def test_the_same_bytes_again(tiny: Families, tmp_path: Path, data: Path) -> None:
    document = recipe(tiny("deepseek_v3"), data, {**GPTQ, "act_order": True, "grid": "mse"})
    run(document, tmp_path / "a")
    run(document, tmp_path / "b", memory_bytes=256 << 20)
    one, two = (file_hashes(tmp_path / name) for name in "ab")
    assert one["model.safetensors"] == two["model.safetensors"]
    assert one["config.json"] == two["config.json"]


def test_a_plan_says_what_it_takes(tiny: Families, tmp_path: Path, data: Path) -> None:
    plan = surgery.plan(recipe(tiny("deepseek_v3"), data, GPTQ), tmp_path / "out", context=CONTEXT)
    walk, write = plan.as_dict()["passes"]
    assert walk["matrices"] == 10 * 3 + 3 + 2 * (8 * 3 + 3) - 15 or walk["matrices"] > 60
    assert walk["parts"]["solver"] > 0 and walk["spool_bytes"] > 0
    assert write["steps"] == ["quantize.gptq"]
    assert json.dumps(plan.as_dict())


@pytest.mark.parametrize("mtp", ["keep", "rtn"])
def test_the_prediction_layer_keeps_its_bytes_or_is_rounded(tmp_path: Path, data: Path, mtp: str) -> None:
    folder = factories.deepseek_v3(tmp_path / "model", 5)
    write_tokenizer(folder)
    run(recipe(folder, data, {**GPTQ, "mtp": mtp}), tmp_path / "out")
    before, after = surgery.open(folder), surgery.open(tmp_path / "out")
    predicted = [ref for ref in after.tensors.values() if ref.info.mtp]
    packed = [ref for ref in predicted if isinstance(ref.codec, PackedInt)]
    assert predicted and bool(packed) == (mtp == "rtn")
    for ref in predicted:
        if ref not in packed:
            assert torch.equal(ref.read(), before.tensors[ref.name].read())


def test_forms_that_no_format_holds_together_are_refused(tiny: Families, tmp_path: Path) -> None:
    folder = to_fp8(tiny("deepseek_v3"), tmp_path / "fp8")
    step = {"op": "quantize.rtn", "scheme": "nf4", "schemes": {"attention": "keep"}}
    document = {"parents": {"model": str(folder)}, "steps": [step]}
    with pytest.raises(PlanError, match=r"bnb-nf4 cannot express .*fp8-block"):
        run(document, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prediction_layer_is_cut_by_magnitude(tmp_path: Path, data: Path) -> None:
    folder = factories.deepseek_v3(tmp_path / "model", 5)
    write_tokenizer(folder)
    run(recipe(folder, data, {**SPARSE, "mtp": "rtn"}), tmp_path / "out")
    for ref in surgery.open(tmp_path / "out").tensors.values():
        if ref.info.mtp and ref.info.role == "routed_expert":
            assert int(((ref.read().view(ref.shape[0], -1, 4) == 0).sum(-1) < 2).sum()) == 0
