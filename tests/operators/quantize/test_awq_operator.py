"""AWQ in a walk: scales change nothing by themselves, rounding behind them loses less, outputs load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from folders import change_shards, strict_manifest
from safetensors.torch import load_file
from tiny_models import Build
from walk_models import Families, demos, distance, run, sequences, whole
from walk_runs import CONTEXT, kill, layers_walked, same

import surgery
from surgery.calibrate.batches import make_batches
from surgery.codecs.plain import Plain
from surgery.errors import RecipeError, UsageError
from surgery.operators.layerwise.operator import Tensors
from surgery.operators.layerwise.problem import Problem, Solved, Work
from surgery.operators.protocol import PREVIOUS, RunContext
from surgery.operators.quantize.awq import AWQ, Scaling
from surgery.recipe.verify import verify
from surgery.recipe.walks import walk_folder
from surgery.report.matrices import in_words
from surgery.stream.checkpoint import Checkpoint, TensorRef

PARAMS: dict[str, Any] = {"bits": 3, "group_size": 16, "min_tokens": 4}


class Unrounded(AWQ):
    """Scales and folds, and leaves out what is lossy."""

    op: ClassVar[str] = "test.unrounded"

    def work(self, ref: TensorRef) -> Work | None:
        found = super().work(ref)
        return found and Work(Plain("F32"), found.wanted)

    def described(self, checkpoint: Checkpoint, tensors: Tensors) -> tuple[Tensors, Mapping[str, Any]]:
        return tensors, checkpoint.config

    def solve(self, problem: Problem) -> Solved:
        return Solved(problem.weights)

    def fall_back(self, problem: Problem) -> Solved:
        return Solved(problem.weights)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(demos(tmp_path / "demos.jsonl", repeat=8))


def applied(operator: AWQ, folder: Path) -> Checkpoint:
    inputs = {PREVIOUS: surgery.open(folder)}
    return operator.finish(inputs, operator.decide(inputs, RunContext()))


def table(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The rows of the report by tensor."""
    (found,) = (probe.measure() for probe in checkpoint.probes)
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    return {row["tensor"]: row for row in rows}


def logits(model: Checkpoint | Path) -> torch.Tensor:
    return run(whole(model), make_batches(sequences((48, 48), seed=7), 128)[0].ids)


def last(name: str) -> str:
    """The projection of a tensor's name."""
    return name.removesuffix(".weight").rpartition(".")[2]


def any_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales from 1/4 to 4 that no search has chosen."""
    generator = torch.Generator().manual_seed(3)

    def draw(weights: torch.Tensor, *args: Any, **options: Any) -> Scaling:
        drawn = torch.rand(len(weights), weights.shape[-1], generator=generator)
        return Scaling(4 ** (2 * drawn - 1), [0.5] * len(weights), torch.zeros(21, len(weights)))

    monkeypatch.setattr("surgery.operators.quantize.awq.awq", draw)


FOLDED = {
    "llama": ("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", 4),
    "qwen2": ("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", 6),  # the biases of values change
    "phi3": ("qkv_proj gate_up_proj", 4),
    "deepseek_v3": (
        "q_a_proj kv_a_proj_with_mqa q_b_proj kv_b_proj o_proj gate_proj up_proj down_proj", 3 * 3 + 1,
    ),
    "deepseek_v2": (
        "q_a_proj kv_a_proj_with_mqa q_b_proj kv_b_proj o_proj gate_proj up_proj down_proj", 3 * 3 + 1,
    ),
    "mixtral": ("q_proj k_proj v_proj o_proj w2", 2),
    "qwen3_moe": ("q_proj k_proj v_proj o_proj down_proj", 2),
    "qwen2_moe": ("q_proj k_proj v_proj o_proj down_proj", 4),
    "gemma2": ("o_proj down_proj", 0),
}  # fmt: skip
"""What is scaled of each family, and how many tensors change beside the matrices."""


@pytest.mark.parametrize("family", list(FOLDED))
def test_scales_alone_change_no_output(
    tiny: Families, data: str, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Any scales, wherever there is a fold, with norms of few bits."""
    any_scales(monkeypatch)
    folder = Path(shutil.copytree(tiny(family), Path(data).parent / "model"))
    narrow = family != "qwen2" and family != "qwen2_moe"  # biases are rounded where they are narrow

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t.bfloat16() if t.ndim == 1 and "norm" in n and narrow else t for n, t in tensors.items()}

    change_shards(folder, change)
    child = applied(Unrounded.model_validate({"calibration": data, **PARAMS}), folder)
    assert distance(logits(child), logits(folder)) < 1e-5
    rows = table(child)
    last_names, count = FOLDED[family]
    assert {last(name) for name, row in rows.items() if row["ratio"] is not None} == set(last_names.split())
    changed = child.history[-1]["decision"].get("changed", [])
    before = surgery.open(folder).tensors
    assert len(changed) == count
    assert all(not torch.equal(child.tensors[name].read(), before[name].read()) for name in changed)
    kept = [name for name in child.tensors if name not in rows and name not in changed]
    assert all(torch.equal(child.tensors[name].read(), before[name].read()) for name in kept)
    assert all(row["error"] < 1e-5 for row in rows.values()), "told on the inputs as they were"


def test_what_cannot_be_scaled_is_said(tiny: Families, data: str) -> None:
    """Norms of 1 + weight, experts, shared values: only the first is news."""
    gemma = applied(AWQ.model_validate({"calibration": data, **PARAMS}), tiny("gemma2"))
    (event,) = gemma.events
    assert "multiplies by 1 + weight" in event.message and len(event.tensors) == 2 * 5
    moe = applied(AWQ.model_validate({"calibration": data, **PARAMS}), tiny("mixtral", num_key_value_heads=2))
    assert not [event for event in moe.events if "scaled" in event.message]
    rows = table(moe)
    assert {row["unscaled"] for name, row in rows.items() if "w1" in name} == {
        "its norm feeds the router and all experts"
    }
    assert {row["unscaled"] for name, row in rows.items() if "o_proj" in name} == {"its heads share values"}
    words = " ".join(in_words(AWQ.op, list(rows.values())))
    assert "24 could not be: its norm feeds the router" in words and "2 could not be: its heads" in words
    kept = {**PARAMS, "schemes": {"re:k_proj": "keep", "re:up_proj": "int4-g16"}}
    partly = applied(AWQ.model_validate({"calibration": data, **kept}), tiny("llama"))
    names = {last(name) for event in partly.events for name in event.tensors}
    assert names == {"q_proj", "v_proj", "gate_proj", "up_proj"}
    assert not partly.history[-1]["decision"].get("changed")


def outliers(folder: Path) -> Path:
    """A few channels of every norm 20 times as large, and the columns that meet them smaller for it."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, tensor in tensors.items():
            channels = torch.arange(5, tensor.shape[-1], 16)
            if "layers." not in name:
                continue
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                tensor[channels] *= 20
            elif name.endswith(tuple(f"{p}_proj.weight" for p in ("q", "k", "v", "gate", "up"))):
                tensor[:, channels] /= 20
        return tensors

    return change_shards(folder, change)


@pytest.mark.parametrize("symmetric", [True, False])
def test_outlier_channels_are_kept(build: Build, data: str, symmetric: bool) -> None:
    folder = outliers(build("llama"))
    reference = logits(folder)
    params: dict[str, Any] = {"bits": 3, "group_size": 16, "symmetric": symmetric}
    child = surgery.quantize.awq(surgery.open(folder), calibration=data, **params)
    plain = surgery.quantize.rtn(surgery.open(folder), **params)
    clipped = surgery.quantize.awq(surgery.open(folder), calibration=data, scale=False, **params)
    error, only_clipped, nearest = (distance(logits(each), reference) for each in (child, clipped, plain))
    assert error < 0.7 * nearest and error < only_clipped
    rows = table(child)
    assert all(row["error"] < row["error_plain"] for row in rows.values() if row["ratio"] is not None)
    assert sum(row["ratio"] is not None for row in rows.values()) > 6


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_matrices_lose_less_than_by_rounding(tiny: Families, data: str, family: str) -> None:
    child = applied(AWQ.model_validate({"calibration": data, **PARAMS}), tiny(family))
    rows = [row for row in table(child).values() if row["fallback"] is None]
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("error", "error_plain")}
    assert mean["error"] < 0.95 * mean["error_plain"]
    if family == "qwen2_moe":
        downs = [row for row in rows if ".experts." in row["tensor"] and "down" in row["tensor"]]
        assert downs and any(row["ratio"] is not None for row in downs)
        assert all(row["error"] <= row["error_plain"] for row in downs)


def test_outputs_load_verify_and_resume(tiny: Families, tmp_path: Path, data: str) -> None:
    folder, out = tiny("deepseek_v3"), tmp_path / "out"
    step = {"op": "quantize.awq", "calibration": data, **PARAMS, "bits": 8}
    document = {"parents": {"model": str(folder)}, "steps": [step]}
    surgery.run(document, tmp_path / "whole", context=CONTEXT, threads=1)
    kill(document, out, "walk", 2)
    assert list(walk_folder(out).glob("step-00/solved-*.safetensors"))
    assert layers_walked(document, out) == 2
    same(out, tmp_path / "whole")
    checks = {check.name: check for check in verify(out, recompute=None).checks}
    assert all(check.state in ("passed", "noted") for check in checks.values()), checks
    changed = strict_manifest(out)["steps"][-1]["decision"]["changed"]
    assert any(name.endswith("input_layernorm.weight") for name in changed)
    stored, before = (load_file(each / "model.safetensors") for each in (out, folder))
    for name in (name for name in stored if name in before and "norm" in name):
        assert torch.equal(stored[name], before[name]) != (name in changed)
    wanted = logits(folder)
    off = (logits(out) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert off.median() < 0.05, "but for the tokens that other experts are chosen for"


def test_behind_another_step_of_the_same_walk(tiny: Families, tmp_path: Path, data: str) -> None:
    prune = {"op": "experts.easy_ep", "keep": 0.5, "calibration": data, "propagate": "changed"}
    step = {"op": "quantize.awq", "calibration": data, **PARAMS}
    document = {"parents": {"model": str(tiny("qwen3_moe"))}, "steps": [prune, step]}
    surgery.run(document, tmp_path / "out", threads=1)
    assert verify(tmp_path / "out", recompute=None).ok
    found = surgery.open(tmp_path / "out")
    assert found.config["num_experts"] == 3 and logits(tmp_path / "out").isfinite().all()


def test_what_is_refused(tiny: Families, tmp_path: Path, data: str) -> None:
    model = surgery.open(tiny("llama"))
    for params in (
        {"sequential": True},
        {"scheme": "nf4"},
        {"schemes": {"attention": "fp8"}},
        {"max_shrink": 1},
    ):
        with pytest.raises(UsageError):
            surgery.quantize.awq(model, calibration=data, **params)
    step = {"op": "quantize.awq", "calibration": data, "sequential": True}
    with pytest.raises(RecipeError, match="sequential"):
        surgery.run({"parents": {"m": str(tiny("llama"))}, "steps": [step]}, tmp_path / "out")
