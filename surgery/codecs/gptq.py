"""GPTQ: codes packed along the input, zero points along the output, scales in fp16 (AutoGPTQ, GPTQModel).

    w[r, c] = (code[r, c] − zero[g, r]) · scale[g, r],       g = g_idx[c]

    X.qweight   int32 [cols · b / 32, rows]      bit stream down the columns of a row, lowest bit first
    X.qzeros    int32 [groups, rows · b / 32]    the same along the rows
    X.scales    fp16  [groups, rows]
    X.g_idx     int32 [cols]                     the group of each column

for the logical `X.weight` [rows, cols] of 2, 3, 4 or 8 bits. Version 2 of the form stores zero points as they
are; version 1, the usual one, less 1. Where b divides 32 that 1 is taken from whole words, as GPTQModel does
in both directions, so a zero point of 0 borrows from its neighbour; with 3 bits each wraps by itself.
Symmetric files have the zero point 2^(b−1) everywhere.

Checkpoints in act-order scatter the columns of a group. They are decoded by their g_idx, but their codes
cannot go to a form whose groups are runs of columns; what is encoded here always has such groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import WHOLE, PartSpec, Spans, whole_spans
from surgery.codecs.magnitude import all_finite
from surgery.codecs.schemes import IntScheme
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.codecs.grid import Quantized

BITS = (2, 3, 4, 8)
WORD = 32
_ONES = {2: 0x5555_5555, 4: 0x1111_1111, 8: 0x0101_0101}
"""A one in every field of a word."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """One linear weight; `version` is 1 or 2, `act_order` says that g_idx may scatter the groups."""

    scheme: IntScheme
    version: int = 1
    act_order: bool = False
    granule: int = WHOLE
    decodable: bool = True
    scale_dtype: str = "F16"

    @property
    def name(self) -> str:
        version = "gptq-v2" if self.version == 2 else "gptq"
        return f"{version} {self.scheme}{' act-order' if self.act_order else ''}"

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        rows, cols = shape
        groups, bits = self._groups(shape), self.scheme.bits
        return (
            PartSpec("qweight", "qweight", "I32", (cols * bits // WORD, rows), "weight"),
            PartSpec("qzeros", "qzeros", "I32", (groups, rows * bits // WORD), "weight"),
            PartSpec("scales", "scales", "F16", (groups, rows), "weight"),
            PartSpec("g_idx", "g_idx", "I32", (cols,), "weight"),
        )

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        return whole_spans(self.parts(shape))

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        import torch

        from surgery.codecs import bitstream
        from surgery.codecs.packed_ops import decode_stream

        words, scales, zeros, group = self._stored(shape, raw)
        if torch.equal(group, _runs(shape[1], scales.shape[1])):
            return decode_stream(words, self.scheme.bits, shape[1], scales, zeros)
        codes = bitstream.unpack(words, self.scheme.bits, shape[1])
        return (codes.float() - zeros.float()[:, group]).mul_(scales[:, group])

    def quantized(self, shape: tuple[int, ...], raw: Mapping[str, np.ndarray[Any, Any]]) -> Quantized:
        """Raises CheckpointError where groups are no runs of columns, or zero points not where they are said
        to be."""
        import torch

        from surgery.codecs import bitstream
        from surgery.codecs.grid import Quantized

        words, scales, zeros, group = self._stored(shape, raw)
        if not torch.equal(group, _runs(shape[1], scales.shape[1])):
            raise CheckpointError(
                f"a GPTQ tensor of shape {list(shape)} is in act-order: its groups are no runs of "
                "columns, so its codes fit no other form",
                hint="write output.format=bf16",
            )
        if self.scheme.symmetric and not bool((zeros == self.scheme.middle).all()):
            raise CheckpointError(
                f"a GPTQ tensor of shape {list(shape)} has zero points other than {self.scheme.middle}, but "
                "the config says sym: true",
                hint="set sym to false in its quantization_config",
            )
        return Quantized(bitstream.unpack(words, self.scheme.bits, shape[1]), scales, zeros)

    def pack(self, quantized: Quantized) -> dict[str, np.ndarray[Any, Any]]:
        from surgery.codecs import bitstream

        words = bitstream.pack(quantized.codes, self.scheme.bits)
        return self._parts(words, quantized.scales, quantized.zeros)

    def _parts(
        self, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Of words [rows, cols · b / 32], scales and zero points [rows, groups]."""
        import torch

        from surgery.codecs import bitstream

        bits = self.scheme.bits
        zeros = zeros.T.contiguous()
        if self.version == 1 and bits == 3:
            zeros = (zeros - 1) & self.scheme.top
        qzeros = bitstream.pack(zeros, bits)
        if self.version == 1 and bits != 3:
            qzeros = qzeros - _ONES[bits]
        parts = {
            "qweight": words.T.contiguous(),
            "qzeros": qzeros.contiguous(),
            "scales": half_scales(scales).T.contiguous(),
        }
        return {key: part.view(-1).view(torch.uint8).numpy() for key, part in parts.items()}

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        import torch

        from surgery.codecs.encode_ops import encode_stream

        self._groups(tuple(tile.shape))
        return self._parts(*encode_stream(tile, self.scheme, torch.float16))

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        width = self.scheme.width(shape[1])
        return {"g_idx": (np.arange(shape[1]) // width).astype(np.int32).view(np.uint8)}

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        return key != "scales" or all_finite("F16", raw)

    def fits(self, shape: tuple[int, ...]) -> str:
        """Why a tensor of this shape has no such form; empty where it has one."""
        if len(shape) != 2:
            return "it is no matrix"
        for side, count in (("rows", shape[0]), ("columns", shape[1])):
            if count * self.scheme.bits % WORD or not count:
                return f"{count} {side} of {self.scheme.bits} bits do not fill words of {WORD}"
        if shape[1] % self.scheme.width(shape[1]):
            return f"groups of {self.scheme.group_size} do not divide {shape[1]} columns"
        return ""

    def _groups(self, shape: tuple[int, ...]) -> int:
        reason = self.fits(shape)
        if reason:
            raise CheckpointError(
                f"a tensor of shape {list(shape)} cannot be stored as {self.name}: {reason}",
                hint="leave it out of what is quantized",
            )
        return self.scheme.groups(shape[1])

    def _stored(
        self, shape: tuple[int, ...], raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Words [rows, cols · b / 32], scales and zero points [rows, groups], and each column's group."""
        import torch

        from surgery.codecs import bitstream

        (rows, cols), groups, bits = shape, self._groups(shape), self.scheme.bits
        words = torch.from_numpy(raw["qweight"]).view(torch.int32).view(cols * bits // WORD, rows)
        stored = torch.from_numpy(raw["qzeros"]).view(torch.int32).view(groups, rows * bits // WORD)
        if self.version == 1 and bits != 3:
            stored = stored + _ONES[bits]
        zeros = bitstream.unpack(stored, bits, rows)
        if self.version == 1 and bits == 3:
            zeros = (zeros + 1) & self.scheme.top
        scales = torch.from_numpy(raw["scales"]).view(torch.float16).view(groups, rows)
        group = torch.from_numpy(raw["g_idx"]).view(torch.int32).long()
        if bool((group < 0).any()) or bool((group >= groups).any()):
            raise CheckpointError(
                f"g_idx of a GPTQ tensor of shape {list(shape)} names groups outside 0 … {groups - 1}",
                hint="the checkpoint is damaged; fetch it again",
            )
        return words.T.contiguous(), scales.T.float().contiguous(), zeros.T.contiguous(), group


def half_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales in fp16. Raises CheckpointError where one is too small to be anything but 0."""
    import torch

    half = scales.to(torch.float16)
    lost = (half == 0) & (scales != 0)
    if bool(lost.any()):
        smallest = float(scales[lost].abs().min())
        raise CheckpointError(
            f"{int(lost.sum())} scales of a tensor are too small for fp16, the smallest {smallest:.3g}",
            hint="write output.format=compressed-tensors, which has bf16 scales",
        )
    return half


def _runs(cols: int, groups: int) -> torch.Tensor:
    import torch

    return torch.arange(cols) // (cols // groups)
