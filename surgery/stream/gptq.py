"""Read checkpoints of AutoGPTQ, GPTQModel and AutoAWQ: linear weights as qweight, qzeros and scales.

What a module has is found by its names, how it is packed is said by the config, and both have to agree.
GPTQ's `dynamic` overrides bits, group size, symmetry and act-order by patterns over module names, the first
match wins; an override of anything else that changes the layout is refused by name. Layouts that are not
computed with (Marlin, GEMV, 5 to 7 planar bits, other words than int32) are left to be copied as stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.codecs.awq import Awq
from surgery.codecs.gptq import BITS, WORD, Gptq
from surgery.codecs.schemes import IntScheme
from surgery.errors import CheckpointError
from surgery.stream.files import StoredTensor
from surgery.stream.grouping import Grouping

PARTS = ("qweight", "qzeros", "scales", "g_idx")
VERSIONS = {"gptq": 1, "gptq_v2": 2}
_LAYOUT = ("method", "quant_method", "format", "checkpoint_format", "pack_dtype")
_OVERRIDES = ("bits", "group_size", "sym", "desc_act")


@dataclass(frozen=True)
class GptqSettings:
    """What a config, or an override of it, says of a module."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool

    @property
    def scheme(self) -> IntScheme:
        return IntScheme(self.bits, max(self.group_size, 0), self.sym)

    @property
    def act_order(self) -> bool:
        """Whether columns may be scattered: with one group there is nothing to scatter."""
        return self.desc_act and self.group_size > 0


def read_gptq(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Grouping:
    """The quantized weights of a GPTQ checkpoint. Raises CheckpointError for a config that is none."""
    told = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    version = VERSIONS.get(str(told).lower())
    words = str(quantization.get("pack_dtype", "int32")).removeprefix("torch.")
    if version is None or words != "int32":
        return Grouping()
    general = _settings(quantization, GptqSettings(4, 128, True, False))
    overrides = _dynamic(quantization.get("dynamic") or {}, general)
    grouping = Grouping()
    for module in _modules(tensors, grouping):
        settings = next((found for pattern, found in overrides if pattern.match(module)), general)
        qweight = tensors[f"{module}.qweight"]
        if settings is None:
            grouping.faults.append((qweight.name, "quantized, though `dynamic` leaves its module out"))
        elif settings.bits in BITS:
            codec = Gptq(settings.scheme, version, settings.act_order)
            _add(grouping, module, codec, settings.bits, qweight, tensors)
    return grouping


def read_awq(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Grouping:
    """The quantized weights of an AWQ checkpoint in the GEMM form."""
    told = quantization.get("version") or quantization.get("format") or "gemm"
    bits = quantization.get("bits", quantization.get("w_bit", 4))
    if str(told).lower() != "gemm" or bits != 4:
        return Grouping()
    size = quantization.get("group_size", quantization.get("q_group_size", 128))
    zero_point = quantization.get("zero_point", True)
    if not isinstance(size, int) or not isinstance(zero_point, bool):
        raise _wrong("awq", f"has group_size {size!r} and zero_point {zero_point!r}")
    codec = Awq(IntScheme(4, max(size, 0), not zero_point))
    grouping = Grouping()
    for module in _modules(tensors, grouping):
        qweight = tensors[f"{module}.qweight"]
        if len(qweight.shape) == 2 and 0 not in qweight.shape:
            _add_shaped(grouping, module, codec, (qweight.shape[1] * 8, qweight.shape[0]), tensors)
        else:
            grouping.faults.append((qweight.name, f"shape {list(qweight.shape)}, [in, out / 8] expected"))
    return grouping


def _modules(tensors: Mapping[str, StoredTensor], grouping: Grouping) -> list[str]:
    """Modules with a qweight; a part without one is a fault."""
    found = dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in PARTS)
    for module in found:
        if f"{module}.qweight" not in tensors:
            part = next(part for part in PARTS if f"{module}.{part}" in tensors)
            grouping.faults.append((f"{module}.{part}", f"{module}.qweight is missing"))
    return [module for module in found if f"{module}.qweight" in tensors]


def _add(
    grouping: Grouping,
    module: str,
    codec: Gptq,
    bits: int,
    qweight: StoredTensor,
    tensors: Mapping[str, StoredTensor],
) -> None:
    if len(qweight.shape) != 2 or 0 in qweight.shape or qweight.shape[0] * WORD % bits:
        told, form = list(qweight.shape), f"[in · {bits} / {WORD}, out]"
        grouping.faults.append((qweight.name, f"shape {told}, {form} expected"))
        return
    _add_shaped(grouping, module, codec, (qweight.shape[1], qweight.shape[0] * WORD // bits), tensors)


def _add_shaped(
    grouping: Grouping,
    module: str,
    codec: Gptq | Awq,
    shape: tuple[int, int],
    tensors: Mapping[str, StoredTensor],
) -> None:
    reason = codec.fits(shape)
    if reason:
        grouping.faults.append(
            (f"{module}.qweight", f"by the quantization_config {codec.name}, but {reason}")
        )
    else:
        grouping.add(f"{module}.weight", shape, codec, tensors)


def _settings(told: Mapping[str, Any], base: GptqSettings) -> GptqSettings:
    """`base` with what `told` says otherwise."""
    values = {key: told.get(key, getattr(base, key)) for key in _OVERRIDES}
    for key, value in values.items():
        wanted = int if key in ("bits", "group_size") else bool
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise _wrong("gptq", f"has {key} {value!r}")
    return GptqSettings(**values)


def _dynamic(told: Any, general: GptqSettings) -> list[tuple[re.Pattern[str], GptqSettings | None]]:
    """Patterns in their order, with the settings of what they match; None: not quantized."""
    if not isinstance(told, Mapping):
        raise _wrong("gptq", "has a `dynamic` that is no mapping of patterns to settings")
    found: list[tuple[re.Pattern[str], GptqSettings | None]] = []
    for text, override in told.items():
        try:
            pattern = re.compile(re.sub(r"^[-+]:", "", text))
        except re.error as error:
            raise _wrong("gptq", f"has `{text}` in `dynamic`, which is no pattern: {error}") from error
        if text.startswith("-:"):
            found.append((pattern, None))
            continue
        if not isinstance(override, Mapping):
            raise _wrong("gptq", f"has `{text}` in `dynamic` without settings")
        strange = next((key for key in _LAYOUT if key in override), None)
        if strange:
            raise _wrong("gptq", f"overrides `{strange}` in `dynamic` for `{text}`, which is not understood")
        found.append((pattern, _settings(override, general)))
    return found


def _wrong(method: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"the quantization_config of {method} {what}", hint="fetch config.json again, or mend it"
    )
