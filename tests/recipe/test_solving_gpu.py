"""Solving on a GPU: as good as on the CPU, and the same again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import file_hashes, strict_manifest
from tiny_models import to_fp8
from walk_models import Families, demos
from walk_runs import CONTEXT

import surgery

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS: list[dict[str, Any]] = [
    {"op": "quantize.gptq", "bits": 3, "group_size": 16},
    {"op": "quantize.gptq", "bits": 4, "group_size": 16, "act_order": True, "symmetric": False},
    {"op": "sparsify.sparsegpt", "pattern": "2:4"},
    {"op": "sparsify.sparsegpt", "sparsity": 0.5},
    {"op": "sparsify.admm", "sparsity": 0.5},
    {"op": "sparsify.wanda", "sparsity": 0.5},
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: "-".join(map(str, step.values())))
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_errors_are_those_of_the_cpu(
    tiny: Families, tmp_path: Path, family: str, step: dict[str, Any]
) -> None:
    folder = to_fp8(tiny(family), tmp_path / "model") if family == "deepseek_v3" else tiny(family)
    data = demos(tmp_path / "d.jsonl", repeat=6)
    document = {"parents": {"model": str(folder)}, "steps": [{**step, "calibration": str(data)}]}
    found: dict[str, list[float]] = {}
    for name, device in (("cpu", "cpu"), ("gpu", "cuda"), ("again", "cuda")):
        context = replace(CONTEXT, device=device, dtype="float32")
        surgery.run(document, tmp_path / name, context=context, threads=1)
        table = strict_manifest(tmp_path / name)["measurements"][0]
        found[name] = [row[table["columns"].index("error")] for row in table["rows"]]
    squares = {name: sum(error**2 for error in errors) for name, errors in found.items()}
    assert squares["gpu"] == pytest.approx(squares["cpu"], rel=0.03)
    one, two = (file_hashes(tmp_path / name) for name in ("gpu", "again"))
    assert one["model.safetensors"] == two["model.safetensors"]
