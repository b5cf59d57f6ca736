"""Logical tensors of quantized checkpoints, by the quant_method of their config.

A reader is given every stored tensor and the quantization_config, and returns the tensors that it can
explain, each with the codec and the parts that it is made of; everything else is grouped as in any other
checkpoint.
One line in READERS makes a method known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from surgery.stream.bitsandbytes import read_bitsandbytes
from surgery.stream.compressed_tensors import read_compressed_tensors
from surgery.stream.files import StoredTensor
from surgery.stream.gptq import read_awq, read_gptq
from surgery.stream.grouping import Grouping

Reader = Callable[[Mapping[str, StoredTensor], Mapping[str, Any]], Grouping]

READERS: Mapping[str, Reader] = {
    "awq": read_awq,
    "bitsandbytes": read_bitsandbytes,
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
}


def read_quantized(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> Grouping:
    """What the reader of the config's quant_method makes of stored tensors; nothing where there is none."""
    reader = READERS.get(str(quantization.get("quant_method")))
    return reader(tensors, quantization) if reader else Grouping()
