"""Where the scales of inputs go, from names alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from brain_surgery import random_weights
from folders import change_shards
from walk_models import Families

import surgery
from surgery.operators.layerwise.select import by_layer
from surgery.operators.quantize.awq import AWQ, candidate_scales, divided
from surgery.operators.quantize.folds import (
    CLAMPED,
    FORM,
    GROUPED,
    KEPT,
    PARTLY,
    UNKNOWN,
    Fold,
    LayerFolds,
    layer_folds,
)

PREFIX = "model.layers.0."


def folds_of(folder: Path, kept: str = "", **config: Any) -> LayerFolds:
    """The folds of the first layer, whose matrices are all quantized but those with `kept` in their name."""
    model = surgery.open(folder)
    operator = AWQ.model_validate({"calibration": "d.jsonl", "group_size": 16})
    refs = by_layer(model)[0]
    works = {
        ref.name: work
        for ref in refs
        if (work := operator.work(ref)) is not None and not (kept and kept in ref.name)
    }
    return layer_folds(refs, works, {**model.config, **config}, model.architecture.experts)


def changed(folder: Path, target: Path, **more: torch.Tensor) -> Path:
    """A copy with other tensors of the first layer; `__` stands for a dot."""
    shutil.copytree(folder, target)
    named = {PREFIX + name.replace("__", "."): tensor for name, tensor in more.items()}
    return change_shards(target, lambda tensors: {**tensors, **named})


def test_a_dense_layer(tiny: Families) -> None:
    found = folds_of(tiny("llama"))
    shared = frozenset(f"{PREFIX}self_attn.{each}_proj.weight" for each in "qkv")
    fold = Fold(shared, norm=f"{PREFIX}input_layernorm.weight")
    assert all(found.folds[name] == fold for name in shared) and not found.reasons
    down = f"{PREFIX}mlp.down_proj.weight"
    assert found.folds[down] == Fold(frozenset({down}), rows=f"{PREFIX}mlp.up_proj.weight")
    norms = {f"{PREFIX}{name}_layernorm.weight" for name in ("input", "post_attention")}
    assert found.beside == norms


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"model_type": "novel"}, dict.fromkeys(("q_proj", "o_proj", "gate_proj", "down_proj"), UNKNOWN)),
        ({"kept": "k_proj"}, {"q_proj": PARTLY, "v_proj": PARTLY}),
        ({"kept": "up_proj"}, {"gate_proj": PARTLY, "down_proj": KEPT}),
        ({"clip_qkv": 8.0}, {"o_proj": CLAMPED}),
    ],
)
def test_what_stands_against_a_fold(tiny: Families, options: Any, reasons: dict[str, str]) -> None:
    found = folds_of(tiny("llama"), **options)
    told = {name.split(".")[-2]: reason for name, reason in found.reasons.items()}
    assert reasons.items() <= told.items()
    assert not set(found.folds) & set(found.reasons)


def test_a_reader_that_no_table_knows_forbids_the_fold(tiny: Families, tmp_path: Path) -> None:
    folder = changed(tiny("llama"), tmp_path / "m", self_attn__gate__weight=torch.ones(4, 64))
    found = folds_of(folder, kept="gate.weight")
    assert found.reasons[f"{PREFIX}self_attn.q_proj.weight"] == UNKNOWN
    assert f"{PREFIX}self_attn.o_proj.weight" in found.folds


def test_a_norm_with_a_bias_is_none_of_ours(tiny: Families, tmp_path: Path) -> None:
    found = folds_of(changed(tiny("llama"), tmp_path / "m", input_layernorm__bias=torch.ones(64)))
    assert found.reasons[f"{PREFIX}self_attn.v_proj.weight"] == FORM


def test_grouped_queries_share_values(tiny: Families) -> None:
    found = folds_of(tiny("llama", num_key_value_heads=2))
    assert found.reasons == {f"{PREFIX}self_attn.o_proj.weight": GROUPED}


def test_a_vector_is_divided_by_what_is_told(tiny: Families, tmp_path: Path) -> None:
    """Whatever its form, zeros and values that would vanish included."""
    weight = random_weights(1, 1, 64, seed=1)[0, 0].to(torch.float16)
    weight[3], weight[9] = 0, 6e-8
    folder = changed(tiny("llama"), tmp_path / "m", input_layernorm__weight=weight)
    ref = surgery.open(folder).tensors[f"{PREFIX}input_layernorm.weight"]
    scales = torch.rand(64) + 0.5
    scales[9] = 1000
    made, exact = divided(ref, scales)
    stored = torch.from_numpy(made.raw["weight"]).view(torch.float16).double()
    assert torch.allclose(stored * exact.double(), weight.double(), rtol=1e-7, atol=0)
    assert exact[3] == exact[9] == 1 and not torch.equal(exact, scales)
    others = torch.ones(64, dtype=torch.bool)
    others[[3, 9]] = False
    assert torch.allclose(exact[others], scales[others], rtol=1e-3)


def test_inputs_that_never_occur_keep_their_scale() -> None:
    inputs, means = torch.rand(1, 12) + 0.1, torch.rand(1, 12)
    inputs[0, [2, 7]] = 0
    seen = inputs[0] > 0
    found = candidate_scales(inputs, means)
    assert (found[:, 0, ~seen] == 1).all()
    assert torch.equal(found[:, :, seen], candidate_scales(inputs[:, seen], means[:, seen]))
