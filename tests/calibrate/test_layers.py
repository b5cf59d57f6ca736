"""Layers built one at a time: nothing stays behind, and what does not fit is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import change_config
from tiny_models import edit_tensors
from walk_models import CPU, Families, run, sequences, walked, whole

import surgery
from surgery.calibrate.batches import make_batches
from surgery.calibrate.layers import LayeredModel
from surgery.errors import CheckpointError


def layered(folder: Path, dtype: torch.dtype = torch.float32) -> LayeredModel:
    return LayeredModel(surgery.open(folder), CPU, dtype)


def real_bytes(model: LayeredModel) -> int:
    """Of the whole model, what is not on the meta device."""
    tensors = [*model._model.parameters(), *model._model.buffers()]
    tensors += [each for layer in model._layers for each in (*layer.parameters(), *layer.buffers())]
    return sum(each.nbytes for each in tensors if not each.is_meta)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "llama4_text", "qwen2"])
def test_one_layer_at_a_time(tiny: Families, family: str) -> None:
    """Before, between and after, no weight is in memory; within, the dense part of a layer alone."""
    model = layered(tiny(family), torch.bfloat16)
    reference = whole(tiny(family))
    assert real_bytes(model) == 0
    for index in range(model.num_layers):
        built = model.load_layer(index, model.refs(index))
        names = [] if built.experts is None else [n for n, _ in built.experts.named_parameters()]
        wanted = sum(
            each.numel() for name, each in reference.model.layers[index].named_parameters()
            if ".experts." not in f".{name}" or not names
        )  # fmt: skip
        found = [each for each in built.module.parameters() if not each.is_meta]
        assert sum(each.numel() for each in found) == wanted
        assert (built.experts is not None) == (".experts." in str(
            [name for name, _ in reference.model.layers[index].named_parameters()]
        ) and family != "llama4_text")  # fmt: skip
        model.free_layer(built)
        assert real_bytes(model) == 0
    with model.begin() as embedder:
        embedder.embed(torch.tensor([[6, 7]]))
    assert real_bytes(model) == 0
    with model.end():
        assert real_bytes(model) > 0
    assert real_bytes(model) == 0


def test_sizes(tiny: Families) -> None:
    model = layered(tiny("glm4_moe"))
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (3, 64, 320)


def test_tied_heads_and_separate_ones(tiny: Families, tmp_path: Path) -> None:
    """A head that config.json ties is the embedding; one that it does not tie must be there."""
    folder = Path(shutil.copytree(tiny("qwen2"), tmp_path / "model"))
    ids = torch.tensor([[6, 9, 8]])
    (batch,) = make_batches([(0, ids[0].tolist())], 10)
    (logits,) = walked(surgery.open(folder), [batch]).logits()
    assert torch.equal(logits, run(whole(folder), ids))
    change_config(folder, tie_word_embeddings=False)
    walk = walked(surgery.open(folder), [batch])
    with pytest.raises(CheckpointError, match="head"):
        list(walk.logits())


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def reshape(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    return change


def add(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.ones(3)

    return change


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", drop("model.layers.1.self_attn.q_proj.weight"), "layers.1.self_attn.q_proj.weight"),
        ("llama", drop("model.norm.weight"), "norm.weight"),
        ("llama", drop("model.embed_tokens.weight"), "embed_tokens.weight"),
        ("llama", reshape("model.layers.0.mlp.up_proj.weight"), "layers.0.mlp.up_proj.weight"),
        ("llama", add("model.layers.0.mlp.extra.weight"), "layers.0.mlp.extra.weight"),
        ("deepseek_v3", drop("model.layers.1.mlp.gate.weight"), "layers.1.mlp.gate.weight"),
        (
            "deepseek_v3",
            drop("model.layers.2.mlp.experts.3.up_proj.weight"),
            "expert 3 has no up_proj.weight",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tiny: Families, tmp_path: Path, family: str, change: Any, named: str
) -> None:
    folder = Path(shutil.copytree(tiny(family), tmp_path / "model"))
    edit_tensors(folder, change)
    batches = make_batches(sequences((30,)), 100)
    with pytest.raises(CheckpointError) as caught:
        list(walked(surgery.open(folder), batches).logits())
    table = caught.value.table
    assert named in caught.value.message or (table and named in str(table.rows))


def test_unknown_architectures(tiny: Families, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    change_config(folder, model_type="never_heard_of", architectures=["NeverHeardOf"])
    with pytest.raises(CheckpointError, match="never_heard_of"):
        layered(folder)
