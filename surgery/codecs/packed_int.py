"""Integers of compressed-tensors ("pack-quantized"): codes of 2 to 8 bits, packed along the row.

    X.weight_packed       int32 [rows, ⌈cols · b / 32⌉]     the codes, see `bitstream`
    X.weight_scale        [rows, groups]                     bf16, fp16 or fp32
    X.weight_zero_point   int32 [⌈rows · b / 32⌉, groups]    asymmetric only, packed down the rows
    X.weight_shape        int64 [2]                          rows and columns

A code is the signed integer of compressed-tensors plus 2^(b−1), in weights and in zero points alike, which is
what `grid` calls a code. `padded` is the packing before version 0.18, ⌊32/b⌋ codes a word; zero points of it
cannot be cut at rows that tiles begin at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.codecs.bitstream import pack, unpack, word_count
from surgery.codecs.codec import WHOLE, PartSpec, Spans
from surgery.codecs.magnitude import all_finite
from surgery.codecs.plain import ITEMSIZE, TORCH_DTYPES, float_bytes, float_values, tensor_bytes
from surgery.codecs.schemes import IntScheme
from surgery.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.codecs.grid import Quantized

WORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class PackedInt:
    """`scale_dtype` is BF16, F16 or F32."""

    scheme: IntScheme
    scale_dtype: str = "BF16"
    padded: bool = False
    decodable: bool = True

    @property
    def name(self) -> str:
        return f"packed-{self.scheme}"

    @property
    def granule(self) -> int:
        if self.scheme.symmetric:
            return 1
        return WHOLE if self.padded else 32

    def words(self, codes: int) -> int:
        """Words of so many packed codes."""
        return word_count(codes, self.scheme.bits, padded=self.padded)

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        rows, cols = shape
        groups = self.scheme.groups(cols)
        packed = PartSpec("packed", "_packed", "I32", (rows, self.words(cols)))
        scale = PartSpec("scale", "_scale", self.scale_dtype, (rows, groups))
        whole = PartSpec("shape", "_shape", "I64", (2,))
        if self.scheme.symmetric:
            return packed, scale, whole
        return packed, scale, PartSpec("zero", "_zero_point", "I32", (self.words(rows), groups)), whole

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        cols = shape[1]
        row, groups = self.words(cols) * WORD_BYTES, self.scheme.groups(cols)
        scale = groups * ITEMSIZE[self.scale_dtype]
        found = {
            "packed": (start * row, stop * row),
            "scale": (start * scale, stop * scale),
            "shape": (0, 0 if start else 16),
        }
        if not self.scheme.symmetric:
            zero = groups * WORD_BYTES
            first = 0 if start == 0 else self.words(start)
            found["zero"] = (first * zero, self.words(stop) * zero)
        return found

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        if start == 0:
            check_shape(shape, raw["shape"])
        if self.padded:
            return self.quantized((stop - start, shape[1]), raw).values()
        from surgery.codecs.packed_ops import decode_stream

        words, scales, zeros = self.stored((stop - start, shape[1]), raw)
        return decode_stream(words, self.scheme.bits, shape[1], scales, zeros)

    def quantized(self, shape: tuple[int, ...], raw: Mapping[str, np.ndarray[Any, Any]]) -> Quantized:
        import torch

        from surgery.codecs.grid import Quantized

        words, scales, zeros = self.stored(shape, raw)
        codes = unpack(words, self.scheme.bits, shape[1], padded=self.padded)
        if isinstance(zeros, int):
            zeros = torch.full_like(scales, zeros, dtype=torch.uint8)
        return Quantized(codes, scales, zeros)

    def stored(
        self, shape: tuple[int, ...], raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | int]:
        """Words, scales, and zero points (one for all where they are not stored)."""
        import torch

        rows, cols = shape
        groups = self.scheme.groups(cols)
        words = torch.from_numpy(raw["packed"]).view(torch.int32).view(rows, self.words(cols))
        scales = float_values(self.scale_dtype, raw["scale"]).view(rows, groups)
        if self.scheme.symmetric:
            return words, scales, self.scheme.middle
        packed = torch.from_numpy(raw["zero"]).view(torch.int32).view(self.words(rows), groups)
        zeros = unpack(packed.T.contiguous(), self.scheme.bits, rows, padded=self.padded)
        return words, scales, zeros.T.contiguous()

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        import torch

        from surgery.codecs.encode_ops import encode_codes, encode_stream

        dtype = getattr(torch, TORCH_DTYPES[self.scale_dtype])
        if self.padded:
            return self.pack(encode_codes(tile, self.scheme, dtype))
        return self._stored_parts(*encode_stream(tile, self.scheme, dtype))

    def pack(self, quantized: Quantized) -> dict[str, np.ndarray[Any, Any]]:
        words = pack(quantized.codes, self.scheme.bits, padded=self.padded)
        return self._stored_parts(words, quantized.scales, quantized.zeros)

    def _stored_parts(
        self, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
    ) -> dict[str, np.ndarray[Any, Any]]:
        found = {"packed": tensor_bytes(words), "scale": float_bytes(self.scale_dtype, scales)}
        if not self.scheme.symmetric:
            zero = pack(zeros.T.contiguous(), self.scheme.bits, padded=self.padded)
            found["zero"] = tensor_bytes(zero.T)
        elif bool((zeros != self.scheme.middle).any()):
            raise UsageError(f"{self.scheme} has no place for zero points")
        return found

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        return {"shape": np.array(shape, np.int64).view(np.uint8)}

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        return key != "scale" or all_finite(self.scale_dtype, raw)


def check_shape(shape: tuple[int, ...], raw: np.ndarray[Any, Any]) -> None:
    """Refuse a stored shape that is not the one that the other parts have."""
    told = raw.view("int64").tolist()
    if told != list(shape):
        raise CheckpointError(
            f"codes and scales have the shape {list(shape)}, the weight_shape beside them says {told}",
            hint="the checkpoint contradicts itself; fetch it again",
        )
