"""MXFP4 of compressed-tensors ("mxfp4-pack-quantized"): the codes and exponents of `mxfp4` for one matrix.

X.weight_packed   uint8 [rows, cols / 2]     two e2m1 codes a byte, the first in the low nibble
X.weight_scale    uint8 [rows, cols / 32]    e8m0 exponents
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import PartSpec, Spans
from surgery.codecs.mxfp4 import GROUP_BYTES, NAN_EXPONENT, decode_mxfp4, encode_mxfp4, groups_of

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True)
class Mxfp4Packed:
    """One matrix in MXFP4."""

    granule: int = 1
    decodable: bool = True

    @property
    def name(self) -> str:
        return "packed-mxfp4"

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        rows, groups = shape[0], groups_of(shape)
        return (
            PartSpec("packed", "_packed", "U8", (rows, groups * GROUP_BYTES)),
            PartSpec("scale", "_scale", "U8", (rows, groups)),
        )

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        groups = groups_of(shape)
        row = groups * GROUP_BYTES
        return {"packed": (start * row, stop * row), "scale": (start * groups, stop * groups)}

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        import torch

        rows, groups = stop - start, groups_of(shape)
        nibbles = torch.from_numpy(raw["packed"]).view(rows, groups * GROUP_BYTES)
        return decode_mxfp4(nibbles, torch.from_numpy(raw["scale"]).view(rows, groups))

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        nibbles, exponents = encode_mxfp4(tile)
        return {"packed": nibbles.view(-1).numpy(), "scale": exponents.view(-1).numpy()}

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        return {}

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        return key == "packed" or not bool((raw == NAN_EXPONENT).any())
