"""Norms and cosines of task vectors over the whole model, as manifest and report tell them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_methods import child, write

from surgery.report.by_role import cosines_in_words, norm_rows
from surgery.report.html import render_report
from surgery.stream.source import open_checkpoint

SHAPES = {
    "model.embed_tokens.weight": (32, 24),
    "model.layers.0.self_attn.q_proj.weight": (130, 24),
    "model.layers.0.mlp.up_proj.weight": (61, 24),
    "model.layers.1.mlp.up_proj.weight": (61, 24),
    "model.norm.weight": (24,),
}
SAME = "model.layers.1.mlp.up_proj.weight"
ROLES = {"embedding", "attention", "dense_mlp", "norm"}


def family(tmp_path: Path) -> tuple[dict[str, Path], dict[str, dict[str, torch.Tensor]]]:
    random = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    common = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    values = {"base": base}
    for label, size in (("a", 0.1), ("b", 0.4), ("c", 0.2)):
        values[label] = {
            name: held + (name != SAME) * size * (common[name] + torch.randn(held.shape, generator=random))
            for name, held in base.items()
        }
    return {label: write(tmp_path / label, tensors) for label, tensors in values.items()}, values


def rows_of(manifest: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["source"], row["role"]): row for row in norm_rows(manifest)}


def task_vector(values: dict[str, dict[str, torch.Tensor]], label: str, part: str) -> torch.Tensor:
    names = [name for name in SHAPES if part in name]
    return torch.cat([(values[label][n].double() - values["base"][n].double()).flatten() for n in names])


@pytest.mark.parametrize(("op", "params"), [("ties", {}), ("task_arithmetic", {}), ("model_stock", None)])
def test_norms_and_cosines_are_those_of_float64(op: str, params: Any, tmp_path: Path) -> None:
    folders, values = family(tmp_path)
    inputs = {label: open_checkpoint(folder, label) for label, folder in folders.items()}
    models: dict[str, Any] = {label: {} if params is None else {"weight": 0.5} for label in "abc"}
    manifest = child(inputs, op, base="base", models=models).save(tmp_path / "out").manifest
    rows = rows_of(json.loads(json.dumps(manifest)))
    assert {role for _, role in rows} == {"all", *ROLES}
    for role, part in (("all", ""), ("attention", "self_attn"), ("dense_mlp", "mlp"), ("norm", "norm")):
        taus = {label: task_vector(values, label, part) for label in "abc"}
        for label, tau in taus.items():
            row = rows[label, role]
            assert row["weights"] == tau.numel()
            assert row["norm"] == pytest.approx(float(tau.norm()), rel=1e-6)
            assert row["rms"] == pytest.approx(float(tau.square().mean().sqrt()), rel=1e-6)
            assert row["cosine"].keys() == taus.keys() - {label}
            for other, cosine in row["cosine"].items():
                want = float(tau @ taus[other] / (tau.norm() * taus[other].norm()))
                assert cosine == pytest.approx(want, abs=1e-6)


def test_a_source_that_is_the_base_has_no_direction(tmp_path: Path) -> None:
    folders, _ = family(tmp_path)
    inputs = {label: open_checkpoint(folders["base" if label == "b" else label], label) for label in folders}
    made = child(inputs, "task_arithmetic", base="base", models={"a": 1, "b": 1})
    rows = rows_of(dict(made.save(tmp_path / "out").manifest))
    assert rows["b", "all"]["norm"] == 0.0
    assert rows["a", "all"]["cosine"] == {"b": None} and cosines_in_words(rows["a", "all"]) == ""


def test_the_page_shows_them_and_no_section_without(tmp_path: Path) -> None:
    folders, _ = family(tmp_path)
    inputs = {label: open_checkpoint(folder, label) for label, folder in folders.items()}
    models = {"a": 1, "b": 1}
    manifest = dict(child(inputs, "ties", base="base", models=models).save(tmp_path / "out").manifest)
    page = render_report(manifest)
    row = rows_of(manifest)["b", "all"]
    assert 'id="task-vectors"' in page and f"{row['norm']:.3g}" in page and cosines_in_words(row) in page
    plain = dict(child(inputs, "linear", models=models).save(tmp_path / "mean").manifest)
    assert not norm_rows(plain) and 'id="task-vectors"' not in render_report(plain)
