"""The consumer's view: transformers loads a child by itself and computes what its tensors say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import deepseek_v3, qwen3_moe, vary
from oracle import model_tensors

import surgery
from surgery.evaluate.load import load_model, unplaced_keys

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def chimera(folder: Path, weight: float, **options: object) -> Path:
    base, other = surgery.open(folder / "a", "a"), surgery.open(folder / "b", "b")
    child = surgery.merge.aoe(
        {"a": base, "b": other}, base="a", weights={"b": weight}, select=["routed_expert"]
    )
    return child.save(folder / "child", **options).folder


@pytest.mark.parametrize(("weight", "form"), [(1.0, "source"), (0.5, "source"), (0.5, "bf16")])
def test_deepseek_child_computes_what_its_tensors_say(tmp_path: Path, weight: float, form: str) -> None:
    from transformers import AutoModelForCausalLM

    deepseek_v3(tmp_path / "a", 1, ragged=False)
    vary(tmp_path / "a", tmp_path / "b", 2, 0.2)
    child = chimera(tmp_path, weight, format=form)
    options = {"dtype": torch.float32}
    if form == "source":
        from transformers import FineGrainedFP8Config

        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(child, **options)
    ours = load_model(surgery.open(child)).model
    with torch.no_grad():
        expected = theirs(TOKENS).logits.float()
        found = ours(TOKENS).logits.float()
    assert torch.equal(found, expected)
    decoded = model_tensors(child)
    name = "model.layers.1.mlp.shared_experts.up_proj.weight"
    weight_of = dict(ours.named_parameters())[name]
    assert torch.equal(weight_of, decoded[name])


def test_every_family_places_every_tensor(tmp_path: Path) -> None:
    deepseek_v3(tmp_path / "v3", 1, ragged=False)
    qwen3_moe(tmp_path / "qwen", 1)
    for name in ("v3", "qwen"):
        assert unplaced_keys(surgery.open(tmp_path / name)) == ((), ())
