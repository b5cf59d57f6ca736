"""AWQ's GEMM form: 4-bit codes and zero points packed along the output, scales in fp16 (AutoAWQ).

    w[r, c] = (code[r, c] − zero[g, r]) · scale[g, r],       g the group of column c

    X.qweight   int32 [cols, rows / 8]       field j of a word holds row ORDER[j] of its eight
    X.qzeros    int32 [groups, rows / 8]     the same
    X.scales    fp16  [groups, rows]

for the logical `X.weight` [rows, cols]. Zero points are stored as they are, and always; a symmetric grid has
8 everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import WHOLE, PartSpec, Spans, whole_spans
from surgery.codecs.gptq import half_scales
from surgery.codecs.magnitude import all_finite
from surgery.codecs.schemes import IntScheme
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.codecs.grid import Quantized

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each row is: the inverse of ORDER."""


@dataclass(frozen=True, slots=True)
class Awq:
    """One linear weight, of 4 bits."""

    scheme: IntScheme
    granule: int = WHOLE
    decodable: bool = True
    scale_dtype: str = "F16"

    @property
    def name(self) -> str:
        return f"awq {self.scheme}"

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        (rows, cols), groups = shape, self._groups(shape)
        return (
            PartSpec("qweight", "qweight", "I32", (cols, rows // PER_WORD), "weight"),
            PartSpec("qzeros", "qzeros", "I32", (groups, rows // PER_WORD), "weight"),
            PartSpec("scales", "scales", "F16", (groups, rows), "weight"),
        )

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        return whole_spans(self.parts(shape))

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        from surgery.codecs.packed_ops import decode_awq

        return decode_awq(*self._stored(shape, raw))

    def quantized(self, shape: tuple[int, ...], raw: Mapping[str, np.ndarray[Any, Any]]) -> Quantized:
        """Raises CheckpointError where zero points are not where the config says."""
        found = self._unpacked(shape, raw)
        if self.scheme.symmetric and not bool((found.zeros == self.scheme.middle).all()):
            raise CheckpointError(
                f"an AWQ tensor of shape {list(shape)} has zero points other than {self.scheme.middle}, but "
                "the config says zero_point: false",
                hint="set zero_point to true in its quantization_config",
            )
        return found

    def pack(self, quantized: Quantized) -> dict[str, np.ndarray[Any, Any]]:
        import torch

        parts = {
            "qweight": _pack(quantized.codes.T),
            "qzeros": _pack(quantized.zeros.T),
            "scales": half_scales(quantized.scales).T.contiguous(),
        }
        return {key: part.view(-1).view(torch.uint8).numpy() for key, part in parts.items()}

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        import torch

        from surgery.codecs.encode_ops import encode_codes

        self._groups(tuple(tile.shape))
        return self.pack(encode_codes(tile, self.scheme, torch.float16))

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        return {}

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        return key != "scales" or all_finite("F16", raw)

    def fits(self, shape: tuple[int, ...]) -> str:
        """Why a tensor of this shape has no such form; empty where it has one."""
        if len(shape) != 2:
            return "it is no matrix"
        if shape[0] % PER_WORD or 0 in shape:
            return f"{shape[0]} rows do not fill words of {PER_WORD}"
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

    def _unpacked(self, shape: tuple[int, ...], raw: Mapping[str, np.ndarray[Any, Any]]) -> Quantized:
        return unpacked(*self._stored(shape, raw))

    def _stored(
        self, shape: tuple[int, ...], raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Words [cols, rows / 8], words of zero points [groups, rows / 8] and fp16 scales [groups, rows]."""
        import torch

        (rows, cols), groups = shape, self._groups(shape)
        words, zeros = (torch.from_numpy(raw[key]).view(torch.int32) for key in ("qweight", "qzeros"))
        scales = torch.from_numpy(raw["scales"]).view(torch.float16)
        across = rows // PER_WORD
        return words.view(cols, across), zeros.view(groups, across), scales.view(groups, rows)


def unpacked(words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> Quantized:
    """Codes [rows, cols] and grid [rows, groups] of words [cols, rows / 8], words of zero points
    [groups, rows / 8] and fp16 scales [groups, rows]."""
    from surgery.codecs.grid import Quantized

    return Quantized(
        _unpack(words).T.contiguous(), scales.T.float().contiguous(), _unpack(zeros).T.contiguous()
    )


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """int32 words [n, rows / 8] of uint8 codes [n, rows]."""
    from surgery.codecs import bitstream

    count, rows = codes.shape
    ordered = codes.reshape(count, rows // PER_WORD, PER_WORD)[..., ORDER]
    return bitstream.pack(ordered.reshape(count, rows), BITS)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """uint8 codes [n, rows] of the words of `_pack`."""
    from surgery.codecs import bitstream

    count, across = words.shape
    codes = bitstream.unpack(words, BITS, across * PER_WORD)
    return codes.view(count, across, PER_WORD)[..., _PLACES].reshape(count, across * PER_WORD)
