"""The quantization_config of the formats in `packed_formats`, with the keys that their loaders read.

A GPTQ config has one bits, group_size and sym for most modules, and in `dynamic` patterns of those that
differ (`+:`) or are not quantized (`-:`). AWQ and bitsandbytes have one scheme and list what is not
quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from surgery.codecs.awq import Awq
from surgery.codecs.codec import Codec
from surgery.codecs.gptq import Gptq
from surgery.codecs.mxfp4 import Mxfp4Blocks
from surgery.codecs.nf4 import Bnb4
from surgery.codecs.plain import Opaque
from surgery.codecs.schemes import IntScheme
from surgery.errors import PlanError
from surgery.stream.checkpoint import Checkpoint, TensorRef
from surgery.stream.module_patterns import describe
from surgery.stream.quantization_configs import unquantized

Tensors = Mapping[str, TensorRef]
PRODUCER = "llm-surgery"
GPT_OSS_KEPT = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def gptq_config(checkpoint: Checkpoint, tensors: Tensors) -> dict[str, Any]:
    """Of tensors in `Gptq` of one version; other quantized tensors are not among them."""
    modules: dict[IntScheme, list[str]] = {}
    codecs = []
    for ref in tensors.values():
        if isinstance(ref.codec, Gptq):
            modules.setdefault(ref.codec.scheme, []).append(_module(ref))
            codecs.append(ref.codec)
    if not codecs:
        raise _nothing("gptq")
    general = max(modules, key=lambda scheme: len(modules[scheme]))
    kept = unquantized(tensors)
    dynamic: dict[str, dict[str, Any]] = {}
    for scheme, mine in modules.items():
        if scheme != general:
            others = [name for other, names in modules.items() if other != scheme for name in names]
            settings = _gptq_settings(scheme)
            dynamic |= dict.fromkeys((f"+:{each}" for each in _patterns(mine, [*others, *kept])), settings)
    quantized = [name for names in modules.values() for name in names]
    head = "lm_head"
    outside = [name for name in kept if name != head]
    dynamic |= {f"-:{each}": {} for each in _patterns(outside, quantized)}
    config = {
        "quant_method": "gptq", **_gptq_settings(general),
        "desc_act": any(codec.act_order for codec in codecs), "lm_head": head in quantized,
        "checkpoint_format": "gptq_v2" if codecs[0].version == 2 else "gptq", "pack_dtype": "int32",
        "meta": {"quantizer": [PRODUCER]},
    }  # fmt: skip
    return config | ({"dynamic": dynamic} if dynamic else {})


def _gptq_settings(scheme: IntScheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size or -1, "sym": scheme.symmetric}


def _patterns(wanted: list[str], others: list[str]) -> list[str]:
    """Patterns that match from the beginning of a name to its end."""
    escaped = (each.removeprefix("re:") if each.startswith("re:") else f"{_literal(each)}$"
               for each in describe(wanted, others))  # fmt: skip
    return list(escaped)


def _literal(name: str) -> str:
    return name.replace(".", r"\.")


def awq_config(checkpoint: Checkpoint, tensors: Tensors) -> dict[str, Any]:
    """Of tensors in `Awq`. Raises PlanError where their groups differ: an AWQ config has one size."""
    sizes = Counter(ref.codec.scheme.group_size for ref in tensors.values() if isinstance(ref.codec, Awq))
    if not sizes:
        raise _nothing("awq")
    if len(sizes) > 1:
        raise PlanError(
            f"awq has one group size for all tensors, not {', '.join(map(str, sorted(sizes)))}",
            hint="write output.format=gptq or compressed-tensors",
        )
    return {
        "quant_method": "awq", "bits": 4, "group_size": next(iter(sizes)) or -1, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": unquantized(tensors) or None,
    }  # fmt: skip


def bnb_config(checkpoint: Checkpoint, tensors: Tensors) -> dict[str, Any]:
    """Of tensors in `Bnb4`, the keys of transformers' BitsAndBytesConfig."""
    codecs = [ref.codec for ref in tensors.values() if isinstance(ref.codec, Bnb4)]
    if not codecs:
        raise _nothing("bnb-nf4")
    kept = unquantized(tensors)
    if not any(name.endswith("lm_head.weight") for name in tensors):
        kept.append("lm_head")
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
        "_load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": codecs[0].dtype,
        "bnb_4bit_use_double_quant": any(codec.nested for codec in codecs), "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept, "llm_int8_threshold": 6.0,
    }  # fmt: skip


def mxfp4_config(checkpoint: Checkpoint, tensors: Tensors) -> dict[str, Any]:
    """gpt-oss' own. Raises PlanError for other models."""
    found = any(isinstance(ref.codec, Mxfp4Blocks) for ref in tensors.values())
    if not found or checkpoint.architecture.name != "gpt_oss":
        raise PlanError(
            f"mxfp4 finds nothing to convert in {checkpoint.label}: it is the form of gpt-oss' fused experts",
            hint="write output.format=source or bf16",
        )
    old = checkpoint.quantization
    if old.get("quant_method") == "mxfp4":
        return dict(old)
    return {"quant_method": "mxfp4", "modules_to_not_convert": list(GPT_OSS_KEPT)}


METHODS: Mapping[str, type[Codec]] = {
    "awq": Awq,
    "bitsandbytes": Bnb4,
    "gptq": Gptq,
    "mxfp4": Mxfp4Blocks,
}


def packed_contradictions(quantization: Mapping[str, Any], tensors: Tensors) -> list[str]:
    """What a quantization_config of these methods says of tensors that they are not. Files whose layout is
    only copied say what they like."""
    method = quantization.get("quant_method")
    if any(isinstance(ref.codec, Opaque) and ref.codec.weights for ref in tensors.values()):
        return []
    wrong = []
    for name, kind in METHODS.items():
        count = sum(isinstance(ref.codec, kind) for ref in tensors.values())
        if (name == method) != bool(count):
            wrong.append(f"quantization_config says {name}: {name == method}, its tensors: {count}")
    return wrong


def _nothing(form: str) -> PlanError:
    return PlanError(f"{form} finds no tensor that is quantized so", hint="add a quantize step")


def _module(ref: TensorRef) -> str:
    return ref.name.removesuffix(".weight")
