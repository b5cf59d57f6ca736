"""Read checkpoints of bitsandbytes in 4 bits.

The shape of a weight stands in the JSON beside it and nowhere else, so these small tensors are read when the
checkpoint is opened (over the network: several at a time). 8-bit checkpoints are left to be copied as stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from surgery.codecs.nf4 import BLOCKS, Bnb4
from surgery.stream.files import StoredTensor
from surgery.stream.grouping import Grouping

STATE = ".quant_state.bitsandbytes__"
LONGEST = 4096
READERS = 16
DTYPES = ("bfloat16", "float16", "float32")


class _Fault(Exception):
    """What is wrong with a quant_state; caught where weights are grouped."""


def read_bitsandbytes(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Grouping:
    """The 4-bit weights of a checkpoint."""
    states = [name for name in tensors if STATE in name]
    grouping = Grouping()
    with ThreadPoolExecutor(READERS) as pool:
        texts = list(pool.map(_text, (tensors[name] for name in states)))
    for state, text in zip(states, texts, strict=True):
        name, _, kind = state.partition(STATE)
        try:
            codec, shape = _form(kind, text)
        except _Fault as fault:
            grouping.faults.append((state, str(fault)))
            continue
        grouping.add(name, shape, codec, tensors)
    grouped = {state.partition(STATE)[0] for state in states}
    for name in tensors:
        weight = name.removesuffix(".absmax")
        if weight != name and weight in tensors and weight not in grouped:
            grouping.faults.append((weight, f"{weight}{STATE}nf4 is missing"))
    return grouping


def _text(stored: StoredTensor) -> bytes:
    import numpy as np

    if stored.file is None or not 0 < stored.nbytes <= LONGEST:
        return b""
    buffer = np.empty(stored.nbytes, np.uint8)
    stored.file.read_into(buffer, stored.offset)
    return buffer.tobytes()


def _form(kind: str, text: bytes) -> tuple[Bnb4, tuple[int, ...]]:
    """The codec and the shape that a quant_state tells. Raises _Fault."""
    try:
        told = json.loads(text)
    except ValueError as error:
        raise _Fault("no JSON") from error
    if not isinstance(told, dict) or told.get("quant_type") != kind or kind not in ("nf4", "fp4"):
        raise _Fault(f"says nothing of {kind}")
    shape, block, dtype = told.get("shape"), told.get("blocksize"), told.get("dtype")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape) or not shape:
        raise _Fault(f"has the shape {shape!r}")
    if block not in BLOCKS or dtype not in DTYPES:
        raise _Fault(f"has blocksize {block!r} and dtype {dtype!r}")
    nested = "nested_offset" in told
    if nested and (told.get("nested_blocksize") != 256 or not isinstance(told["nested_offset"], float)):
        raise _Fault(f"has nested_blocksize {told.get('nested_blocksize')!r}")
    plain = Bnb4(kind, block, dtype)
    ours = not nested and plain.state(tuple(shape)) == text
    return plain if ours else Bnb4(kind, block, dtype, nested, len(text)), tuple(shape)
