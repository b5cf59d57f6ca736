"""The quantization_config of an output: what it says of the tensors, and whether it says so of others.

compressed-tensors: one group for every scheme in use, weights only, except that FP8 blocks also ask for the
dynamic activations that DeepSeek's models run with. Where all quantized modules share a scheme the target is
`Linear`, else names and patterns (`module_patterns`); unquantized matrices are in the ignore list, and so is
an lm_head that is tied to the embedding. transformers takes the scheme of all experts from the first group
that names experts, so the group of routed experts comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from surgery.codecs.codec import Codec
from surgery.codecs.fp8_block import BLOCK, Fp8Block
from surgery.codecs.fp8_scaled import Fp8Scaled
from surgery.codecs.mxfp4 import GROUP
from surgery.codecs.mxfp4_packed import Mxfp4Packed
from surgery.codecs.packed_int import PackedInt
from surgery.codecs.plain import Plain
from surgery.codecs.plain_int import PlainInt
from surgery.errors import PlanError
from surgery.stream.checkpoint import TensorRef
from surgery.stream.compressed_config import METHOD, CompressedConfig, WeightScheme
from surgery.stream.module_patterns import describe

VERSION = "0.18.0"
"""The version of compressed-tensors whose layout is written: the first one in which codes straddle words."""
MIXED = "mixed-precision"
WEIGHT = ".weight"

Tensors = Mapping[str, TensorRef]


def quantization_config(tensors: Tensors, form: str) -> dict[str, Any]:
    """The quantization_config of tensors that are stored in an output format. Raises PlanError where nothing
    is quantized, or something on a scheme that the format cannot express."""
    return BUILDERS[form](tensors)


def fp8_block_config(tensors: Tensors) -> dict[str, Any]:
    """DeepSeek's: e4m3 in blocks, and the matrices that are not."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": unquantized(tensors),
    }


def compressed_tensors_config(tensors: Tensors) -> dict[str, Any]:
    """One that compressed-tensors, and transformers and vLLM through it, load these tensors by."""
    groups: dict[Codec, list[TensorRef]] = {}
    for ref in tensors.values():
        if is_compressed(ref.codec):
            groups.setdefault(_scheme_of(ref.codec), []).append(ref)
        elif not isinstance(ref.codec, Plain) and ref.codec.decodable:
            raise cannot_express(METHOD, ref)
    if not groups:
        raise PlanError(f"{METHOD} finds no tensor that is quantized", hint="add a quantize step")
    ordered = sorted(groups.items(), key=lambda item: not any(_is_expert(ref) for ref in item[1]))
    kept = unquantized(tensors)
    described = {codec: group_of(codec) for codec, _ in ordered}
    forms = {form for form, _, _ in described.values()}
    config_groups = {}
    for number, (codec, refs) in enumerate(ordered):
        form, weights, inputs = described[codec]
        config_groups[f"group_{number}"] = {
            "format": form, "targets": _targets(refs, ordered, kept), "weights": weights,
            "input_activations": inputs, "output_activations": None,
        }  # fmt: skip
    quantized = [_module(ref) for refs in groups.values() for ref in refs]
    ignore = describe(kept, quantized)
    if not any(name.endswith("lm_head.weight") for name in tensors):
        ignore.append("lm_head")
    return {
        "quant_method": METHOD, "format": MIXED if len(forms) > 1 else min(forms), "version": VERSION,
        "quantization_status": "compressed", "config_groups": config_groups, "ignore": ignore,
        "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {},
        "global_compression_ratio": None,
    }  # fmt: skip


BUILDERS: Mapping[str, Callable[[Tensors], dict[str, Any]]] = {
    "fp8-block": fp8_block_config,
    "compressed-tensors": compressed_tensors_config,
}


def is_compressed(codec: Codec) -> bool:
    """Whether compressed-tensors stores tensors so."""
    if isinstance(codec, Fp8Block):
        return codec.suffix == "_scale"
    return isinstance(codec, PackedInt | PlainInt | Fp8Scaled | Mxfp4Packed)


def cannot_express(form: str, ref: TensorRef) -> PlanError:
    """The refusal of a tensor that a format has no words for."""
    return PlanError(
        f"{form} cannot express {ref.name}, which is stored as {ref.codec.name}",
        hint="write output.format=source, which keeps it, or bf16, which decodes it",
    )


def group_of(codec: Codec) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """The storage format of a group, what it says of its weights, and of its inputs."""
    if isinstance(codec, PackedInt | PlainInt):
        per_tensor = isinstance(codec, PlainInt) and codec.per_tensor
        form = "pack-quantized" if isinstance(codec, PackedInt) else "int-quantized"
        size = codec.scheme.group_size or None
        strategy = "tensor" if per_tensor else "group" if size else "channel"
        return form, _weights(codec.scheme.bits, "int", strategy, size, codec.scheme.symmetric), None
    if isinstance(codec, Mxfp4Packed):
        weights = _weights(4, "float", "group", GROUP) | {"scale_dtype": "torch.uint8"}
        return "mxfp4-pack-quantized", weights, None
    if isinstance(codec, Fp8Scaled):
        return "float-quantized", _weights(8, "float", codec.per), None
    weights = _weights(8, "float", "block") | {"block_structure": [BLOCK, BLOCK]}
    inputs = _weights(8, "float", "group", BLOCK) | {"dynamic": True}
    return "float-quantized", weights, inputs


def _weights(
    bits: int, kind: str, strategy: str, size: int | None = None, symmetric: bool = True
) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "group_size": size,
        "dynamic": False, "actorder": None,
    }  # fmt: skip


def unquantized(tensors: Tensors) -> list[str]:
    """Modules with a matrix of plain values, embeddings aside."""
    return [
        _module(ref)
        for ref in tensors.values()
        if isinstance(ref.codec, Plain)
        and len(ref.shape) == 2
        and ref.name.endswith(WEIGHT)
        and ref.info.role != "embedding"
    ]


def contradictions(quantization: Mapping[str, Any], tensors: Tensors) -> list[str]:
    """What a quantization_config says of tensors that they are not, as far as its method is known."""
    method = quantization.get("quant_method")
    wrong = []
    blocks = [
        ref for ref in tensors.values() if isinstance(ref.codec, Fp8Block) and not is_compressed(ref.codec)
    ]
    if (method == "fp8") != bool(blocks):
        wrong.append(f"quantization_config says fp8: {method == 'fp8'}, FP8 tensors: {len(blocks)}")
    compressed = [ref for ref in tensors.values() if is_compressed(ref.codec)]
    if (method == METHOD) != bool(compressed):
        wrong.append(f"quantization_config says {METHOD}: {method == METHOD}, its tensors: {len(compressed)}")
    if method != METHOD:
        return wrong
    config = CompressedConfig(quantization)
    for ref in compressed:
        told, found = config.scheme(_module(ref)), group_of(ref.codec)[1]
        if told is None or not _says(told, found):
            wrong.append(f"{ref.name} is stored as {ref.codec.name}, which quantization_config does not say")
    # Whether a router is a `Linear` depends on who loads it, so a config need not ignore it.
    routers = {_module(ref) for ref in tensors.values() if ref.info.role == "router"}
    for module in unquantized(tensors):
        if module not in routers and config.scheme(module) is not None:
            wrong.append(f"{module} is not quantized, but quantization_config says so")
    return wrong


def _says(told: WeightScheme, weights: Mapping[str, Any]) -> bool:
    return (told.bits, told.floating, told.symmetric, told.strategy, told.group_size) == (
        weights["num_bits"], weights["type"] == "float", weights["symmetric"], weights["strategy"],
        weights["group_size"] or 0,
    )  # fmt: skip


def _targets(
    refs: list[TensorRef], groups: list[tuple[Codec, list[TensorRef]]], kept: Iterable[str]
) -> list[str]:
    if len(groups) == 1 and not any(ref.info.role == "embedding" for ref in refs):
        return ["Linear"]
    others = [_module(ref) for _, members in groups if members is not refs for ref in members]
    return describe([_module(ref) for ref in refs], [*others, *kept])


def _scheme_of(codec: Codec) -> Codec:
    """A codec that stands for all with the same words in a config, whatever the dtype of their scales."""
    if isinstance(codec, PackedInt):
        return PackedInt(codec.scheme)
    if isinstance(codec, PlainInt):
        return PlainInt(codec.scheme, per_tensor=codec.per_tensor)
    if isinstance(codec, Fp8Scaled):
        return Fp8Scaled(codec.per)
    return Fp8Block(suffix="_scale") if isinstance(codec, Fp8Block) else codec


def _is_expert(ref: TensorRef) -> bool:
    return ref.info.role == "routed_expert"


def _module(ref: TensorRef) -> str:
    return ref.name.removesuffix(WEIGHT)
