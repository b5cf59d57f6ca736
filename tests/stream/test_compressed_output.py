"""The output format compressed-tensors: codes that are carried over, the config, what cannot be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compressed
import factories
import oracle
import pytest
import torch
from folders import change_config, change_shards, check_written

from surgery.codecs.codec import Codec
from surgery.codecs.fp8_scaled import Fp8Scaled
from surgery.codecs.mxfp4_packed import Mxfp4Packed
from surgery.codecs.packed_int import PackedInt
from surgery.codecs.plain_int import PlainInt
from surgery.codecs.schemes import IntScheme
from surgery.errors import PlanError, StrictError
from surgery.stream.checkpoint import Checkpoint, TensorRef
from surgery.stream.compressed_config import CompressedConfig
from surgery.stream.formats import apply_format, stored_as
from surgery.stream.quantization_configs import contradictions, quantization_config
from surgery.stream.source import open_checkpoint

METHOD = "compressed-tensors"
LINEAR = ["Linear"]
QUERY = "model.layers.0.self_attn.q_proj"
INT4, INT8 = IntScheme(4, 32), IntScheme(8, 0)


def quantized(checkpoint: Checkpoint, **by_role: Codec) -> Checkpoint:
    """Matrices of some roles on codecs."""

    def convert(ref: TensorRef) -> TensorRef:
        codec = by_role.get(ref.info.role) if len(ref.shape) == 2 else None
        return stored_as(ref, codec) if codec else ref

    return checkpoint.replace(tensors={name: convert(ref) for name, ref in checkpoint.tensors.items()})


def written(checkpoint: Checkpoint, out: Path, form: Any = METHOD) -> tuple[Checkpoint, dict[str, Any]]:
    checkpoint.save(out, format=form, shard_bytes=400_000)
    again = open_checkpoint(out)
    check_written(out, again.tensors)
    config = compressed.read_config(out)
    assert contradictions(config.get("quantization_config", {}), again.tensors) == []
    return again, config.get("quantization_config", {})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_old_packing_becomes_the_new_one_code_by_code(tmp_path: Path, bits: int, symmetric: bool) -> None:
    folder = factories.llama(tmp_path / "old", 1)
    told = compressed.config(
        "pack-quantized", (LINEAR, compressed.weights(bits, 32, symmetric=symmetric)), version="0.17.1"
    )
    old = compressed.integers(bits, 32, symmetric=symmetric, dtype="F16", padded=True)
    new = compressed.integers(bits, 32, symmetric=symmetric, dtype="F16")
    compressed.compress(folder, told, lambda module: old)
    _, config = written(open_checkpoint(folder), tmp_path / "new")
    stored = oracle.read_folder(tmp_path / "new")
    for layer in range(2):
        module = f"model.layers.{layer}.self_attn.q_proj"
        for part, tensor in new(module, (64, 64))[0].items():
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert stored[f"{module}.{part}"][2] == raw, part
    assert config["version"] == "0.18.0"
    assert config["config_groups"] == told["config_groups"]


@pytest.mark.parametrize("kind", ["f32", "ue8m0", "e8m0"])
def test_fp8_blocks_keep_codes_and_scales_under_other_names(tmp_path: Path, kind: str) -> None:
    more = {} if kind == "f32" else {"scale_fmt": "ue8m0", "e8m0_storage": kind == "e8m0"}
    folder = factories.deepseek_v3(tmp_path / "fp8", 1, layers=2, experts=2, ragged=False, **more)  # type: ignore[arg-type]
    before = oracle.read_folder(folder)
    again, config = written(open_checkpoint(folder), tmp_path / "out")
    after = oracle.read_folder(tmp_path / "out")
    scales = [name for name in before if name.endswith("_scale_inv")]
    assert scales
    for name in scales:
        weight = name.removesuffix("_scale_inv")
        assert after[weight] == before[weight]
        dtype, shape, raw = after[f"{weight}_scale"]
        assert (dtype, shape) == ("F32", before[name][1])
        if kind == "e8m0":
            values = [oracle.e8m0_value(code) for code in before[name][2]]
            assert torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist() == values
        else:
            assert raw == before[name][2]
    values = oracle.model_tensors(folder)
    for name, ref in again.tensors.items():
        assert torch.equal(ref.read().view(ref.shape), values[name].float())
    (group,) = config["config_groups"].values()
    assert (config["format"], group["targets"], group["format"]) == (
        "float-quantized",
        LINEAR,
        "float-quantized",
    )
    assert (
        group["weights"] | {"strategy": "block", "block_structure": [128, 128], "num_bits": 8}
        == group["weights"]
    )
    assert group["input_activations"]["dynamic"] is True


def test_schemes_by_role_become_groups_with_short_targets(tmp_path: Path) -> None:
    folder = factories.deepseek_v3(tmp_path / "bf16", 1, fp8=False, experts=12)
    child = quantized(
        open_checkpoint(folder), routed_expert=PackedInt(INT4), attention=PackedInt(INT8, "F32"),
        shared_expert=PackedInt(INT8), dense_mlp=Fp8Scaled(),
    )  # fmt: skip
    again, config = written(child, tmp_path / "out")
    groups = list(config["config_groups"].values())
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in groups] == ["pack-quantized", "float-quantized", "pack-quantized"]
    assert groups[0]["targets"] == [r"re:.*\blayers\.\d+\.mlp\.experts\.\d+\.(down_proj|gate_proj|up_proj)$"]
    assert sum(len(group["targets"]) for group in groups) <= 8
    assert len(config["ignore"]) <= 6
    parsed = CompressedConfig(config)
    for name, ref in again.tensors.items():
        scheme = parsed.scheme(name.removesuffix(".weight"))
        if ref.codec.name in ("bf16", "f32"):
            assert scheme is None or len(ref.shape) < 2 or ref.info.role == "embedding"
        else:
            assert scheme is not None
    fixed = {"quant_method": METHOD, "quantization_status": "compressed", "kv_cache_scheme": None}
    assert config | fixed | {"sparsity_config": {}, "transform_config": {}} == config
    assert config == quantization_config(again.tensors, METHOD)


@pytest.mark.parametrize("tied", [True, False])
def test_one_scheme_is_for_all_linear_modules_but_the_head(tmp_path: Path, tied: bool) -> None:
    folder = factories.llama(tmp_path / "bf16", 1, tied=tied)
    child = quantized(open_checkpoint(folder), attention=PackedInt(INT4), dense_mlp=PackedInt(INT4))
    _, config = written(child, tmp_path / "out")
    (group,) = config["config_groups"].values()
    assert (config["format"], group["targets"], config["ignore"]) == ("pack-quantized", LINEAR, ["lm_head"])


@pytest.mark.parametrize(
    "codec", [PackedInt(IntScheme(5, 64, False)), PlainInt(INT8), PlainInt(INT8, per_tensor=True)]
)
def test_tensors_of_many_tiles_are_what_the_codec_makes_of_them_whole(tmp_path: Path, codec: Any) -> None:
    weights = torch.randn(9000, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    folder = factories.llama(tmp_path / "model", 1, shards=1)
    change_shards(folder, lambda tensors: {f"{QUERY}.weight": weights})
    child = quantized(open_checkpoint(folder), attention=codec)
    assert child.nbytes == sum(part.stored.nbytes for part in child.tensors[f"{QUERY}.weight"].parts)
    child = child.replace(
        config={**child.config, "quantization_config": quantization_config(child.tensors, METHOD)}
    )
    again, _ = written(child, tmp_path / "out", "source")
    expected = codec.constants((9000, 128)) | codec.encode(weights.float())
    stored = oracle.read_folder(tmp_path / "out")
    for spec in codec.parts((9000, 128)):
        name = spec.stored_name(f"{QUERY}.weight")
        assert stored[name] == (spec.dtype, spec.shape, expected[spec.key].tobytes())
    assert (again.tensors[f"{QUERY}.weight"].read() - weights.float()).norm() < 0.1 * weights.float().norm()


def test_bf16_decodes_every_form_and_leaves_scales_of_activations_behind(tmp_path: Path) -> None:
    folder = factories.llama(tmp_path / "old", 1)
    told = compressed.config(
        "mixed-precision",
        (["re:.*q_proj"], compressed.weights(8)),
        (["re:.*k_proj"], {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        (LINEAR, compressed.weights(3, 32, symmetric=False)),
    )

    def build(module: str) -> compressed.Build:
        if "q_proj" in module:
            return compressed.unpacked()
        return compressed.fp8("tensor") if "k_proj" in module else compressed.integers(3, 32, symmetric=False)

    expected = compressed.compress(folder, told, build)
    scale = "model.layers.1.self_attn.k_proj.input_scale"
    change_shards(
        folder, lambda tensors: tensors | ({scale: torch.ones(1)} if "lm_head.weight" in tensors else {})
    )
    again, config = written(open_checkpoint(folder), tmp_path / "out", "bf16")
    assert config == {}
    assert scale not in again.tensors
    assert apply_format(open_checkpoint(folder), "bf16").dropped == {scale: "scales of quantized activations"}
    assert {ref.codec.name for ref in again.tensors.values()} == {"bf16"}
    for name, values in expected.items():
        assert torch.equal(again.tensors[name].read(), values.to(torch.bfloat16).float())


def test_fp8_blocks_are_made_of_integers_and_what_they_leave_is_decoded(tmp_path: Path) -> None:
    folder = factories.llama(tmp_path / "bf16", 1)
    child = quantized(open_checkpoint(folder), attention=PackedInt(INT4), head=PackedInt(INT4))
    again, config = written(child, tmp_path / "out", "fp8-block")
    assert again.tensors[f"{QUERY}.weight"].codec.name == "fp8-block"
    assert again.tensors["lm_head.weight"].codec.name == "bf16"
    assert config["quant_method"] == "fp8"


def test_a_config_that_fits_is_kept_with_its_activations(tmp_path: Path) -> None:
    folder = factories.llama(tmp_path / "w8a8", 1)
    told = compressed.config("int-quantized", (LINEAR, compressed.weights(8)))
    told["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8,
        "strategy": "token",
        "dynamic": True,
    }
    compressed.compress(folder, told, lambda module: compressed.unpacked())
    _, config = written(open_checkpoint(folder), tmp_path / "out")
    assert config == told


def test_carried_scales_that_lose_digits_are_an_event(tmp_path: Path) -> None:
    folder = factories.llama(tmp_path / "f16", 1)
    told = compressed.config("pack-quantized", (LINEAR, compressed.weights(4, 32)))
    compressed.compress(folder, told, lambda module: compressed.integers(4, 32, dtype="F16"))
    narrow = PackedInt(INT4, "BF16")
    child = quantized(open_checkpoint(folder), attention=narrow, dense_mlp=narrow)
    events = apply_format(child, METHOD).events
    assert [event.kind for event in events] == ["scales"]
    assert "14 tensors keep their codes" in events[0].message
    assert not apply_format(open_checkpoint(folder), METHOD).events
    with pytest.raises(StrictError):
        child.save(tmp_path / "out", format=METHOD, strict=True)
    _, _ = written(child, tmp_path / "out")
    stored = oracle.read_folder(tmp_path / "out")
    parts = compressed.integers(4, 32, dtype="F16")(QUERY, (64, 64))[0]
    assert stored[f"{QUERY}.weight_packed"][2] == parts["weight_packed"].numpy().tobytes()
    rounded = parts["weight_scale"].to(torch.bfloat16).view(-1).view(torch.uint8)
    assert stored[f"{QUERY}.weight_scale"] == ("BF16", (64, 2), rounded.numpy().tobytes())


EXPERTS: dict[str, tuple[Codec, str]] = {
    "asymmetric": (PackedInt(IntScheme(4, 32, False)), "cannot load 48 routed experts"),
    "unpacked": (PlainInt(INT8), "cannot load 48 routed experts"),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_that_transformers_cannot_load_are_an_event(tmp_path: Path, case: str) -> None:
    codec, words = EXPERTS[case]
    child = quantized(open_checkpoint(factories.qwen3_moe(tmp_path / "moe", 1)), routed_expert=codec)
    (event,) = apply_format(child, METHOD).events
    assert event.kind == "loading"
    assert words in event.message


def test_experts_on_several_schemes_are_an_event_and_on_one_are_not(tmp_path: Path) -> None:
    plain = open_checkpoint(factories.qwen3_moe(tmp_path / "moe", 1))
    one = quantized(plain, routed_expert=PackedInt(INT4))
    assert not apply_format(one, METHOD).events
    assert not apply_format(quantized(plain, routed_expert=Mxfp4Packed()), METHOD).events
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    (event,) = apply_format(one.replace(tensors={**one.tensors, name: plain.tensors[name]}), METHOD).events
    assert "2 ways" in event.message
    assert event.tensors == (name,)


def test_what_cannot_be_written_is_refused_with_the_formats_that_can(tmp_path: Path) -> None:
    plain = factories.llama(tmp_path / "plain", 1)
    with pytest.raises(PlanError, match="no tensor that is quantized") as caught:
        apply_format(open_checkpoint(plain), METHOD)
    assert "quantize step" in str(caught.value.hint)
    with pytest.raises(PlanError, match="mxfp4"):
        apply_format(open_checkpoint(factories.gpt_oss_mxfp4(tmp_path / "oss", 1)), METHOD)
    fp8 = factories.deepseek_v3(tmp_path / "fp8", 1, layers=1, experts=2)
    odd = {".q_a_proj.weight": ".q_a_proj.matrix"}
    change_shards(
        fp8,
        lambda tensors: {name.replace(*next(iter(odd.items()))): tensor for name, tensor in tensors.items()},
    )
    with pytest.raises(PlanError, match=r"cannot express .*q_a_proj\.matrix") as caught:
        apply_format(open_checkpoint(fp8), METHOD)
    assert "bf16" in str(caught.value.hint)


def test_contradictions_of_config_and_tensors_are_named(tmp_path: Path) -> None:
    folder = factories.llama(tmp_path / "model", 1)
    told = compressed.config("pack-quantized", (LINEAR, compressed.weights(4, 32)))
    compressed.compress(
        folder, told, lambda module: None if "v_proj" in module else compressed.integers(4, 32)
    )
    opened = open_checkpoint(folder)
    wrong = contradictions(opened.quantization, opened.tensors)
    assert len(wrong) == 2
    assert "v_proj is not quantized" in wrong[0]
    assert contradictions({}, opened.tensors) == [
        "quantization_config says compressed-tensors: False, its tensors: 12"
    ]
    other = compressed.config(
        "pack-quantized", (LINEAR, compressed.weights(4, 64)), ignore=["re:.*v_proj", "lm_head"]
    )
    assert len(contradictions(other, opened.tensors)) == 12
    change_config(folder, quantization_config=other)
    rebuilt = quantization_config(opened.tensors, METHOD)
    assert contradictions(rebuilt, opened.tensors) == []
