"""AIMER against its formula over the stored matrices, decoded here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import torch
from checkpoint_writer import decode_fp8
from folders import opaque_experts, strict_manifest
from safetensors.torch import load_file
from walk_models import Families

import surgery
from surgery.errors import CheckpointError
from surgery.operators.experts.aimer import aimer, sums


def by_formula(matrices: list[torch.Tensor]) -> float:
    flat = np.concatenate([each.double().numpy().ravel() for each in matrices])
    return float(np.abs(flat).mean() / math.sqrt((flat**2).mean()))


def run(folder: Path, out: Path, **params: Any) -> dict[int, Any]:
    recipe = {"parents": {"m": str(folder)}, "steps": [{"op": "experts.aimer", "keep": 3, **params}]}
    surgery.run(recipe, out)
    return {row["layer"]: row for row in strict_manifest(out)["measurements"][-1]["layers"]}


@pytest.mark.parametrize("important", ["low", "high"])
def test_scores_by_the_formula(tiny: Families, tmp_path: Path, important: str) -> None:
    rows = run(tiny("mixtral"), tmp_path / "out", important=important)
    stored = load_file(tiny("mixtral") / "model.safetensors")
    for layer, row in rows.items():
        where = f"model.layers.{layer}.block_sparse_moe.experts"
        scores = [
            by_formula([stored[f"{where}.{e}.{w}.weight"] for w in ("w1", "w2", "w3")]) for e in range(6)
        ]
        assert row["scores"] == pytest.approx(scores, rel=1e-9)
        order = np.argsort(scores) if important == "low" else np.argsort(scores)[::-1]
        assert row["kept"] == sorted(order[:3].tolist())


def test_scores_of_decoded_weights(tmp_path: Path) -> None:
    """FP8: scores are of values, not of codes; the prediction layer is not asked."""
    folder = factories.deepseek_v3(tmp_path / "model", 4, shards=1)
    rows = run(folder, tmp_path / "out", groups="ungrouped")
    stored = load_file(folder / "model.safetensors")
    assert sorted(rows) == [1, 2]
    for layer, row in rows.items():
        for expert, score in enumerate(row["scores"]):
            names = [
                f"model.layers.{layer}.mlp.experts.{expert}.{p}_proj.weight" for p in ("gate", "up", "down")
            ]
            matrices = [decode_fp8(stored[name], stored[f"{name}_scale_inv"]) for name in names]
            assert score == pytest.approx(by_formula(matrices), rel=1e-6)


def test_fused_experts(tiny: Families, tmp_path: Path) -> None:
    """Biases are no matrices, and gate and up interleave: neither may show."""
    rows = run(tiny("gpt_oss"), tmp_path / "out")
    stored = load_file(tiny("gpt_oss") / "model.safetensors")
    for layer, row in rows.items():
        where = f"model.layers.{layer}.mlp.experts"
        for expert, score in enumerate(row["scores"]):
            matrices = [stored[f"{where}.{name}"][expert] for name in ("gate_up_proj", "down_proj")]
            assert score == pytest.approx(by_formula(matrices), rel=1e-9)


def test_known_distributions() -> None:
    flat = torch.full((5, 7), -0.25)
    gaussian = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert aimer(*sums(flat), flat.numel()) == pytest.approx(1)
    assert aimer(*sums(gaussian), gaussian.numel()) == pytest.approx(math.sqrt(2 / math.pi), rel=5e-3)
    assert aimer(*sums(gaussian**3), gaussian.numel()) < 0.45
    assert aimer(0.0, 0.0, 9) == 0.0
    large = torch.full((3,), 2.0**70)
    assert aimer(*sums(large), 3) == pytest.approx(1)


def test_threads_do_not_change_scores(tiny: Families, tmp_path: Path) -> None:
    recipe = {"parents": {"m": str(tiny("olmoe"))}, "steps": [{"op": "experts.aimer", "keep": 3}]}
    found = []
    for threads in (1, 4):
        surgery.run(recipe, tmp_path / str(threads), threads=threads)
        found.append(strict_manifest(tmp_path / str(threads))["measurements"][-1])
    assert found[0] == found[1]


def test_forms_that_are_only_copied_are_refused_in_words(tmp_path: Path) -> None:
    folder = opaque_experts(factories.qwen3_moe(tmp_path / "model", 2))
    recipe = {"parents": {"m": str(folder)}, "steps": [{"op": "experts.aimer", "keep": 2}]}
    for action in (surgery.plan, lambda each: surgery.run(each, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="hqq"):
            action(recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
