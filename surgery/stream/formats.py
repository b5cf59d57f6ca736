"""Output formats: the stored form that a checkpoint is written in.

source              as each tensor is stored in the base
bf16                every floating weight in bf16 (fp32 routers keep fp32), no quantization_config
fp8-block           linear weights of experts, attention and dense MLPs as e4m3 with fp32 128×128 scales
compressed-tensors  quantized weights in the layouts of compressed-tensors, codes and scales carried over;
                    weights that are not quantized stay as they are
gptq, awq, …        see `packed_formats`

What config.json says of them is in `quantization_configs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from surgery.codecs.carry import scales_change
from surgery.codecs.codec import IntCodec
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.nf4 import Bnb4
from surgery.codecs.packed_int import PackedInt
from surgery.codecs.plain import Opaque, Plain
from surgery.errors import PlanError, Table
from surgery.stream.checkpoint import Checkpoint, ComputedRef, Event, StoredRef, TensorRef
from surgery.stream.compressed_config import METHOD
from surgery.stream.loading import loading_limits, packed_limits
from surgery.stream.packed_configs import awq_config, bnb_config, gptq_config, mxfp4_config
from surgery.stream.packed_formats import to_awq, to_bnb_nf4, to_gptq, to_gptq_v2, to_mxfp4
from surgery.stream.quantization_configs import (
    cannot_express,
    contradictions,
    is_compressed,
    quantization_config,
)
from surgery.stream.recode import Recode, stored_as
from surgery.stream.roles import QUANTIZED_ROLES

Format = Literal[
    "source", "bf16", "fp8-block", "compressed-tensors", "gptq", "gptq-v2", "awq", "bnb-nf4", "mxfp4"
]
FP8_ROLES = QUANTIZED_ROLES
ACTIVATION_SCALES = (
    ".input_scale", ".output_scale", ".input_zero_point", ".output_zero_point", ".input_global_scale",
    ".k_scale", ".v_scale",
)  # fmt: skip
"""What quantized checkpoints keep beside weights; without quantization nobody asks for it."""


def apply_format(checkpoint: Checkpoint, form: Format) -> Checkpoint:
    """The checkpoint in an output format. Raises PlanError where the format cannot express it."""
    if form == "source":
        _refuse_mixed_scales(checkpoint)
        _refuse_read_only(checkpoint)
        return checkpoint
    convert, describe = FORMS[form]
    kept = checkpoint if form == METHOD else without_activation_scales(checkpoint)
    tensors = {name: convert(ref) for name, ref in kept.tensors.items()}
    stuck = [ref for ref in tensors.values() if not ref.codec.decodable and _holds_weights(ref)]
    if stuck:
        rows = tuple((ref.name, ref.codec.name) for ref in stuck)
        raise PlanError(
            f"{len(stuck)} tensors cannot be converted to {form}: {stuck[0].name} is stored as "
            f"{stuck[0].codec.name}",
            hint="write them as they are with output.format=source",
            table=Table(("tensor", "stored as"), rows),
        )
    if describe is None:
        config = in_bf16(checkpoint.config)
    else:
        config = {**checkpoint.config, "quantization_config": describe(checkpoint, tensors)}
    limits = loading_limits(tensors) if form == METHOD else packed_limits(tensors)
    events = (*kept.events, *_rounded_scales(tensors), *limits)
    return kept.replace(tensors=tensors, config=config, events=events)


def _holds_weights(ref: TensorRef) -> bool:
    return not isinstance(ref.codec, Opaque) or ref.codec.weights


def without_activation_scales(checkpoint: Checkpoint) -> Checkpoint:
    """Without the scales of activations that a compressed-tensors checkpoint may have."""
    if checkpoint.quantization.get("quant_method") != METHOD:
        return checkpoint
    gone = [name for name in checkpoint.tensors if name.endswith(ACTIVATION_SCALES)]
    return checkpoint.replace(
        tensors={name: ref for name, ref in checkpoint.tensors.items() if name not in set(gone)},
        dropped={**checkpoint.dropped, **dict.fromkeys(gone, "scales of quantized activations")},
    )


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
    return stored_as(ref, Plain("BF16")) if ref.codec.decodable else ref


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
    return ref if isinstance(ref.codec, Plain) else to_bf16(ref)


def to_compressed_tensors(ref: TensorRef) -> TensorRef:
    codec = ref.codec
    if isinstance(codec, Plain | Opaque) or (is_compressed(codec) and not isinstance(codec, PackedInt)):
        return ref
    if not ref.name.endswith(".weight"):
        raise cannot_express(METHOD, ref)
    if isinstance(codec, Fp8Block):
        dtype = "F32" if codec.scale_dtype == "F8_E8M0" else codec.scale_dtype
        return stored_as(ref, Fp8Block(dtype, codec.ue8m0, suffix="_scale"))
    if isinstance(codec, IntCodec) and not ref.is_view and not getattr(codec, "act_order", False):
        return stored_as(ref, PackedInt(codec.scheme, codec.scale_dtype))
    raise cannot_express(METHOD, ref)


def fp8_config(checkpoint: Checkpoint, tensors: Mapping[str, TensorRef]) -> Mapping[str, Any]:
    """The quantization_config of fp8-block: the base's own where it is FP8, without its scale format."""
    if not any(isinstance(ref.codec, Fp8Block) for ref in tensors.values()):
        raise PlanError(
            f"fp8-block finds nothing to convert in {checkpoint.label}: no tensor has a role of "
            f"{', '.join(sorted(FP8_ROLES))}",
            hint="write output.format=source or bf16",
        )
    fresh, old = quantization_config(tensors, "fp8-block"), checkpoint.quantization
    if old.get("quant_method") != "fp8":
        return fresh
    kept = {key: value for key, value in old.items() if key != "scale_fmt"}
    key = "modules_to_not_convert"
    return kept | ({key: fresh[key]} if key in old else {})


def compressed_config(checkpoint: Checkpoint, tensors: Mapping[str, TensorRef]) -> Mapping[str, Any]:
    """The base's own config where it already says what these tensors are (it may ask for quantized
    activations, which a new one does not), else a new one."""
    old = checkpoint.quantization
    if old.get("quant_method") == METHOD and not contradictions(old, tensors):
        fresh = quantization_config(tensors, METHOD)
        return {**old, "version": fresh["version"]}
    return quantization_config(tensors, METHOD)


Convert = Callable[[TensorRef], TensorRef]
Describe = Callable[[Checkpoint, Mapping[str, TensorRef]], Mapping[str, Any]]

FORMS: Mapping[str, tuple[Convert, Describe | None]] = {
    "bf16": (to_bf16, None),
    "fp8-block": (to_fp8_block, fp8_config),
    "compressed-tensors": (to_compressed_tensors, compressed_config),
    "gptq": (to_gptq, gptq_config),
    "gptq-v2": (to_gptq_v2, gptq_config),
    "awq": (to_awq, awq_config),
    "bnb-nf4": (to_bnb_nf4, bnb_config),
    "mxfp4": (to_mxfp4, mxfp4_config),
}
"""How each format stores a tensor, and what quantization_config it has (None: none)."""


def _rounded_scales(tensors: Mapping[str, TensorRef]) -> tuple[Event, ...]:
    """What is lost where codes are carried over to a form that stores narrower scales."""
    names = tuple(
        ref.name
        for ref in tensors.values()
        if isinstance(ref, ComputedRef)
        and isinstance(ref.kernel, Recode)
        and isinstance(ref.inputs[0], StoredRef)
        and isinstance(ref.inputs[0].codec, IntCodec)
        and isinstance(ref.codec, IntCodec)
        and scales_change(ref.inputs[0].codec, ref.codec)
    )
    if not names:
        return ()
    ref = tensors[names[0]]
    told = f"{len(names)} tensors keep their codes, but their scales are rounded"
    return (Event("scales", f"{told} to what {ref.codec.name} stores, first {names[0]}", names),)


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


def _refuse_read_only(checkpoint: Checkpoint) -> None:
    """Some forms are read and copied, but nothing new can be put into them."""
    stuck = [
        ref
        for ref in checkpoint.tensors.values()
        if isinstance(ref, ComputedRef) and isinstance(ref.codec, Bnb4) and not ref.codec.encodable
    ]
    if stuck:
        raise PlanError(
            f"{len(stuck)} tensors would be computed and stored as {stuck[0].codec.name}, which is only read "
            f"and copied, first {stuck[0].name}",
            hint="write output.format=bnb-nf4 or bf16",
        )
