"""Read checkpoints of compressed-tensors: packed and unpacked integers, FP8, MXFP4.

The parts of a module are found by their names, its scheme by the config, and both have to agree. Forms that
are not computed with (NVFP4, activation order with a g_idx, fused 3-D tensors) keep their parts together
under the logical name and are copied as stored.

A row of 3, 5, 6 or 7 bits was packed otherwise before version 0.18; its width tells which, and the version
where both have the same. The columns of a row with one scale do not follow from its width: they are read from
`weight_shape` in local files, and taken to fill the words of files that are read over the network (the codec
refuses the tensor when it is decoded and they do not).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.codecs.bitstream import word_count
from surgery.codecs.codec import Codec
from surgery.codecs.fp8_block import BLOCK, Fp8Block
from surgery.codecs.fp8_scaled import Fp8Scaled
from surgery.codecs.mxfp4 import GROUP
from surgery.codecs.mxfp4_packed import Mxfp4Packed
from surgery.codecs.packed_int import PackedInt
from surgery.codecs.plain import ITEMSIZE, Opaque
from surgery.codecs.plain_int import PlainInt
from surgery.codecs.schemes import BITS, IntScheme
from surgery.stream.checkpoint import Part
from surgery.stream.compressed_config import CompressedConfig, WeightScheme
from surgery.stream.files import StoredTensor
from surgery.stream.grouping import Grouping, Logical

PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale",
)  # fmt: skip
DENSE_SINCE = (0, 18)
"""The release from which codes straddle words: the wheels of 0.17.0 and 0.17.1 still pad them."""
_EIGHT_BITS = ("F8_E4M3", "I8")


class _Fault(Exception):
    """What is wrong with the stored tensor `name`; caught where modules are grouped."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(problem)
        self.name = name


def read_compressed_tensors(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Grouping:
    """The quantized tensors of a checkpoint, under the names of their weights."""
    config = CompressedConfig(quantization)
    grouping = Grouping()
    for module in _modules(tensors):
        name = f"{module}.weight"
        found = {
            part: tensors[f"{module}.{part}"] for part in ("weight", *PARTS) if f"{module}.{part}" in tensors
        }
        try:
            shape, codec = _form(module, found, config)
        except _Fault as fault:
            grouping.faults.append((fault.name, str(fault)))
            continue
        if isinstance(codec, Opaque):
            parts = tuple(Part(part, stored, None) for part, stored in found.items())
            grouping.tensors.append(Logical(name, shape, codec, parts))
            continue
        known = len(grouping.faults)
        grouping.add(name, shape, codec, tensors)
        stray = found.keys() - {spec.stored_name("weight") for spec in codec.parts(shape)}
        if stray and len(grouping.faults) == known:
            grouping.faults.append((f"{module}.{min(stray)}", f"unexpected beside {codec.name}"))
    return grouping


def _modules(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Modules with a part of a quantized weight, in the order of the tensors."""
    found = dict.fromkeys(
        name.rpartition(".")[0]
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] in PARTS or (name.endswith(".weight") and tensor.dtype in _EIGHT_BITS)
    )
    return list(found)


def _form(
    module: str, found: Mapping[str, StoredTensor], config: CompressedConfig
) -> tuple[tuple[int, ...], Codec]:
    """The logical shape and the codec of a module's weight. Raises _Fault."""
    scheme = config.scheme(module)
    main = found.get("weight_packed") or found.get("weight")
    if main is None:
        raise _Fault(next(iter(found.values())).name, "a part of a quantized weight that is not there")
    if "weight_packed" in found and "weight" in found:
        raise _Fault(main.name, f"stored packed and, as {module}.weight, unpacked")
    if scheme is None:
        ignored = "is in its ignore list" if config.ignores(module) else "is in none of its groups"
        raise _Fault(main.name, f"quantized, but by the quantization_config {module} {ignored}")
    scale = found.get("weight_scale")
    if scale is None:
        raise _Fault(main.name, f"{module}.weight_scale is missing")
    kept = _copied_only(found, main, scale, scheme)
    if kept:
        return main.shape, Opaque(kept)
    if main.dtype == "I32":
        return _packed_int(module, found, main, scale, scheme, config)
    if main.dtype == "U8":
        _expect(main, scheme.floating and scheme.bits == 4, scheme, "MXFP4 codes")
        return (main.shape[0], main.shape[1] * 2), Mxfp4Packed()
    if main.dtype == "I8":
        _expect(main, not scheme.floating and scheme.strategy != "block", scheme, "int8 codes")
        per_tensor = scheme.strategy == "tensor"
        size = _divided(main, scale, main.shape[1], scheme)
        ints = IntScheme(scheme.bits, size, scheme.symmetric)
        return main.shape, PlainInt(ints, scale.dtype, per_tensor)
    _expect(main, scheme.floating and scheme.bits == 8, scheme, "FP8 codes")
    if scheme.strategy == "block":
        return main.shape, Fp8Block(scale.dtype, suffix="_scale")
    return main.shape, Fp8Scaled("tensor" if scheme.strategy == "tensor" else "channel", scale.dtype)


def _copied_only(
    found: Mapping[str, StoredTensor], main: StoredTensor, scale: StoredTensor, scheme: WeightScheme
) -> str:
    """What a form is called that no codec decodes; empty for the others."""
    if "weight_g_idx" in found:
        return f"{scheme.form} with a g_idx (activation order by group)"
    if len(main.shape) != 2:
        return f"{scheme.form} of {len(main.shape)} dimensions"
    if main.dtype == "U8":
        mxfp4 = scale.dtype == "U8" and scheme.group_size == GROUP and "weight_global_scale" not in found
        return "" if mxfp4 else f"{scheme.form} ({scheme.bits} bits)"
    if main.dtype not in ("I32", *_EIGHT_BITS):
        return f"{scheme.form} as {main.dtype}"
    if scale.dtype not in ITEMSIZE or scale.dtype == "F64":
        return f"{scheme.form} with {scale.dtype} scales"
    if main.dtype == "F8_E4M3":
        known = scheme.strategy in ("tensor", "channel") or scheme.block == (BLOCK, BLOCK)
        return "" if known else f"{scheme.form} by {scheme.strategy}"
    tensor_wise = scheme.strategy == "tensor" and (main.dtype == "I32" or not scheme.symmetric)
    if scheme.bits not in BITS or tensor_wise:
        return f"{scheme.form} of {scheme.bits} bits by {scheme.strategy}"
    return ""


def _expect(main: StoredTensor, fits: bool, scheme: WeightScheme, what: str) -> None:
    if not fits:
        kind = "float" if scheme.floating else "int"
        raise _Fault(main.name, f"{what}, but the quantization_config says {scheme.bits} bits of {kind}")


def _divided(main: StoredTensor, scale: StoredTensor, cols: int, scheme: WeightScheme) -> int:
    """The group size of an integer scheme, 0 for one group a row. Raises _Fault where it does not divide."""
    if scheme.strategy not in ("group", "channel", "tensor") or (
        scheme.strategy == "group" and scheme.group_size < 1
    ):
        raise _Fault(main.name, f"integers by {scheme.strategy} with groups of {scheme.group_size}")
    size = scheme.group_size if scheme.strategy == "group" else 0
    if size and cols % size:
        raise _Fault(scale.name, f"groups of {size} do not divide {cols} columns")
    return size


def _packed_int(
    module: str,
    found: Mapping[str, StoredTensor],
    main: StoredTensor,
    scale: StoredTensor,
    scheme: WeightScheme,
    config: CompressedConfig,
) -> tuple[tuple[int, ...], Codec]:
    _expect(main, not scheme.floating, scheme, "packed integers")
    whole = found.get("weight_shape")
    if whole is None:
        raise _Fault(main.name, f"{module}.weight_shape is missing")
    rows, width = main.shape
    old = config.version < DENSE_SINCE
    if scheme.strategy == "group" and scheme.group_size:
        cols = scale.shape[-1] * scheme.group_size if scale.shape else 0
    elif whole.dtype == "I64" and whole.shape == (2,) and whole.file is not None and whole.file.local:
        cols = _second(whole)
    else:
        cols = width * (32 // scheme.bits) if old else width * 32 // scheme.bits
    size = _divided(main, scale, cols, scheme)
    dense, padded = word_count(cols, scheme.bits), word_count(cols, scheme.bits, padded=True)
    if width not in (dense, padded):
        raise _Fault(
            main.name, f"{width} words a row, {dense} expected for {cols} columns of {scheme.bits} bits"
        )
    is_padded = 32 % scheme.bits != 0 and (old if dense == padded else width == padded)
    return (rows, cols), PackedInt(IntScheme(scheme.bits, size, scheme.symmetric), scale.dtype, is_padded)


def _second(whole: StoredTensor) -> int:
    """The columns that a weight_shape tells."""
    import numpy as np

    told = np.empty(16, np.uint8)
    if whole.file is not None:
        whole.file.read_into(told, whole.offset)
    return int(told.view(np.int64)[1])
