"""Pruned folders, loaded by transformers by itself, against the full model with its router masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from folders import check_written, strict_manifest
from safetensors.torch import load_file
from tiny_models import to_decoded
from transformers import FineGrainedFP8Config
from walk_models import Families, alone, demos, distance, masked_routers, run, sequences

import surgery
from surgery.recipe.verify import verify

GROUPED = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("olmoe", {}),
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("glm4_moe", {}),
    ("gpt_oss", {}),
]
STRATEGIES = ["ungrouped", "equal_per_group", "regrouped", "best_groups"]


def prune(folder: Path, out: Path, op: str = "experts.easy_ep", **params: Any) -> dict[str, Any]:
    """Run one step; the keep-list that it came to."""
    recipe = {"parents": {"model": str(folder)}, "steps": [{"op": op, **params}]}
    result = surgery.run(recipe, out)
    assert not out.with_name(out.name + ".walk").exists()
    check_written(out, surgery.open(out).tensors)
    assert result.folder == out
    keep = strict_manifest(out)["steps"][-1]["decision"]
    return {**keep, "layers": {int(layer): kept for layer, kept in keep["layers"].items()}}


def check_masked(
    full: Path, out: Path, keep: dict[str, Any], bound: float = 2e-5, dtype: Any = torch.float32, **load: Any
) -> None:
    ids = torch.tensor([sequences((41,), seed=9)[0][1]])
    pruned = run(alone(out, dtype, **load), ids)
    model = alone(full, dtype, **load)
    before = run(model, ids)
    with masked_routers(model, keep["layers"], (keep["n_group"], keep["topk_group"])):
        masked = run(model, ids)
    if keep["n_group"] > 1:
        with masked_routers(model, keep["layers"]):
            assert distance(run(model, ids), masked) > 0.01, "the groups do not matter to any token"
    assert distance(masked, before) > 0.01, "no token misses the experts that went"
    assert distance(pruned, masked) < bound


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_families(tiny: Families, tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    folder = tiny(family, **config)
    keep = prune(folder, tmp_path / "out", keep=3, calibration=str(demos(tmp_path / "d.jsonl")))
    assert {len(kept) for kept in keep["layers"].values()} == {3}
    check_masked(folder, tmp_path / "out", keep)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
@pytest.mark.parametrize("groups", STRATEGIES)
def test_groups(tiny: Families, tmp_path: Path, family: str, groups: str) -> None:
    folder = tiny(family, **GROUPED)
    number = 12 if groups == "best_groups" else 8
    data = str(demos(tmp_path / "d.jsonl"))
    keep = prune(folder, tmp_path / "out", keep=number, groups=groups, calibration=data)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"ungrouped": (1, 1), "best_groups": (3, 2)}.get(groups, (4, 2))
    assert (config["n_group"], config["topk_group"]) == expected == (keep["n_group"], keep["topk_group"])
    assert config["n_routed_experts"] == number
    if groups == "equal_per_group":
        for kept in keep["layers"].values():
            assert [sum(expert // 4 == group for expert in kept) for group in range(4)] == [2] * 4
    if groups == "best_groups":
        assert all(len({expert // 4 for expert in kept}) == 3 for kept in keep["layers"].values())
    check_masked(folder, tmp_path / "out", keep)


def test_bf16_folders(tiny: Families, tmp_path: Path) -> None:
    """Stored and computed in bf16: equal to the rounding of that."""
    folder = tiny("deepseek_v3", **GROUPED, dtype="bfloat16")
    out = tmp_path / "out"
    keep = prune(folder, out, keep=0.5, calibration=str(demos(tmp_path / "d.jsonl")))
    assert {tensor.dtype for tensor in stored(out).values()} == {torch.bfloat16}
    check_masked(folder, out, keep)
    check_masked(folder, out, keep, bound=0.02, dtype=torch.bfloat16)


@pytest.mark.parametrize("op", ["experts.random", "experts.drop"])
def test_experts_that_run_all_at_once(tiny: Families, tmp_path: Path, op: str) -> None:
    """llama4's experts cannot be observed, but dropped."""
    folder = tiny("llama4_text")
    params: dict[str, Any] = {"keep": 2, "seed": 5}
    if op == "experts.drop":
        document = {"kind": "surgery-keep-list", "schema": 1, "n_group": 1, "topk_group": 1}
        (tmp_path / "k.json").write_text(json.dumps(document | {"layers": {"0": [3, 1], "1": [0, 2]}}))
        params = {"keep_list": str(tmp_path / "k.json")}
    keep = prune(folder, tmp_path / "out", op, **params)
    check_masked(folder, tmp_path / "out", keep)


def test_fp8_folders_load_and_compute(tmp_path: Path) -> None:
    """transformers decodes the FP8 output by itself; the reference is decoded here."""
    folder = factories.deepseek_v3(tmp_path / "model", 3, ragged=False, experts=8)
    out = tmp_path / "out"
    keep = prune(folder, out, keep=4, calibration=str(demos(tmp_path / "d.jsonl")))
    quantized = FineGrainedFP8Config(dequantize=True)
    check_masked(folder, out, keep, bound=0.02, dtype=torch.bfloat16, quantization_config=quantized)
    factories.deepseek_v3(tmp_path / "one", 3, ragged=False, shards=1, mtp=False)
    keep = prune(tmp_path / "one", tmp_path / "one-out", keep=4, calibration=str(tmp_path / "d.jsonl"))
    decoded = [to_decoded(tmp_path / name, tmp_path / f"{name}-decoded") for name in ("one", "one-out")]
    check_masked(decoded[0], decoded[1], keep)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def check_bytes(folder: Path, out: Path, keep: dict[str, Any], layers: int) -> None:
    """Every stored tensor of a DeepSeek-like output against the parent's bytes, and none too many."""
    before, after = stored(folder), stored(out)
    expected: dict[str, bytes] = {}
    for name, tensor in before.items():
        pieces = name.split(".")
        layer = int(pieces[2]) if pieces[1] == "layers" else -1
        kept = keep["layers"].get(min(layer, layers - 1), [])
        if ".mlp.experts." in name:
            if int(pieces[5]) in kept:
                pieces[5] = str(kept.index(int(pieces[5])))
                expected[".".join(pieces)] = raw(tensor)
        elif ".mlp.gate." in name:
            expected[name] = raw(tensor[torch.tensor(kept)])
        else:
            expected[name] = raw(tensor)
    assert {name: raw(tensor) for name, tensor in after.items()} == expected
    assert all(after[name].dtype == before[name].dtype for name in after.keys() & before.keys())


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_bytes_with_a_prediction_layer(tmp_path: Path, fp8: bool, ragged: bool) -> None:
    folder = factories.deepseek_v3(tmp_path / "model", 3, fp8=fp8, ragged=ragged)
    out = tmp_path / "out"
    keep = prune(folder, out, "experts.random", keep=4, seed=3)
    check_bytes(folder, out, keep, 3)
    assert sorted(keep["layers"]) == [1, 2]
    assert verify(out, recompute=None).ok
    before, after = (json.loads((each / "config.json").read_text()) for each in (folder, out))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"n_routed_experts", "n_group"}
    manifest = strict_manifest(out)
    gone = set(manifest["dropped"])
    assert len(gone) == 3 * 3 * 4  # layers with experts, projections, experts that went
    assert all(".mlp.experts." in name for name in gone)


def test_dropped_prediction_layer(tmp_path: Path) -> None:
    folder = factories.deepseek_v3(tmp_path / "model", 3)
    out = tmp_path / "out"
    keep = prune(folder, out, "experts.random", keep=4, mtp="drop")
    assert not [name for name in stored(out) if name.startswith("model.layers.3.")]
    config = json.loads((out / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0 and config["n_routed_experts"] == 4
    logical = surgery.open(folder).tensors
    dropped = set(strict_manifest(out)["dropped"])
    assert {name for name, ref in logical.items() if ref.info.mtp} <= dropped
    assert len(logical) == len(surgery.open(out).tensors) + len(dropped)
    assert len(keep["layers"]) == 2


def test_mxfp4_experts_keep_their_bytes(tmp_path: Path) -> None:
    folder = factories.gpt_oss_mxfp4(tmp_path / "model", 2, experts=6)
    keep = prune(folder, tmp_path / "out", "experts.random", keep=3, seed=1)
    before, after = stored(folder), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if ".experts." in name or ".router." in name:
            tensor = tensor[torch.tensor(keep["layers"][int(name.split(".")[2])])]
        assert raw(after[name]) == raw(tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 3
    assert (
        config["quantization_config"]
        == json.loads((folder / "config.json").read_text())["quantization_config"]
    )


def test_multimodal_folders(tmp_path: Path) -> None:
    """The count is under text_config; what is no language model stays."""
    folder = factories.llama4_text(tmp_path / "model", 2, wrapped=True)
    keep = prune(folder, tmp_path / "out", "experts.random", keep=2)
    before, after = stored(folder), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if ".experts." in name or ".router." in name:
            tensor = tensor[torch.tensor(keep["layers"][int(name.split(".")[3])])]
        assert raw(after[name]) == raw(tensor), name
    old, new = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "out"))
    assert new == {**old, "text_config": {**old["text_config"], "num_local_experts": 2}}


def test_names_of_experts_in_the_config(tmp_path: Path) -> None:
    """What is left unquantized is listed by module: under new numbers, without those that went."""
    folder = factories.deepseek_v3(tmp_path / "model", 3)
    config = json.loads((folder / "config.json").read_text())
    names = ["lm_head", "re:.*gate$"]
    names += [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in (1, 2, 3) for e in range(8)]
    quantization = config["quantization_config"] | {"modules_to_not_convert": names}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    keep = prune(folder, tmp_path / "out", "experts.random", keep=4, seed=3)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for layer, kept in [*keep["layers"].items(), (3, keep["layers"][2])]:  # 3 is the prediction layer
        assert kept != list(range(4)), "the numbers must change for this to show anything"
        mine = [name for name in found["modules_to_not_convert"] if f"layers.{layer}." in name]
        assert mine == [f"model.layers.{layer}.mlp.experts.{e}.up_proj" for e in range(4)]
    assert found["modules_to_not_convert"][:2] == names[:2]
    assert {k: v for k, v in found.items() if v != found["modules_to_not_convert"]} == config[
        "quantization_config"
    ]


def test_new_order_of_a_list(tmp_path: Path, tiny: Families) -> None:
    """experts.drop keeps the order that the list gives, groups and all."""
    folder = tiny("deepseek_v3", **GROUPED)
    layers = {"1": [15, 0, 3, 7, 2, 9, 11, 4], "2": [5, 6, 14, 13, 1, 0, 8, 10]}
    document = {"kind": "surgery-keep-list", "schema": 1, "n_group": 2, "topk_group": 1, "layers": layers}
    (tmp_path / "k.json").write_text(json.dumps(document))
    keep = prune(folder, tmp_path / "out", "experts.drop", keep_list=str(tmp_path / "k.json"))
    check_bytes(folder, tmp_path / "out", keep, 3)
    check_masked(folder, tmp_path / "out", keep)


def test_list_of_a_run_gives_the_same_weights(tmp_path: Path, tiny: Families) -> None:
    folder = tiny("qwen3_moe")
    prune(folder, tmp_path / "a", keep=4, calibration=str(demos(tmp_path / "d.jsonl")))
    prune(folder, tmp_path / "b", "experts.drop", keep_list=str(tmp_path / "a" / "surgery_keep.json"))
    assert {n: raw(t) for n, t in stored(tmp_path / "a").items()} == {
        n: raw(t) for n, t in stored(tmp_path / "b").items()
    }
