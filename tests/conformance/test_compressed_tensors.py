"""What compressed-tensors itself makes of the same values, and what it and transformers read in our files.

Its arithmetic is in the dtype of scales, so weights and scales here are bf16 or exact in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra `dev`)")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils.match import match_named_modules
from transformers import AutoModelForCausalLM

from surgery.calibrate.state import decode_state
from surgery.codecs.codec import Codec
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.fp8_scaled import Fp8Scaled
from surgery.codecs.mxfp4_packed import Mxfp4Packed
from surgery.codecs.packed_int import PackedInt
from surgery.codecs.plain import tensor_bytes
from surgery.codecs.plain_int import PlainInt
from surgery.codecs.schemes import IntScheme
from surgery.stream.checkpoint import Checkpoint, TensorRef
from surgery.stream.formats import stored_as
from surgery.stream.quantization_configs import group_of
from surgery.stream.source import open_checkpoint

ROLES = ("attention", "dense_mlp", "routed_expert", "shared_expert")


def weights(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def scheme_of(codec: Codec) -> QuantizationScheme:
    form, told, _ = group_of(codec)
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**told), format=form)


def parts_of(codec: Codec, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Our parts as tensors, by the names that compressed-tensors has for them in a module."""
    kinds = {
        "I32": torch.int32, "I64": torch.int64, "I8": torch.int8, "U8": torch.uint8, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
    }  # fmt: skip
    shape = (values.shape[0], values.shape[1])
    raw = codec.constants(shape) | codec.encode(values.float())
    return {
        spec.stored_name("weight"): torch.from_numpy(raw[spec.key].copy())
        .view(kinds[spec.dtype])
        .view(spec.shape)
        for spec in codec.parts(shape)
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a).tobytes() == tensor_bytes(b).tobytes()
    )


def qparams(values: torch.Tensor, scheme: QuantizationScheme, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (in float32, then stored as bf16) and zero points by the library's own rule."""
    grouped = values.float().unflatten(1, (-1, size))
    scales, zeros = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    return scales.to(torch.bfloat16), zeros


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_codes_scales_and_zero_points_are_the_librarys(bits: int, group: int, symmetric: bool) -> None:
    codec, values = PackedInt(IntScheme(bits, group, symmetric)), weights(45, 192, bits)
    scheme = scheme_of(codec)
    scales, zeros = qparams(values, scheme, group or 192)
    ours = parts_of(codec, values)
    assert same(ours["weight_scale"], scales)
    if not symmetric:
        # Its zero points come from scales before they are rounded to bf16, so they are handed over.
        raw = {spec.key: ours[spec.stored_name("weight")] for spec in codec.parts((45, 192))}
        stored = {key: each.contiguous().view(-1).view(torch.uint8).numpy() for key, each in raw.items()}
        ours_zeros = codec.quantized((45, 192), stored).zeros.to(torch.int16) - codec.scheme.middle
        assert (ours_zeros - zeros.to(torch.int16)).abs().max() <= 1
        zeros = ours_zeros.to(torch.int8)
    state = {"weight": values.float(), "weight_scale": scales.float(), "weight_zero_point": zeros}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.compress(state, scheme)
    for part in ("weight_shape", *(() if symmetric else ("weight_zero_point",))):
        assert same(ours[part], theirs[part]), part
    if symmetric:
        assert same(ours["weight_packed"], theirs["weight_packed"])
    # It rounds w / scale + zero, we round w / scale: where that is a tie, odd zero points make a difference.
    codes = [unpack_from_int32(each["weight_packed"], bits, values.shape) for each in (ours, theirs)]
    apart = codes[0] != codes[1]
    exact = values.double().unflatten(1, (-1, group or 192)) / scales.double()[..., None]
    assert ((exact.flatten(1)[apart] * 2) % 2 == 1).all()
    assert apart.float().mean() < 0.02
    decoded = compressor.decompress(dict(ours), scheme)["weight"]
    assert same(decoded, _decoded(codec, values).to(torch.bfloat16))


def _decoded(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    shape = (values.shape[0], values.shape[1])
    return codec.decode(shape, 0, shape[0], codec.constants(shape) | codec.encode(values.float()))


OTHERS: dict[str, Codec] = {
    "int8": PlainInt(IntScheme(8, 0)),
    "int8-asym": PlainInt(IntScheme(8, 0, False)),
    "fp8-channel": Fp8Scaled(),
    "fp8-tensor": Fp8Scaled("tensor"),
    "fp8-block": Fp8Block("BF16", suffix="_scale"),
    "mxfp4": Mxfp4Packed(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_library_decompresses_our_parts_to_our_values(name: str) -> None:
    codec, values = OTHERS[name], weights(256, 128)
    scheme = scheme_of(codec)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    decoded = compressor.decompress(parts_of(codec, values), scheme)["weight"]
    ours = _decoded(codec, values).to(torch.bfloat16)
    assert torch.equal(decoded.to(torch.bfloat16), ours)
    assert (ours - values).norm() < 0.2 * values.norm()


@pytest.mark.parametrize("name", ["int8", "fp8-channel", "fp8-tensor"])
def test_unpacked_codes_under_the_librarys_scales_are_the_librarys(name: str) -> None:
    codec, values = OTHERS[name], weights(40, 96)
    scheme = scheme_of(codec)
    ours = parts_of(codec, values)
    size = values.numel() if name == "fp8-tensor" else 96
    flat = values.view(1, -1) if name == "fp8-tensor" else values
    scales, _ = qparams(flat, scheme, size)
    assert same(ours["weight_scale"], scales.view(ours["weight_scale"].shape))
    state = {"weight": values.float(), "weight_scale": ours["weight_scale"].float()}
    theirs = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
    assert same(ours["weight"], theirs["weight"])


def export(tmp_path: Path, family: str, *codecs: Codec, **config: Any) -> Path:
    """A tiny random model written by us, the roles' matrices on the codecs in turn."""
    tiny_models.build_model(tmp_path / "plain", family, dtype="bfloat16", **config)
    plain = open_checkpoint(tmp_path / "plain")
    by_role = {role: codecs[number % len(codecs)] for number, role in enumerate(ROLES)}

    def convert(ref: TensorRef) -> TensorRef:
        return (
            stored_as(ref, by_role[ref.info.role]) if ref.info.role in ROLES and len(ref.shape) == 2 else ref
        )

    child: Checkpoint = plain.replace(tensors={name: convert(ref) for name, ref in plain.tensors.items()})
    child.save(tmp_path / "out", format="compressed-tensors")
    return tmp_path / "out"


LLAMA = {"hidden_size": 128, "intermediate_size": 384}
EXPORTS: dict[str, tuple[str, dict[str, Any], tuple[Codec, ...]]] = {
    "int4-g32": ("llama", LLAMA, (PackedInt(IntScheme(4, 32)),)),
    "int4-g64-asym": ("qwen2", LLAMA, (PackedInt(IntScheme(4, 64, False)),)),
    "int4-g128": ("llama", LLAMA, (PackedInt(IntScheme(4, 128)),)),
    "int4-g128-asym": ("llama", LLAMA, (PackedInt(IntScheme(4, 128, False)),)),
    "int3-g64-asym": ("llama", LLAMA, (PackedInt(IntScheme(3, 64, False)),)),
    "int8": ("qwen2", LLAMA, (PackedInt(IntScheme(8)),)),
    "int8-unpacked": ("llama", LLAMA, (PlainInt(IntScheme(8)),)),
    "fp8-channel": ("llama", LLAMA, (Fp8Scaled(),)),
    "fp8-tensor": ("qwen2", LLAMA, (Fp8Scaled("tensor"),)),
    "mxfp4": ("llama", LLAMA, (Mxfp4Packed(),)),
    "mixed": ("llama", LLAMA, (PackedInt(IntScheme(4, 32)), Fp8Scaled())),
    "experts-int4": ("qwen3_moe", {"moe_intermediate_size": 64}, (PackedInt(IntScheme(4, 32)),)),
    "experts-fp8": ("qwen3_moe", {"moe_intermediate_size": 64}, (Fp8Scaled(),)),
    "experts-mixed": (
        "qwen3_moe", {"moe_intermediate_size": 64},
        (PackedInt(IntScheme(4, 32)), Fp8Scaled(), PackedInt(IntScheme(8))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_transformers_loads_an_export_and_has_the_logits_of_our_own_decoding(
    name: str, tmp_path: Path
) -> None:
    family, config, codecs = EXPORTS[name]
    folder = export(tmp_path, family, *codecs, **config)
    open_checkpoint(folder).save(tmp_path / "bf16", format="bf16")
    tokens = torch.tensor([[1, 5, 99, 42, 7, 200, 11]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(tokens).logits
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)(tokens).logits
        before = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)(tokens).logits
    assert torch.equal(theirs, ours)
    assert not torch.equal(ours, before)


def test_the_config_of_an_export_is_the_librarys_and_matches_the_same_modules(tmp_path: Path) -> None:
    folder = export(tmp_path, "llama", PackedInt(IntScheme(4, 32)), Fp8Scaled(), **LLAMA)
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(told)
    state = decode_state(open_checkpoint(folder), torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    opened = open_checkpoint(folder)
    for group in parsed.config_groups.values():
        matched = {name for name, _ in match_named_modules(model, group.targets, parsed.ignore)}
        form = "packed-int4-g32" if group.format == "pack-quantized" else "fp8-channel"
        stored = {
            name.removesuffix(".weight") for name, ref in opened.tensors.items() if ref.codec.name == form
        }
        assert matched == stored
        assert stored
    assert state.keys() == opened.tensors.keys()
