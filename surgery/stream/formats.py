"""Output formats: the stored form that a checkpoint is written in, and the config that says so.

source      as each tensor is stored in the base
bf16        every floating weight in bf16 (fp32 routers keep fp32), no quantization_config
fp8-block   linear weights of experts, attention and dense MLPs as e4m3 with fp32 128×128 scales
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from surgery.codecs.codec import Codec
from surgery.codecs.fp8_block import BLOCK, Fp8Block
from surgery.codecs.plain import Opaque, Plain
from surgery.errors import PlanError, Table
from surgery.stream.checkpoint import Checkpoint, Part, TensorRef
from surgery.stream.files import StoredTensor
from surgery.stream.header import tensor_nbytes
from surgery.stream.recode import recode

Format = Literal["source", "bf16", "fp8-block"]
FP8_ROLES = frozenset({"routed_expert", "shared_expert", "attention", "dense_mlp"})


def apply_format(checkpoint: Checkpoint, form: Format) -> Checkpoint:
    """The checkpoint in an output format. Raises PlanError where the format cannot express it."""
    if form == "source":
        _refuse_mixed_scales(checkpoint)
        return checkpoint
    convert = to_bf16 if form == "bf16" else to_fp8_block
    tensors = {name: convert(ref) for name, ref in checkpoint.tensors.items()}
    stuck = [ref for ref in tensors.values() if not ref.codec.decodable and _holds_weights(ref)]
    if stuck:
        rows = tuple((ref.name, ref.codec.name) for ref in stuck)
        raise PlanError(
            f"{len(stuck)} tensors cannot be converted to {form}: {stuck[0].name} is stored as "
            f"{stuck[0].codec.name}",
            hint="write them as they are with output.format=source",
            table=Table(("tensor", "stored as"), rows),
        )
    if form == "bf16":
        config = in_bf16(checkpoint.config)
    else:
        config = {**checkpoint.config, "quantization_config": fp8_config(checkpoint, tensors)}
    return checkpoint.replace(tensors=tensors, config=config)


def _holds_weights(ref: TensorRef) -> bool:
    return not isinstance(ref.codec, Opaque) or ref.codec.weights


def in_bf16(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without quantization and with bf16 wherever it names a dtype, in its sections too."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            found[key] = "bfloat16"
        elif key != "quantization_config":
            found[key] = in_bf16(value) if isinstance(value, Mapping) else value
    return found


def to_bf16(ref: TensorRef) -> TensorRef:
    if isinstance(ref.codec, Plain) and (
        ref.codec.dtype == "BF16" or (ref.codec.dtype == "F32" and ref.info.role == "router")
    ):
        return ref
    if not isinstance(ref.codec, Plain | Fp8Block):
        return ref
    return stored_as(ref, Plain("BF16"))


def to_fp8_block(ref: TensorRef) -> TensorRef:
    codec = Fp8Block()
    if ref.codec == codec:
        return ref
    if isinstance(ref.codec, Fp8Block):
        return stored_as(ref, codec)
    linear = len(ref.shape) == 2 and min(ref.shape) > 1 and ref.name.endswith(".weight")
    if linear and ref.info.role in FP8_ROLES and ref.codec.decodable:
        if ref.is_view:
            raise PlanError(
                f"{ref.name} is one expert of a fused tensor, which fp8-block has no form for",
                hint="write output.format=bf16 or source",
            )
        return stored_as(ref, codec)
    return ref


def stored_as(ref: TensorRef, codec: Codec) -> TensorRef:
    """`ref` under its own name (and in its place of a fused tensor) in the form of `codec`."""
    parts = []
    for spec in codec.parts(ref.shape):
        first = ref.parts[0]
        name = first.stored.name + spec.suffix
        shape = first.stored.shape if first.view is not None else spec.shape
        stored = StoredTensor(name, spec.dtype, shape, tensor_nbytes(spec.dtype, shape))
        parts.append(Part(spec.key, stored, first.view))
    return recode(ref, codec, tuple(parts))


def fp8_config(checkpoint: Checkpoint, tensors: Mapping[str, TensorRef]) -> Mapping[str, Any]:
    """The quantization_config of fp8-block: the base's own where it is FP8, without its scale format."""
    if not any(isinstance(ref.codec, Fp8Block) for ref in tensors.values()):
        raise PlanError(
            f"fp8-block finds nothing to convert in {checkpoint.label}: no tensor has a role of "
            f"{', '.join(sorted(FP8_ROLES))}",
            hint="write output.format=source or bf16",
        )
    kept = [
        ref.name.removesuffix(".weight")
        for ref in tensors.values()
        if not isinstance(ref.codec, Fp8Block)
        and len(ref.shape) == 2
        and ref.name.endswith(".weight")
        and ref.info.role != "embedding"
    ]
    old = checkpoint.quantization
    if old.get("quant_method") == "fp8":
        config = {key: value for key, value in old.items() if key != "scale_fmt"}
        return config | ({"modules_to_not_convert": kept} if "modules_to_not_convert" in old else {})
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }


def _refuse_mixed_scales(checkpoint: Checkpoint) -> None:
    """A config names one scale format; parents of both kinds need the user's choice."""
    mixed = []
    for ref in checkpoint.tensors.values():
        kinds = {each.codec.ue8m0 for each in ref.sources() if isinstance(each.codec, Fp8Block)}
        if isinstance(ref.codec, Fp8Block):
            kinds.add(ref.codec.ue8m0)
        if len(kinds) > 1:
            mixed.append(ref.name)
    if mixed:
        raise PlanError(
            f"{len(mixed)} tensors mix parents with fp32 and with ue8m0 (power of two) scales, "
            f"first {mixed[0]}",
            hint="choose one with output.format: fp8-block or bf16",
        )
