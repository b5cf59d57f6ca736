"""Models through the stream compute what transformers computes from decoded weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from folders import opaque_experts
from tiny_models import Build, edit_tensors, to_decoded, to_fp8
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from surgery.codecs.plain import Plain
from surgery.errors import CheckpointError, UsageError
from surgery.evaluate.load import load_model, unplaced_keys
from surgery.stream.checkpoint import Checkpoint, Part
from surgery.stream.files import StoredTensor
from surgery.stream.recode import recode
from surgery.stream.source import open_checkpoint

IDS = torch.randint(6, 260, (3, 17), generator=torch.Generator().manual_seed(0))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def of_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def add_mtp_layer(tensors: dict[str, torch.Tensor]) -> None:
    """A layer after the last one (layer 3), as in DeepSeek-V3."""
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        tensors[name.replace(".2.", ".3.", 1)] = tensors[name].clone()
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(64, 128)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_fp8_on_a_cpu_gives_the_logits_of_the_decoded_weights(
    build: Build, tmp_path: Path, family: str, dtype: str
) -> None:
    fp8 = to_fp8(build(family), tmp_path / "fp8")
    decoded = to_decoded(fp8, tmp_path / "decoded")
    loaded = load_model(open_checkpoint(fp8), dtype=dtype)
    assert torch.equal(logits(loaded.model), of_transformers(decoded, DTYPES[dtype]))
    assert (loaded.dtype, loaded.device.type, loaded.left_out) == (DTYPES[dtype], "cpu", ())
    assert not loaded.model.training


@pytest.mark.parametrize("family", ["gpt_oss_bf16", "llama4_text", "qwen3_moe"])
def test_published_layouts_of_experts_give_the_logits_of_transformers(tmp_path: Path, family: str) -> None:
    folder = getattr(factories, family)(tmp_path / family, 1)
    loaded = load_model(open_checkpoint(folder))
    assert torch.equal(logits(loaded.model), of_transformers(folder))


def test_tied_embeddings_count_once(build: Build) -> None:
    folder = build("llama", tie_word_embeddings=True)
    loaded = load_model(open_checkpoint(folder))
    assert torch.equal(logits(loaded.model), of_transformers(folder))
    assert loaded.parameters == sum(ref.numel for ref in open_checkpoint(folder).tensors.values())


def test_router_biases_stay_in_float32(build: Build) -> None:
    folder = build("deepseek_v3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    exact = torch.linspace(0.1, 0.2, 8)
    edit_tensors(folder, lambda tensors: tensors.update({name: exact}))
    state = load_model(open_checkpoint(folder), dtype="bfloat16").model.state_dict()
    assert torch.equal(state[name], exact)
    assert state["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_mtp_layers_are_left_out_and_named(build: Build) -> None:
    folder = build("deepseek_v3", num_nextn_predict_layers=1)
    expected = of_transformers(folder)
    edit_tensors(folder, add_mtp_layer)
    loaded = load_model(open_checkpoint(folder))
    assert torch.equal(logits(loaded.model), expected)
    assert "model.layers.3.eh_proj.weight" in loaded.left_out
    assert all(name.startswith("model.layers.3.") for name in loaded.left_out)
    assert unplaced_keys(open_checkpoint(folder)) == ((), ())


def test_a_lazy_checkpoint_loads_as_it_would_be_written(build: Build, tmp_path: Path) -> None:
    fp8 = to_fp8(build("deepseek_v3"), tmp_path / "fp8")
    source = open_checkpoint(fp8)

    def to_float32(name: str) -> Any:
        ref = source.tensors[name]
        return recode(
            ref, Plain("F32"), (Part("weight", StoredTensor(name, "F32", ref.shape, 4 * ref.numel), None),)
        )

    lazy = source.replace(tensors={name: to_float32(name) for name in source.tensors})
    assert torch.equal(logits(load_model(lazy).model), logits(load_model(source).model))


def spoil_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def spoil_unexpected(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.extra.weight"] = torch.ones(2)


def spoil_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 64)


@pytest.mark.parametrize(
    ("spoil", "name", "problem"),
    [
        (spoil_missing, "model.layers.1.mlp.up_proj.weight", "missing"),
        (spoil_unexpected, "model.layers.1.mlp.extra.weight", "unexpected"),
        (spoil_shape, "model.layers.1.mlp.up_proj.weight", "another shape"),
    ],
)
def test_every_tensor_must_find_its_place(build: Build, spoil: Any, name: str, problem: str) -> None:
    folder = build("llama")
    edit_tensors(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_model(open_checkpoint(folder))
    assert caught.value.table is not None
    ((named, why),) = caught.value.table.rows
    assert named.startswith(name)
    assert why == problem
    missing, unexpected = unplaced_keys(open_checkpoint(folder))
    assert [each.partition(" ")[0] for each in (missing if problem == "missing" else unexpected)] == [name]


def test_a_missing_expert_is_no_smaller_model(build: Build) -> None:
    folder = build("deepseek_v3")

    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def drop_one(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    edit_tensors(folder, drop_one)
    with pytest.raises(CheckpointError) as caught:
        load_model(open_checkpoint(folder))
    assert caught.value.table is not None
    assert caught.value.table.rows == ((name, "missing"),)
    assert unplaced_keys(open_checkpoint(folder)) == ((name,), ())


def test_experts_of_one_layer_have_one_shape(build: Build) -> None:
    folder = build("deepseek_v3")
    odd = {"model.layers.1.mlp.experts.3.up_proj.weight": torch.ones(95, 64)}
    edit_tensors(folder, lambda tensors: tensors.update(odd))
    for use in (load_model, unplaced_keys):
        with pytest.raises(CheckpointError, match="cannot load the tensors"):
            use(open_checkpoint(folder))


def test_fused_tensors_must_be_whole(tmp_path: Path) -> None:
    whole = open_checkpoint(factories.gpt_oss_bf16(tmp_path / "model", 1))
    kept = {name: ref for name, ref in whole.tensors.items() if ".experts.3." not in name}
    with pytest.raises(CheckpointError, match=r"weights of model\.layers\.0\.mlp\.experts"):
        load_model(whole.replace(tensors=kept))


def test_forms_that_cannot_be_decoded_are_named_before_anything_is_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(opaque_experts(factories.qwen3_moe(tmp_path / "model", 1)))
    with pytest.raises(CheckpointError, match="hqq") as caught:
        load_model(checkpoint)
    assert caught.value.table is not None
    assert all(".experts." in row[0] for row in caught.value.table.rows)


def test_a_config_that_transformers_does_not_know_is_refused(build: Build) -> None:
    checkpoint = open_checkpoint(build("llama"))
    for config in ({}, {**checkpoint.config, "model_type": "unheard_of"}):
        with pytest.raises(CheckpointError, match="transformers cannot build"):
            load_model(replace(checkpoint, config=config))


@pytest.mark.parametrize(("device", "dtype"), [("nowhere", None), ("cpu", "float64"), ("cpu", "int8")])
def test_devices_and_dtypes_are_checked_first(device: str, dtype: str | None) -> None:
    with pytest.raises(UsageError):
        load_model(Checkpoint({}, {}, None, {}, "x", ()), device=device, dtype=dtype)  # type: ignore[arg-type]


def remote_model(folder: Path, build: Build, marker: Path) -> Path:
    """A llama under a name of its own, whose code leaves a mark when it runs."""
    shutil.copytree(build("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "tiny_remote", "architectures": ["RemoteForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_remote.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n\n"
        f"Path({str(marker)!r}).touch()\n\n\n"
        "class RemoteConfig(LlamaConfig):\n    model_type = 'tiny_remote'\n"
    )
    (folder / "modeling_remote.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_remote import RemoteConfig\n\n\n"
        "class RemoteForCausalLM(LlamaForCausalLM):\n    config_class = RemoteConfig\n"
    )
    return folder


def test_remote_code_runs_only_when_it_is_allowed(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    marker = tmp_path / "it-ran"
    checkpoint = open_checkpoint(remote_model(tmp_path / "remote", build, marker))
    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)
    assert "allow remote code" in caught.value.hint
    assert not marker.exists()
    loaded = load_model(checkpoint, trust_remote_code=True)
    assert marker.exists()
    assert torch.equal(logits(loaded.model), of_transformers(tmp_path / "llama-0"))


def test_transformers_is_as_loud_afterwards_as_before(
    build: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(open_checkpoint(build("llama")))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert "Loading weights" not in capfd.readouterr().err


def test_progress_counts_tensors(build: Build) -> None:
    checkpoint = open_checkpoint(build("llama"))
    told: list[tuple[str, int, int]] = []
    load_model(checkpoint, progress=lambda *each: told.append(each), stage="x")
    assert told == [("x", done, len(checkpoint.tensors)) for done in range(1, len(checkpoint.tensors) + 1)]
