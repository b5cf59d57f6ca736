"""What fewer bits do to outputs, against transformers' whole model with hooks, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from walk_models import Families, demos, experts_of, run, whole

import surgery
from surgery.codecs.schemes import IntScheme, parse_scheme
from surgery.operators.layerwise import operator
from surgery.operators.layerwise.sensitivity import Rounder, UnitSums
from surgery.operators.protocol import RunContext
from surgery.operators.together import demonstrations
from surgery.recipe.allocate import measure
from surgery.recipe.bits import open_task
from surgery.stream.checkpoint import Checkpoint

NAMES = ("int2-g16", "int4-channel")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return demos(tmp_path / "d.jsonl", repeat=3)


def rounded(weights: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Symmetric codes on bfloat16 scales, group by group, from the formula."""
    found = torch.empty_like(weights)
    for start in range(0, weights.shape[1], width):
        group = weights[:, start : start + width]
        scale = (2 * group.abs().amax(1, keepdim=True) / (2**bits - 1)).float().bfloat16().double()
        half = 2 ** (bits - 1)
        found[:, start : start + width] = (group / scale).round().clamp(-half, half - 1) * scale
    return found


def taken(checkpoint: Checkpoint, calibration: Any) -> dict[str, torch.Tensor]:
    """The inputs [tokens, columns] of every matrix by its name, experts' included: float64."""
    model, found = whole(checkpoint), dict[str, list[torch.Tensor]]()

    def dense(name: str) -> Any:
        return lambda module, args: found.setdefault(name, []).append(args[0].flatten(0, -2).double())

    def routed(layer: int) -> Any:
        def take(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            hidden, index = args[0].flatten(0, -2).double(), args[1]
            for expert in range(module.num_experts):
                rows = hidden[(index == expert).any(-1)]
                stem = f"model.layers.{layer}.mlp.experts.{expert}"
                gate, up = (
                    checkpoint.tensors[f"{stem}.{each}_proj.weight"].read().double()
                    for each in ("gate", "up")
                )
                inner = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
                for each, x in (("gate", rows), ("up", rows), ("down", inner)):
                    found.setdefault(f"{stem}.{each}_proj.weight", []).append(x)

        return take

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in path:
            module.register_forward_pre_hook(dense(f"{path}.weight"))
    for number, layer in enumerate(model.model.layers):
        experts = experts_of(layer)
        if experts is not None:
            experts.register_forward_pre_hook(routed(number))
    for _, ids in demonstrations(calibration, checkpoint, RunContext()).found.sequences:
        run(model, torch.tensor([ids]))
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_errors_are_those_of_the_outputs(
    tiny: Families, data: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one wave and in many."""
    task = open_task(tiny(family), str(data), NAMES)
    inputs = taken(task.checkpoint, task.walking.calibration)
    found = measure(task, RunContext()).errors
    monkeypatch.setattr(operator, "sums_room", lambda context: 1)
    monkeypatch.setattr(operator, "solver_room", lambda context: 1)
    again = measure(task, RunContext()).errors
    assert {unit.role for unit in task.units} == {
        "attention", "dense_mlp" if family == "llama" else "routed_expert",
    }  # fmt: skip
    for unit, errors, others in zip(task.units, found, again, strict=True):
        whole_, lost = 0.0, [0.0, 0.0]
        for name in unit.names:
            weights, x = task.checkpoint.tensors[name].read().double(), inputs[name]
            whole_ += float((x @ weights.T).square().sum())
            for index, (bits, width) in enumerate(((2, 16), (4, weights.shape[1]))):
                lost[index] += float((x @ (rounded(weights, bits, width) - weights).T).square().sum())
        assert errors == pytest.approx([each / whole_ for each in lost], rel=2e-3)
        assert others == pytest.approx(errors, rel=1e-4)
        assert errors[0] > errors[1]


@pytest.mark.parametrize("name", ["fp8-channel", "mxfp4", "int3-g32-asym", "fp8-block"])
def test_a_rounder_gives_what_rounding_to_nearest_stores(tiny: Families, name: str) -> None:
    checkpoint = surgery.open(tiny("llama"))
    child = surgery.quantize.rtn(checkpoint, schemes={"dense_mlp": name, "attention": "keep"})
    scheme = parse_scheme(name)
    assert scheme is not None
    names = [f"model.layers.0.mlp.{each}_proj.weight" for each in ("gate", "up")]
    stack = torch.cat([checkpoint.tensors[each].read() for each in names])[None]
    values = Rounder(scheme).values(stack, [160, 160])[0]
    for each, part in zip(names, values.split(160), strict=True):
        assert torch.equal(part, child.tensors[each].read())


def test_without_tokens_the_weights_alone_count() -> None:
    assert UnitSums(0.0, [0.0, 0.0], 4.0, [2.0, 1.0]).errors == [0.5, 0.25]
    assert UnitSums(8.0, [2.0, 1.0], 4.0, [2.0, 1.0]).errors == [0.25, 0.125]
    assert UnitSums(0.0, [0.0], 0.0, [0.0]).errors == [0.0]


def test_a_shrunk_grid_is_measured_as_such() -> None:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(1, 6, 32, generator=generator) ** 3
    scheme = IntScheme(2, 16)
    errors = [
        float((Rounder(scheme, grid).values(weights, [6]) - weights).abs().pow(2.4).sum())
        for grid in ("absmax", "mse")
    ]
    assert errors[1] < 0.9 * errors[0]
