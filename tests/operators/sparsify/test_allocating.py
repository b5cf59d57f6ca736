"""Layers of different sparsity: what the first walk finds, against transformers' whole model with hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import file_hashes, strict_manifest
from walk_models import Families, demos, run, whole
from walk_runs import CONTEXT, Killed, killer, same

import surgery
from surgery.errors import PlanError, RecipeError, UsageError
from surgery.operators.layerwise import operator
from surgery.operators.protocol import RunContext
from surgery.operators.sparsify.ratios import half_error
from surgery.operators.together import demonstrations
from surgery.recipe.load import recipe_from_dict
from surgery.recipe.run import plan_recipe
from surgery.recipe.walks import walk_folder
from surgery.stream.checkpoint import Checkpoint

OWL: dict[str, Any] = {"op": "sparsify.wanda", "sparsity": 0.5, "allocate": "owl", "allocate_multiple": 2.0}
LSA: dict[str, Any] = {"op": "sparsify.sparsegpt", "sparsity": 0.6, "allocate": "lsa"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return demos(tmp_path / "d.jsonl", repeat=3)


def recipe(folder: Path, data: Path, *steps: dict[str, Any]) -> dict[str, Any]:
    return {
        "parents": {"model": str(folder)}, "steps": [{**step, "calibration": str(data)} for step in steps],
    }  # fmt: skip


def run_recipe(document: dict[str, Any], out: Path, **options: Any) -> dict[str, Any]:
    surgery.run(document, out, context=options.pop("context", CONTEXT), threads=1, **options)
    return strict_manifest(out)


def table(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["measurements"][0]
    assert found["kind"] == "layer_ratios"
    return found


def layer_zeros(folder: Path) -> dict[int, list[float]]:
    """The share of zeros of each matrix with more than a few, by layer."""
    found: dict[int, list[float]] = {}
    for ref in surgery.open(folder).tensors.values():
        if ref.info.layer is not None and len(ref.shape) == 2:
            share = float((ref.read() == 0).double().mean())
            if share > 0.1:
                found.setdefault(ref.info.layer, []).append(share)
    return found


def grams(checkpoint: Checkpoint, data: Path) -> dict[str, torch.Tensor]:
    """Σ x xᵀ of what goes into every linear of the whole model, by its weight's name: float64."""
    calibration = {"files": {"all": [str(data)]}}
    operator = surgery.operators.sparsify.wanda.Wanda.model_validate(
        {"sparsity": 0.5, "calibration": calibration}
    )
    sequences = demonstrations(operator.calibration, checkpoint, RunContext()).found.sequences
    model, found = whole(checkpoint), dict[str, torch.Tensor]()

    def watch(name: str) -> Callable[..., None]:
        def take(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2).double()
            found[name] = found.get(name, 0) + rows.T @ rows

        return take

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in path:
            module.register_forward_pre_hook(watch(f"{path}.weight"))
    for _, ids in sequences:
        run(model, torch.tensor([ids]))
    return found


def spread(d: list[float], sparsity: float, weights: list[int]) -> list[float]:
    mean = sum(w * each for w, each in zip(weights, d, strict=True)) / sum(weights)
    return [sparsity + mean - each for each in d]


def test_owl_counts_outliers_of_whole_layers(tiny: Families, tmp_path: Path, data: Path) -> None:
    folder = tiny("gemma3_text", num_hidden_layers=3)
    found = table(run_recipe(recipe(folder, data, OWL), tmp_path / "out"))
    checkpoint = surgery.open(folder)
    shares, sizes = [], []
    inputs = grams(checkpoint, data)
    for layer in range(3):
        scores = torch.cat([
            (checkpoint.tensors[name].read().double().abs() * gram.diagonal().sqrt()).flatten()
            for name, gram in inputs.items() if f".layers.{layer}." in name
        ])  # fmt: skip
        shares.append(float((scores > 2.0 * scores.mean()).double().mean()))
        sizes.append(scores.numel())
    low, high = min(shares), max(shares)
    expected = spread([0.16 * (share - low) / (high - low) for share in shares], 0.5, sizes)
    assert [row[1] for row in found["rows"]] == pytest.approx(shares, rel=1e-3)
    assert found["layer_sparsity"] == pytest.approx(expected, abs=2e-3)
    assert max(expected) - min(expected) == pytest.approx(0.16)
    zeros = layer_zeros(tmp_path / "out")
    for layer, share in enumerate(found["layer_sparsity"]):
        assert zeros[layer] == pytest.approx([share] * 7, abs=0.02)


def test_lsa_sums_the_errors_of_a_layer(tiny: Families, tmp_path: Path, data: Path) -> None:
    folder = tiny("llama")
    found = table(run_recipe(recipe(folder, data, {**LSA, "allocate_range": 0.05}), tmp_path / "out"))
    checkpoint, errors = surgery.open(folder), [0.0, 0.0]
    for name, gram in grams(checkpoint, data).items():
        weights = checkpoint.tensors[name].read().double()
        errors[int(name.split(".")[2])] += float(half_error(weights, gram))
    assert [row[1] for row in found["rows"]] == pytest.approx(errors, rel=1e-3)
    # Two layers of one size: the one that loses more gets 2β more zeros.
    more = errors.index(max(errors))
    assert found["layer_sparsity"][more] == pytest.approx(0.65, abs=1e-5)
    assert found["layer_sparsity"][1 - more] == pytest.approx(0.55, abs=1e-5)


@pytest.mark.parametrize("step", [OWL, LSA, {**LSA, "op": "sparsify.admm", "iterations": 3}])
def test_all_experts_of_a_layer_get_its_share(
    tiny: Families, tmp_path: Path, data: Path, step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one expert's inputs at a time changes nothing; the weights' mean is what was asked for."""
    document = recipe(tiny("deepseek_v3"), data, step)
    manifest = run_recipe(document, tmp_path / "out")
    found = table(manifest)
    zeros = layer_zeros(tmp_path / "out")
    for layer, share in enumerate(found["layer_sparsity"]):
        assert len(zeros[layer]) == (8 if layer == 0 else 5 + 9 * 3)
        assert zeros[layer] == pytest.approx([share] * len(zeros[layer]), abs=0.02)
    weighted = sum(row[2] * row[3] for row in found["rows"]) / sum(row[3] for row in found["rows"])
    assert weighted == pytest.approx(step["sparsity"], abs=1e-5)
    assert manifest["steps"][0]["decision"]["layer_sparsity"] == found["layer_sparsity"]
    monkeypatch.setattr(operator, "sums_room", lambda context: 1)
    monkeypatch.setattr("surgery.operators.sparsify.allocating.sums_room", lambda context: 1)
    monkeypatch.setattr("surgery.operators.sparsify.allocating.solver_room", lambda context: 1)
    again = table(run_recipe(document, tmp_path / "again"))
    assert again["layer_sparsity"] == pytest.approx(found["layer_sparsity"], abs=1e-6)


@pytest.mark.parametrize("step", [OWL, LSA], ids=["owl", "lsa"])
def test_the_first_walk_is_not_repeated(
    tiny: Families, tmp_path: Path, data: Path, step: dict[str, Any]
) -> None:
    document = recipe(tiny("glm4_moe"), data, step)
    run_recipe(document, tmp_path / "whole")
    out = tmp_path / "out"
    told: list[str] = []
    for stage, at in (("first walk", 3), ("walk", 2)):
        kill = killer(stage, at)

        def tell(now: str, done: int, total: int, kill: Any = kill) -> None:
            told.append(now)
            kill(now, done, total)

        with pytest.raises(Killed):
            surgery.run(document, out, context=CONTEXT, progress=tell, threads=1)
    assert walk_folder(out).is_dir()
    run_recipe(document, out, progress=lambda now, *_: told.append(now))
    # Three layers in each walk, and the word that it is done: what was killed is told of twice.
    assert told.count("first walk") == 3 + 2 and told.count("walk") == 2 + 3
    same(out, tmp_path / "whole")
    assert not walk_folder(out).exists()


def test_found_shares_of_something_else_are_refused(tiny: Families, tmp_path: Path, data: Path) -> None:
    document = recipe(tiny("llama"), data, OWL)
    with pytest.raises(Killed):
        surgery.run(document, tmp_path / "out", context=CONTEXT, progress=killer("walk", 1), threads=1)
    demos(data, repeat=2)
    with pytest.raises(PlanError, match="something else"):
        run_recipe(document, tmp_path / "out")
    run_recipe(document, tmp_path / "out", fresh=True)


def test_a_plan_shows_two_walks_and_shares_none(tiny: Families, tmp_path: Path, data: Path) -> None:
    gptq = {"op": "quantize.gptq", "group_size": 16}
    document = recipe(tiny("llama"), data, {**OWL, "op": "sparsify.sparsegpt"}, gptq)
    passes = plan_recipe(recipe_from_dict(document), context=CONTEXT).as_dict()["passes"]
    assert [each["steps"] for each in passes[:-1]] == [
        ["sparsify.sparsegpt"], ["sparsify.sparsegpt"], ["quantize.gptq"],
    ]  # fmt: skip
    assert "(owl)" in passes[0]["finds"] and "finds" not in passes[1]
    assert "spool_bytes" not in passes[0] and passes[0]["bytes_read"] == passes[1]["bytes_read"]
    told: list[str] = []
    run_recipe(document, tmp_path / "out", progress=lambda now, *_: told.append(now))
    assert told.count("walk") == 2 * 3 and told.count("first walk") == 3


def test_the_written_recipe_makes_the_same_again(tiny: Families, tmp_path: Path, data: Path) -> None:
    for number, step in enumerate((LSA, {"op": "sparsify.wanda", "sparsity": 0.5})):
        one, two = tmp_path / f"a{number}", tmp_path / f"b{number}"
        run_recipe(recipe(tiny("llama"), data, step), one)
        surgery.run(one / "surgery_recipe.yaml", two, context=CONTEXT, threads=1)
        assert file_hashes(one)["model.safetensors"] == file_hashes(two)["model.safetensors"]
        page = (one / "surgery_report.html").read_text()
        assert ("Sparsity by layer" in page) == (number == 0)


def test_in_python_without_a_folder(tiny: Families, tmp_path: Path, data: Path) -> None:
    checkpoint = surgery.open(tiny("llama"))
    params = {"sparsity": 0.5, "calibration": str(data)}
    child = surgery.sparsify.wanda(checkpoint, allocate="owl", **params)
    shares = child.history[-1]["decision"]["layer_sparsity"]
    assert child.history[-1]["allocate"] == "owl" and len(set(shares)) == 2
    by_hand = surgery.sparsify.wanda(checkpoint, layer_sparsity=shares, calibration=str(data))
    for name, ref in child.tensors.items():
        assert torch.equal(ref.read(), by_hand.tensors[name].read()), name
    with pytest.raises(PlanError, match="one process"):
        several = replace(RunContext().ranks, count=2)
        surgery.sparsify.wanda(checkpoint, allocate="owl", context=RunContext(ranks=several), **params)
    with pytest.raises(UsageError, match="allocate_range"):
        surgery.sparsify.wanda(checkpoint, allocate_range=0.1, **params)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"pattern": "2:4", "allocate": "owl"}, "spreads a `sparsity`"),
        ({"layer_sparsity": [0.5, 0.5], "allocate": "lsa"}, "spreads a `sparsity`"),
        ({"sparsity": 0.9, "allocate": "owl", "allocate_range": 0.08}, "0.05 at most"),
        ({"sparsity": 0.5, "allocate": "lsa", "allocate_multiple": 3}, "goes with `allocate: owl`"),
        ({"sparsity": 0.5, "allocate_multiple": 3}, "says nothing without"),
        ({"sparsity": 0.5, "allocate": "best"}, "uniform"),
    ],
)
def test_params_that_make_no_sense(tiny: Families, data: Path, params: dict[str, Any], said: str) -> None:
    document = recipe(tiny("llama"), data, {"op": "sparsify.sparsegpt", **params})
    with pytest.raises(RecipeError, match=said):
        surgery.plan(document)
