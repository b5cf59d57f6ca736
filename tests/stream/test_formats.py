"""Output formats against the oracle: what is converted, what stays, and the config that says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import numpy as np
import oracle
import pytest
import torch
from folders import Tensors, change_config, change_shards, check_written, opaque_experts

from surgery.errors import CheckpointError, PlanError, UsageError
from surgery.operators.merge.aoe import AssemblyOfExperts
from surgery.stream.checkpoint import Checkpoint
from surgery.stream.formats import apply_format
from surgery.stream.save import SaveResult
from surgery.stream.source import open_checkpoint

SIZES: dict[str, Any] = {"layers": 2, "experts": 2, "hidden": 160, "moe_intermediate": 96}
Stored = dict[str, oracle.StoredTensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    return {
        "fp8": factories.deepseek_v3(folder / "fp8", 1, **SIZES),
        "bf16": factories.deepseek_v3(folder / "bf16", 2, fp8=False, **SIZES),
        "ue8m0": factories.deepseek_v3(folder / "ue8m0", 3, scale_fmt="ue8m0", **SIZES),
        "e8m0": factories.deepseek_v3(folder / "e8m0", 3, scale_fmt="ue8m0", e8m0_storage=True, **SIZES),
    }


def bf16_bytes(values: torch.Tensor) -> bytes:
    bits = values.contiguous().numpy().astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def saved(checkpoint: Checkpoint, out: Path, form: Any) -> tuple[SaveResult, Stored, dict[str, Any]]:
    result = checkpoint.save(out, format=form, shard_bytes=300_000)
    check_written(out, checkpoint.tensors)
    return result, oracle.read_folder(out), json.loads((out / "config.json").read_text())


def is_quantized(name: str) -> bool:
    """Matrices that DeepSeek's FP8 checkpoints quantize."""
    linear = ("self_attn" in name or ".mlp." in name) and "norm" not in name and ".mlp.gate." not in name
    return linear and name.endswith(".weight")


@pytest.mark.parametrize("model", ["fp8", "bf16", "ue8m0", "e8m0"])
def test_bf16_has_every_weight_rounded_once_and_keeps_fp32_routers(
    models: dict[str, Path], tmp_path: Path, model: str
) -> None:
    _, stored, config = saved(open_checkpoint(models[model]), tmp_path / "out", "bf16")
    values, before = oracle.model_tensors(models[model]), oracle.read_folder(models[model])
    assert stored.keys() == values.keys()
    for name, (dtype, shape, raw) in stored.items():
        if name.endswith("e_score_correction_bias"):
            assert (dtype, shape, raw) == before[name]
        else:
            assert (dtype, shape) == ("BF16", tuple(values[name].shape))
            assert raw == bf16_bytes(values[name]), name
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        models[model] / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("model", ["fp8", "bf16", "ue8m0", "e8m0"])
def test_fp8_block_encodes_linear_weights_with_fp32_scales_and_says_so(
    models: dict[str, Path], tmp_path: Path, model: str
) -> None:
    _, stored, config = saved(open_checkpoint(models[model]), tmp_path / "out", "fp8-block")
    values, before = oracle.model_tensors(models[model]), oracle.read_folder(models[model])
    if model == "fp8":
        assert stored == before
        assert config == json.loads((models[model] / "config.json").read_text())
        return
    for name, value in values.items():
        if is_quantized(name):
            codes, scales = oracle.encode_fp8_block(value)
            assert stored.pop(name) == ("F8_E4M3", tuple(value.shape), codes.numpy().tobytes()), name
            want = ("F32", tuple(scales.shape), scales.numpy().tobytes())
            assert stored.pop(f"{name}_scale_inv") == want, name
        else:
            assert stored.pop(name) == before[name], name
    assert not stored
    told = config["quantization_config"]
    assert (told["quant_method"], told["fmt"], told["weight_block_size"]) == ("fp8", "e4m3", [128, 128])
    assert "scale_fmt" not in told
    if model != "bf16":
        old = json.loads((models[model] / "config.json").read_text())["quantization_config"]
        assert {**told, "scale_fmt": "ue8m0"} == old
        return
    kept = set(told["modules_to_not_convert"])
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.2.eh_proj"} <= kept
    assert not any(is_quantized(f"{name}.weight") for name in kept)


def test_there_and_back_is_nearly_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    """fp8 → bf16 → fp8-block: bf16 holds code · scale only nearly, so that values may move by a rounding."""
    saved(open_checkpoint(models["fp8"]), tmp_path / "bf16", "bf16")
    _, stored, _ = saved(open_checkpoint(tmp_path / "bf16"), tmp_path / "fp8", "fp8-block")
    assert stored.keys() == oracle.read_folder(models["fp8"]).keys()
    before, after = oracle.model_tensors(models["fp8"]), oracle.model_tensors(tmp_path / "fp8")
    for name in before:
        if is_quantized(name):
            assert float((after[name] - before[name]).abs().max()) <= float(before[name].abs().max()) * 2**-4
        else:
            assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("form", ["bf16", "fp8-block"])
def test_a_merge_is_rounded_to_the_output_format_alone(
    models: dict[str, Path], tmp_path: Path, form: Any
) -> None:
    pair = {"base": open_checkpoint(models["fp8"], "base"), "other": open_checkpoint(models["bf16"], "other")}
    child = AssemblyOfExperts(base="base", weights={"other": 0.5}).apply(pair)
    _, stored, _ = saved(child, tmp_path / "out", form)
    left, right = oracle.model_tensors(models["fp8"]), oracle.model_tensors(models["bf16"])
    for name in left:
        if is_quantized(name):
            total = oracle.weighted_sum([left[name], right[name]], [0.5, 0.5])
            if form == "bf16":
                assert stored[name][2] == bf16_bytes(total), name
            else:
                codes, scales = oracle.encode_fp8_block(total)
                assert stored[name][2] == codes.numpy().tobytes(), name
                assert stored[f"{name}_scale_inv"][2] == scales.numpy().tobytes(), name


def test_what_is_stored_otherwise_is_converted_even_where_a_merge_copies(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Equal parents and a threshold above all choose the base's tensor, which then must still be bf16."""
    pair = {"base": open_checkpoint(models["fp8"], "base"), "twin": open_checkpoint(models["fp8"], "twin")}
    want = oracle.read_folder(open_checkpoint(models["fp8"]).save(tmp_path / "want", format="bf16").folder)
    for number, threshold in enumerate((0.0, 1e9)):
        child = AssemblyOfExperts(base="base", weights={"twin": 0.5}, threshold=threshold).apply(pair)
        _, stored, _ = saved(child, tmp_path / str(number), "bf16")
        assert stored == want


def test_the_config_of_fp8_block_is_true_of_a_base_that_keeps_some_modules_in_bf16(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """transformers does not dequantize what the list names: it would load codes as weights."""
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    value = oracle.model_tensors(models["fp8"])[name].to(torch.bfloat16)

    def plain(tensors: Tensors) -> Tensors:
        kept = {key: tensor for key, tensor in tensors.items() if key != f"{name}_scale_inv"}
        return kept | ({name: value} if name in tensors else {})

    folder = change_shards(shutil.copytree(models["fp8"], tmp_path / "m"), plain)
    config = json.loads((folder / "config.json").read_text())
    told = {**config["quantization_config"], "modules_to_not_convert": ["kv_b_proj", "lm_head"]}
    change_config(folder, quantization_config=told)
    _, stored, config = saved(open_checkpoint(folder), tmp_path / "out", "fp8-block")
    converted = stored[name][0] == "F8_E4M3"
    listed = any(each in name for each in config["quantization_config"]["modules_to_not_convert"])
    assert converted != listed


@pytest.mark.parametrize("form", ["bf16", "fp8-block"])
def test_integer_buffers_pass_through(tmp_path: Path, form: Any) -> None:
    """E.g. the position ids of vision towers."""
    folder = change_shards(factories.llama(tmp_path / "m", 1), lambda tensors: {
        **tensors, **({"vision.position_ids": torch.arange(5)} if "lm_head.weight" in tensors else {}),
    })  # fmt: skip
    _, stored, _ = saved(open_checkpoint(folder), tmp_path / "out", form)
    assert stored["vision.position_ids"] == oracle.read_folder(folder)["vision.position_ids"]


@pytest.mark.parametrize("form", ["bf16", "fp8-block"])
def test_packed_experts_cannot_be_converted(tmp_path: Path, form: Any) -> None:
    checkpoint = open_checkpoint(opaque_experts(factories.qwen3_moe(tmp_path / "m", 1, experts=4)))
    with pytest.raises(PlanError, match="hqq") as caught:
        checkpoint.save(tmp_path / "out", format=form)
    assert "output.format=source" in caught.value.hint
    assert caught.value.table is not None
    assert len(caught.value.table.rows) == 2 * 4 * 3


def test_mxfp4_experts_have_no_fp8_block(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="fused"):
        open_checkpoint(factories.gpt_oss_mxfp4(tmp_path / "m", 1)).save(tmp_path / "out", format="fp8-block")


@pytest.mark.parametrize("factory", [factories.gpt_oss_bf16, factories.llama4_text], ids=lambda f: f.__name__)
def test_fused_experts_have_no_fp8_block_and_a_bf16(tmp_path: Path, factory: Callable[..., Path]) -> None:
    folder = factory(tmp_path / "m", 1)
    with pytest.raises(PlanError, match="fused"):
        open_checkpoint(folder).save(tmp_path / "out", format="fp8-block")
    wide = change_shards(
        folder, lambda tensors: {key: value.to(torch.float32) for key, value in tensors.items()}
    )
    values = oracle.model_tensors(wide)
    _, stored, _ = saved(open_checkpoint(wide), tmp_path / "out", "bf16")
    for name, (dtype, shape, raw) in stored.items():
        if dtype == "BF16":
            assert shape == tuple(values[name].shape)
            assert raw == bf16_bytes(values[name]), name
        else:
            assert "router" in name


def test_a_model_with_nothing_to_convert_is_refused(tmp_path: Path) -> None:
    folder = change_config(factories.llama(tmp_path / "m", 1), model_type="brand_new")
    with pytest.raises(PlanError, match="nothing to convert"):
        open_checkpoint(folder).save(tmp_path / "out", format="fp8-block")


def test_config_follows_the_other_name_of_the_dtype(tmp_path: Path) -> None:
    folder = change_config(factories.llama(tmp_path / "m", 1, dtype=torch.float16), dtype="float16")
    _, _, config = saved(open_checkpoint(folder), tmp_path / "out", "bf16")
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_wrapped_models_keep_no_trace_of_the_old_form(tmp_path: Path) -> None:
    folder = factories.llama4_text(tmp_path / "m", 1, wrapped=True)
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, text_config={**config["text_config"], "torch_dtype": "float32"})
    change_shards(folder, lambda tensors: {key: value.to(torch.float32) for key, value in tensors.items()})
    _, _, config = saved(open_checkpoint(folder), tmp_path / "out", "bf16")
    assert config["text_config"]["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "rows",
    [slice(0, 5), slice(128, 200), slice(5, 10), slice(100, 200)],
    ids=str,
)
def test_rows_of_a_converted_tensor_are_rows_of_what_it_is_made_from(
    models: dict[str, Path], rows: slice
) -> None:
    """Or a refusal, where they do not begin with a block of the FP8 tensor below."""
    name = "model.layers.0.mlp.gate_proj.weight"
    ref = apply_format(open_checkpoint(models["fp8"]), "bf16").tensors[name]
    try:
        found = ref.read(rows)
    except (UsageError, CheckpointError):
        assert rows.start % 128
        return
    assert torch.equal(found, oracle.model_tensors(models["fp8"])[name][rows])
