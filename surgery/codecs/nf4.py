"""bitsandbytes' 4-bit forms: NF4 (QLoRA, arXiv 2305.14314) and FP4, in blocks over the flattened tensor.

    w[i] = level[code[i]] · absmax[i // blocksize]

    X.weight                                uint8 [⌈n/2⌉, 1]    two codes a byte, the first in the high nibble
    X.weight.absmax                         fp32 [blocks]
    X.weight.quant_map                      fp32 [16]           the levels
    X.weight.quant_state.bitsandbytes__nf4  uint8 [·]           JSON: quant_type, blocksize, dtype, shape

Encoding is bitsandbytes' own on the CPU (0.50), to the byte, in float32: a whole block is multiplied by
1 / max(absmax, 1e-38), a shorter last one divided by it, and the code is that of the nearest level, the lower
one of two (levels are told apart at the mean of their float32 values). NaN or infinity makes the absmax of a
block so, and with it the block.

Double quantization stores absmax in 8 bits, absmax = nested_quant_map[code] · nested_absmax[block // 256] +
nested_offset, with the last in the JSON. It is read, not written: the offset is a mean over the whole tensor
whose last bit depends on how bitsandbytes' host adds it up. FP4 is read, not written, too.

A last odd code is followed by that of 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import WHOLE, PartSpec, Spans, matrix_shape, whole_spans
from surgery.codecs.levels import borders_below
from surgery.codecs.magnitude import all_finite
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch

BLOCK = 64
NESTED_BLOCK = 256
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SMALLEST = 1e-38
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution, with 0 among them."""


@dataclass(frozen=True, slots=True)
class Bnb4:
    """A 4-bit tensor. `dtype` is what its JSON says that the weights were and are decoded to; `json_bytes`
    is the length of a JSON that is not as ours, 0 for all others."""

    kind: str = "nf4"
    blocksize: int = BLOCK
    dtype: str = "bfloat16"
    nested: bool = False
    json_bytes: int = 0
    decodable: bool = True

    @property
    def name(self) -> str:
        block = "" if self.blocksize == BLOCK else f" block {self.blocksize}"
        return f"{self.kind}{block}{' double-quantized' if self.nested else ''}"

    @property
    def encodable(self) -> bool:
        return self.kind == "nf4" and not self.nested and not self.json_bytes

    @property
    def granule(self) -> int:
        return self.blocksize if self.blocksize <= 128 else WHOLE

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        count = prod(shape)
        blocks = -(-count // self.blocksize)
        found = [
            PartSpec("weight", "", "U8", (-(-count // 2), 1)),
            PartSpec("absmax", ".absmax", "U8" if self.nested else "F32", (blocks,)),
            PartSpec("quant_map", ".quant_map", "F32", (16,)),
        ]
        if self.nested:
            found.append(PartSpec("nested_absmax", ".nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)))
            found.append(PartSpec("nested_quant_map", ".nested_quant_map", "F32", (256,)))
        state = f".quant_state.bitsandbytes__{self.kind}"
        return (*found, PartSpec("quant_state", state, "U8", (self.json_bytes or len(self.state(shape)),)))

    def state(self, shape: tuple[int, ...]) -> bytes:
        """The JSON of a tensor that is not double-quantized."""
        return json.dumps(
            {"quant_type": self.kind, "blocksize": self.blocksize, "dtype": self.dtype, "shape": [*shape]}
        ).encode()

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        cols = matrix_shape(shape)[1]
        first, last = start * cols, stop * cols
        size = 1 if self.nested else 4
        return whole_spans(self.parts(shape)) | {
            "weight": (first // 2, -(-last // 2)),
            "absmax": (first // self.blocksize * size, -(-last // self.blocksize) * size),
        }

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        import torch

        from surgery.codecs.packed_ops import decode_nibbles

        cols = matrix_shape(shape)[1]
        values = decode_nibbles(
            torch.from_numpy(raw["weight"]),
            torch.from_numpy(raw["quant_map"]).view(torch.float32),
            self._absmax(raw, start * cols // self.blocksize),
            (stop - start) * cols,
            block=self.blocksize,
            high_first=True,
        )
        return values if len(shape) < 2 else values.view(stop - start, cols)

    def _absmax(self, raw: Mapping[str, np.ndarray[Any, Any]], first: int) -> torch.Tensor:
        """float32 absmax of the blocks in hand, the first of which is number `first`."""
        import torch

        stored = torch.from_numpy(raw["absmax"])
        if not self.nested:
            return stored.view(torch.float32)
        levels = torch.from_numpy(raw["nested_quant_map"]).view(torch.float32)
        scales = torch.from_numpy(raw["nested_absmax"]).view(torch.float32)
        outer = torch.arange(first, first + stored.numel()) // NESTED_BLOCK
        offset = torch.tensor(json.loads(raw["quant_state"].tobytes())["nested_offset"], dtype=torch.float32)
        return levels[stored.long()] * scales[outer] + offset

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        import torch

        if not self.encodable:
            raise CheckpointError(
                f"tensors stored as {self.name} can be decoded but not written",
                hint="write output.format=bnb-nf4 or bf16",
            )
        from surgery.codecs.encode_ops import encode_nf4

        codes, absmax = encode_nf4(tile.reshape(-1), self.blocksize)
        return {"weight": codes.numpy(), "absmax": absmax.view(torch.uint8).numpy()}

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        return {
            "quant_map": np.array(LEVELS, np.float32).view(np.uint8),
            "quant_state": np.frombuffer(self.state(shape), np.uint8),
        }

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        if key == "nested_absmax" or (key == "absmax" and not self.nested):
            return all_finite("F32", raw)
        return True


def encode_nf4(values: torch.Tensor, blocksize: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 bytes [⌈n/2⌉], float32 absmax [blocks]) of float32 values [n]."""
    import torch

    count = values.numel()
    whole = count // blocksize
    blocks = values[: whole * blocksize].view(whole, blocksize)
    absmax = blocks.abs().amax(-1) if whole else values.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None]).clamp_(-1, 1).view(-1)
    if count % blocksize:
        rest = values[whole * blocksize :]
        largest = rest.abs().amax().clamp(min=SMALLEST)
        absmax = torch.cat((absmax, largest[None]))
        scaled = torch.cat((scaled, (rest / largest).clamp_(-1, 1)))
    if count % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = borders_below(scaled, torch.tensor(borders()))
    return codes[::2] << 4 | codes[1::2], absmax


def borders() -> list[float]:
    """The 15 float32 means of neighbouring levels."""
    import torch

    levels = torch.tensor(LEVELS)
    return ((levels[:-1] + levels[1:]) / 2).tolist()
