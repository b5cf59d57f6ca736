"""What of a compressed-tensors output its readers cannot load, found out with transformers 5.17 and
compressed-tensors 0.17, 0.18 and 0.20. Such outputs are written all the same: other engines may read them.

transformers decompresses all routed experts by one scheme, and knows how to for symmetric packed integers,
MXFP4 and FP8 with one scale a row or a tensor. Experts on another scheme fail to load, or (experts that are
not quantized beside others that are) load as noise.

Of GPTQ, AWQ and bitsandbytes it loads linear layers alone: with optimum 2.3 and GPTQModel 7.6, or
bitsandbytes 0.50, the routed experts of such files find no place.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.codecs.awq import Awq
from surgery.codecs.codec import Codec
from surgery.codecs.fp8_block import BLOCK, Fp8Block
from surgery.codecs.gptq import Gptq
from surgery.codecs.nf4 import Bnb4
from surgery.codecs.packed_int import PackedInt
from surgery.codecs.plain_int import PlainInt
from surgery.stream.checkpoint import Event, TensorRef
from surgery.stream.quantization_configs import is_compressed


def loading_limits(tensors: Mapping[str, TensorRef]) -> tuple[Event, ...]:
    """An event for each kind of tensor that transformers cannot load."""
    experts = [
        ref
        for ref in tensors.values()
        if ref.info.role == "routed_expert" and len(ref.shape) == 2 and not ref.info.mtp
    ]
    ways: dict[str, list[str]] = {}
    for ref in experts:
        ways.setdefault(ref.codec.name if is_compressed(ref.codec) else "values", []).append(ref.name)
    events = []
    if len(ways) > 1:
        fewest = tuple(ways[min(ways, key=lambda way: len(ways[way]))])
        told = (
            f"routed experts are stored in {len(ways)} ways ({', '.join(ways)}), first {fewest[0]}: "
            "transformers reads all by one and would load noise; vLLM asks for one way within a layer"
        )
        events.append(Event("loading", told, fewest))
    odd = tuple(ref.name for ref in experts if _expert_cannot_load(ref.codec))
    if odd:
        told = f"transformers cannot load {len(odd)} routed experts stored as {tensors[odd[0]].codec.name}"
        events.append(Event("loading", f"{told}, first {odd[0]}", odd))
    ragged = tuple(name for name, ref in tensors.items() if _ragged(ref))
    if ragged:
        told = f"{len(ragged)} FP8 tensors have columns that are no multiple of {BLOCK}"
        events.append(
            Event("loading", f"{told}: compressed-tensors cannot run them, first {ragged[0]}", ragged)
        )
    return tuple(events)


def _ragged(ref: TensorRef) -> bool:
    return isinstance(ref.codec, Fp8Block) and is_compressed(ref.codec) and ref.shape[1] % BLOCK != 0


def _expert_cannot_load(codec: Codec) -> bool:
    if isinstance(codec, PackedInt):
        return not codec.scheme.symmetric
    return is_compressed(codec) and isinstance(codec, PlainInt | Fp8Block)


def packed_limits(tensors: Mapping[str, TensorRef]) -> tuple[Event, ...]:
    """The same for GPTQ, AWQ and bitsandbytes."""
    events = []
    experts = tuple(
        name
        for name, ref in tensors.items()
        if isinstance(ref.codec, Gptq | Awq | Bnb4) and ref.info.role == "routed_expert" and not ref.info.mtp
    )
    if experts:
        codec = tensors[experts[0]].codec
        others = "vLLM's plugin for it does" if isinstance(codec, Bnb4) else "vLLM and GPTQModel do"
        told = f"transformers cannot load {len(experts)} routed experts stored as {codec.name} ({others})"
        events.append(Event("loading", f"{told}, first {experts[0]}", experts))
    offset = tuple(
        name
        for name, ref in tensors.items()
        if isinstance(ref.codec, Gptq) and ref.codec.version == 1 and not ref.codec.scheme.symmetric
    )
    if offset:
        told = f"{len(offset)} tensors have zero points; GPTQModel loads those of others in gptq-v2 alone"
        events.append(Event("loading", f"{told}, first {offset[0]}", offset))
    return tuple(events)
