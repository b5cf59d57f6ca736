"""Writing GPTQ, AWQ, NF4 and MXFP4: codes carried over bit for bit, configs as their loaders read them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import oracle
import pytest
import torch
from folders import change_config, change_shards
from packed_folders import integers, nf4

from surgery.codecs.codec import IntCodec
from surgery.codecs.nf4 import Bnb4, encode_nf4
from surgery.codecs.schemes import IntScheme
from surgery.errors import CheckpointError, PlanError
from surgery.recipe.verify import verify
from surgery.stream.checkpoint import Checkpoint, StoredRef
from surgery.stream.packed_configs import packed_contradictions
from surgery.stream.source import open_checkpoint


def written(checkpoint: Checkpoint, folder: Path, form: Any) -> Checkpoint:
    found = open_checkpoint(checkpoint.save(folder, format=form).folder)
    checked = verify(folder, recompute=None, load=False)
    assert checked.ok, checked.checks
    return found


def codes_of(checkpoint: Checkpoint, name: str) -> tuple[torch.Tensor, ...]:
    ref = checkpoint.tensors[name]
    assert isinstance(ref, StoredRef) and isinstance(ref.codec, IntCodec)
    raw = {part.key: ref.raw(part, 0, ref.rows) for part in ref.parts}
    return tuple(ref.codec.quantized(ref.shape, raw))


ROUTES = [
    (IntScheme(2, 32), ["gptq-v2", "compressed-tensors", "gptq"]),
    (IntScheme(3, 32, False), ["compressed-tensors", "gptq-v2", "gptq"]),
    (IntScheme(4, 32), ["awq", "gptq", "compressed-tensors", "gptq-v2", "awq"]),
    (IntScheme(4, 0, False), ["gptq-v2", "awq", "compressed-tensors", "gptq"]),
    (IntScheme(8, 16, False), ["gptq-v2", "compressed-tensors", "gptq"]),
]


@pytest.mark.parametrize(("scheme", "route"), ROUTES, ids=str)
def test_codes_survive_every_change_of_layout(tmp_path: Path, scheme: IntScheme, route: list[str]) -> None:
    folder, made = integers(tmp_path / "m", "gptq", scheme)
    checkpoint = open_checkpoint(folder)
    for number, form in enumerate(route):
        checkpoint = written(checkpoint, tmp_path / str(number), form)
        for name, want in made.items():
            found = codes_of(checkpoint, name)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True)), (form, name)
    again = written(open_checkpoint(folder), tmp_path / "again", "gptq-v2")
    back = written(again, tmp_path / "back", "gptq")
    assert oracle.read_folder(tmp_path / "back") == oracle.read_folder(folder)
    assert back.quantization["bits"] == scheme.bits and back.quantization["sym"] == scheme.symmetric


def test_gptq_configs(tmp_path: Path) -> None:
    folder, _ = integers(tmp_path / "m", "gptq", IntScheme(4, 32))
    found = written(open_checkpoint(folder), tmp_path / "v2", "gptq-v2").quantization
    assert found == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        "lm_head": False, "checkpoint_format": "gptq_v2", "pack_dtype": "int32",
        "meta": {"quantizer": ["llm-surgery"]},
    }  # fmt: skip


def mixed(tmp_path: Path) -> tuple[Path, str]:
    """4 bits, but 8 in down_proj, and o_proj of layer 1 not quantized."""
    folder, _ = integers(tmp_path / "m", "gptq", IntScheme(4, 32))
    _, _ = integers(tmp_path / "o", "gptq", IntScheme(8, 16, False))
    eight = oracle_tensors(tmp_path / "o")
    plain = oracle_tensors(factories.llama(tmp_path / "p", 1))
    kept = "model.layers.1.self_attn.o_proj"

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {n: eight[n] if ".down_proj." in n else t for n, t in tensors.items() if kept not in n}
        return found | ({f"{kept}.weight": plain[f"{kept}.weight"]} if f"{kept}.qweight" in tensors else {})

    change_shards(folder, change)
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    told["dynamic"] = {".*down_proj": {"bits": 8, "group_size": 16, "sym": False}, f"-:{kept}": {}}
    return change_config(folder, quantization_config=told), kept


def oracle_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_mixed_schemes_stand_in_dynamic_patterns(tmp_path: Path) -> None:
    folder, kept = mixed(tmp_path)
    source = open_checkpoint(folder)
    found = written(source, tmp_path / "v2", "gptq-v2")
    for name, ref in source.tensors.items():
        assert torch.equal(found.tensors[name].read(), ref.read())
    dynamic = found.quantization["dynamic"]
    for name, ref in source.tensors.items():
        module = name.removesuffix(".weight")
        hit = next((key for key in dynamic if re.match(key[2:], module)), "")
        if ".down_proj" in module:
            assert hit.startswith("+:") and dynamic[hit] == {"bits": 8, "group_size": 16, "sym": False}
        elif module == kept:
            assert hit.startswith("-:")
        elif isinstance(ref.codec, IntCodec):
            assert not hit
    through = written(found, tmp_path / "ct", "compressed-tensors")
    back = written(through, tmp_path / "back", "gptq-v2")
    assert oracle.read_folder(tmp_path / "back") == oracle.read_folder(tmp_path / "v2")
    assert back.quantization == found.quantization


def test_awq_configs_and_one_size_of_groups(tmp_path: Path) -> None:
    folder, _ = mixed(tmp_path)
    with pytest.raises(PlanError, match="not 4 bits"):
        open_checkpoint(folder).save(tmp_path / "x", format="awq")
    folder, _ = integers(tmp_path / "n", "gptq", IntScheme(4, 32))
    found = written(open_checkpoint(folder), tmp_path / "awq", "awq")
    assert found.quantization == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    other, _ = integers(tmp_path / "o", "gptq", IntScheme(4, 16))
    theirs = oracle_tensors(other)
    change_shards(folder, lambda ts: {n: theirs[n] if "down_proj" in n else t for n, t in ts.items()})
    told = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    change_config(folder, quantization_config=told | {"dynamic": {".*down_proj": {"group_size": 16}}})
    with pytest.raises(PlanError, match="one group size for all tensors, not 16, 32"):
        open_checkpoint(folder).save(tmp_path / "y", format="awq")


def act_order(folder: Path) -> Path:
    return integers(folder, "gptq", IntScheme(4, 16), desc_act=True)[0]


@pytest.mark.parametrize(
    ("make", "form", "told"),
    [
        (lambda f: integers(f, "gptq", IntScheme(3, 32))[0], "awq", "not 4 bits"),
        (lambda f: nf4(f)[0], "gptq", "no whole numbers"),
        (lambda f: nf4(f)[0], "mxfp4", "quantized otherwise"),
        (lambda f: factories.llama(f, 1), "gptq", "no tensor that is quantized"),
        (lambda f: factories.llama(f, 1), "awq", "no tensor that is quantized"),
        (lambda f: factories.llama(f, 1), "mxfp4", "gpt-oss"),
        (lambda f: factories.llama4_text(f, 1), "mxfp4", "gpt-oss"),
        (lambda f: factories.gpt_oss_mxfp4(f, 1), "gptq", "no whole numbers"),
        (lambda f: factories.gpt_oss_bf16(f, 1), "bnb-nf4", "one expert of a fused tensor"),
        (lambda f: act_order(f), "awq", "scattered"), (lambda f: act_order(f), "gptq-v2", "scattered"),
        (lambda f: act_order(f), "compressed-tensors", "act-order"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_express_is_refused_before_anything_is_written(
    tmp_path: Path, make: Callable[[Path], Path], form: Any, told: str
) -> None:
    with pytest.raises(PlanError) as caught:
        open_checkpoint(make(tmp_path / "m")).save(tmp_path / "out", format=form)
    assert told in caught.value.message and caught.value.hint
    assert not (tmp_path / "out").exists()


def test_scales_that_are_narrowed_are_told(tmp_path: Path) -> None:
    folder, made = integers(tmp_path / "m", "gptq", IntScheme(4, 32))
    through = written(open_checkpoint(folder), tmp_path / "ct", "compressed-tensors")
    assert not [event for event in through.events if event.kind == "scales"]
    wide = change_shards(tmp_path / "ct", lambda tensors: {
        n: t.float() * 1.0001 if n.endswith("weight_scale") else t for n, t in tensors.items()
    })  # fmt: skip
    planned = open_checkpoint(wide).save(tmp_path / "narrow", format="gptq")
    (event,) = [each for each in planned.manifest["events"] if each["kind"] == "scales"]
    assert sorted(event["tensors"]) == sorted(made)


def test_nf4_from_values(tmp_path: Path) -> None:
    folder = factories.llama(tmp_path / "m", 1)
    source = open_checkpoint(folder)
    found = written(source, tmp_path / "nf4", "bnb-nf4")
    for name, ref in source.tensors.items():
        other = found.tensors[name]
        if ref.info.role in ("attention", "dense_mlp"):
            assert other.codec == Bnb4(dtype="bfloat16")
            assert isinstance(other, StoredRef)
            packed, absmax = encode_nf4(ref.read().reshape(-1))
            assert other.raw(other.parts[0], 0, other.rows).tobytes() == packed.numpy().tobytes()
            assert other.raw(other.parts[1], 0, other.rows).tobytes() == absmax.numpy().tobytes()
        else:
            assert other.codec == ref.codec and torch.equal(other.read(), ref.read())
    config = found.quantization
    assert config["llm_int8_skip_modules"] == ["lm_head"] and config["load_in_4bit"] is True
    again = written(found, tmp_path / "again", "bnb-nf4")
    assert oracle.read_folder(tmp_path / "again") == oracle.read_folder(tmp_path / "nf4")
    assert again.quantization == config


@pytest.mark.parametrize("seed", [1, 2])
def test_mxfp4_of_gpt_oss_there_and_back(tmp_path: Path, seed: int) -> None:
    folder = factories.gpt_oss_mxfp4(tmp_path / "m", seed)
    source = open_checkpoint(folder)
    values = oracle.model_tensors(folder)
    wide = written(source, tmp_path / "bf16", "bf16")
    assert not wide.quantization
    for name, (dtype, shape, raw) in oracle.read_folder(tmp_path / "bf16").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            turned = values[name].transpose(1, 2).bfloat16()
            assert dtype == "BF16" and shape == tuple(turned.shape)
            assert raw == turned.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    back = written(wide, tmp_path / "back", "mxfp4")
    assert back.quantization["quant_method"] == "mxfp4"
    found = oracle.model_tensors(tmp_path / "back")
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        assert torch.equal(found[name], tensor), name
    same = oracle.read_folder(tmp_path / "back")
    assert {n: v[:2] for n, v in same.items()} == {n: v[:2] for n, v in oracle.read_folder(folder).items()}
    written(source, tmp_path / "kept", "mxfp4")
    assert oracle.read_folder(tmp_path / "kept") == oracle.read_folder(folder)


def test_double_quantized_weights_are_only_copied(tmp_path: Path) -> None:
    import surgery

    folders = {}
    for label in ("a", "b"):
        folder, _ = nf4(tmp_path / label)

        def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            found = {}
            for name, tensor in tensors.items():
                if name.endswith(".absmax"):
                    weight = name.removesuffix(".absmax")
                    found[name] = torch.randint(0, 256, tensor.shape, dtype=torch.uint8)
                    found[f"{weight}.nested_absmax"] = torch.rand(-(-tensor.numel() // 256))
                    found[f"{weight}.nested_quant_map"] = torch.linspace(-1, 1, 256)
                elif "quant_state" in name:
                    state = json.loads(bytes(tensor.tolist()))
                    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
                    found[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
                else:
                    found[name] = tensor
            return found

        folders[label] = str(change_shards(folder, change))
    copied = open_checkpoint(folders["a"]).save(tmp_path / "copy").folder
    assert oracle.read_folder(copied) == oracle.read_folder(Path(folders["a"]))
    merge = {"op": "merge.linear", "models": {"a": 1, "b": 1}}
    recipe = {"parents": folders, "steps": [merge]}
    with pytest.raises(PlanError, match="double-quantized, which is only read") as caught:
        surgery.plan(recipe, tmp_path / "out")
    assert "bnb-nf4" in caught.value.hint
    surgery.run(recipe | {"output": {"format": "bnb-nf4"}}, tmp_path / "out")
    mean = [open_checkpoint(folders[label]).tensors for label in ("a", "b")]
    for name, ref in open_checkpoint(tmp_path / "out").tensors.items():
        if isinstance(ref.codec, Bnb4):
            want = (mean[0][name].read() * 0.5 + mean[1][name].read() * 0.5).reshape(-1)
            packed, _ = encode_nf4(want)
            assert isinstance(ref, StoredRef)
            assert ref.raw(ref.parts[0], 0, ref.rows).tobytes() == packed.numpy().tobytes()


def test_what_loaders_cannot_read_is_told(tmp_path: Path) -> None:
    def told(folder: Path, form: Any) -> list[tuple[int, str]]:
        manifest = open_checkpoint(folder).save(tmp_path / f"{folder.name}-{form}", format=form).manifest
        return [(len(e["tensors"]), e["message"]) for e in manifest["events"] if e["kind"] == "loading"]

    dense, _ = integers(tmp_path / "dense", "gptq", IntScheme(4, 32, False))
    assert not told(dense, "gptq-v2") and not told(dense, "awq")
    ((count, text),) = told(dense, "gptq")
    assert count == 14 and "gptq-v2" in text
    experts, _ = integers(tmp_path / "moe", "gptq", IntScheme(4, 32), base=small_moe)
    for form in ("gptq", "awq"):
        ((count, text),) = told(experts, form)
        assert count == 2 * 2 * 3 and "transformers cannot load" in text
    ((count, text),) = told(small_moe(tmp_path / "plain", 1), "bnb-nf4")
    assert count == 2 * 2 * 3 and "plugin" in text


def small_moe(folder: Path, seed: int) -> Path:
    return factories.qwen3_moe(folder, seed, experts=2)


def test_scales_too_small_for_fp16_stop_the_run(tmp_path: Path) -> None:
    folder, _ = integers(tmp_path / "m", "gptq", IntScheme(4, 32))
    written(open_checkpoint(folder), tmp_path / "ct", "compressed-tensors")
    tiny = change_shards(tmp_path / "ct", lambda tensors: {
        n: t.bfloat16() * 1e-8 if n.endswith("weight_scale") else t for n, t in tensors.items()
    })  # fmt: skip
    with pytest.raises(CheckpointError, match="too small for fp16"):
        open_checkpoint(tiny).save(tmp_path / "out", format="gptq")


def test_mxfp4_means_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = factories.gpt_oss_mxfp4(tmp_path / "m", 3)
    written(open_checkpoint(folder), tmp_path / "wide", "bf16")
    packed, wide = oracle_tensors(folder), oracle_tensors(tmp_path / "wide")
    names = [name.removesuffix("_blocks") for name in packed if name.endswith("_blocks")]
    assert len(names) == 4
    for name in names:
        want = convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"])
        assert torch.equal(wide[name], want)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_verify_sees_a_config_that_says_something_else(tmp_path: Path, method: str) -> None:
    folder, _ = integers(tmp_path / "m", "gptq", IntScheme(4, 32))
    form: Any = {"gptq": "gptq-v2", "awq": "awq", "bitsandbytes": "bnb-nf4"}[method]
    made = written(open_checkpoint(folder), tmp_path / "out", form)
    values = {name: ref for name, ref in made.tensors.items() if ref.info.role == "norm"}
    assert not packed_contradictions(made.quantization, made.tensors)
    assert packed_contradictions({}, made.tensors) and packed_contradictions(made.quantization, values)
    (only,) = packed_contradictions({"quant_method": "fp8"}, made.tensors)
    assert f"says {method}: False, its tensors: 14" in only
