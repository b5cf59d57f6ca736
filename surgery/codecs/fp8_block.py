"""DeepSeek FP8: e4m3 codes with one scale per 128×128 block.

    w[r, c] = code[r, c] · scale[r // 128, c // 128]          (stored as `X.weight`, `X.weight_scale_inv`)

Despite its name the stored scale is multiplied (DeepSeek-V3, README_WEIGHTS). Blocks at the ragged
edges are shorter; their scale is taken over the values that exist.

Encoding, per block and in float32 with separately rounded operations:

    scale = max|w| / 448            (1 where that is zero)
    code  = e4m3(clamp(w / scale, ±448)), to nearest, ties to even

so that decode → encode gives back codes and scales bit for bit wherever a block's largest code is
±448, which encoders of this rule produce. `ue8m0` (DeepSeek-V3.1) rounds the scale up to a power of
two; its scales are stored as F32 or as F8_E8M0.

Where NaN or infinity is allowed to pass, the scale is taken over the finite values of the block; NaN
stays NaN and infinity becomes the largest value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import PartSpec, Spans
from surgery.codecs.plain import all_exponent_bits_set

if TYPE_CHECKING:
    import numpy as np
    import torch

BLOCK = 128
NAN_CODE = 0x7F


@dataclass(frozen=True, slots=True)
class Fp8Block:
    """`scale_dtype` is F32 or F8_E8M0; `ue8m0` keeps scales to powers of two."""

    scale_dtype: str = "F32"
    ue8m0: bool = False
    granule: int = BLOCK
    decodable: bool = True

    @property
    def name(self) -> str:
        return "fp8-block-ue8m0" if self.ue8m0 else "fp8-block"

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        return (
            PartSpec("weight", "", "F8_E4M3", shape),
            PartSpec("scale", "_scale_inv", self.scale_dtype, scale_shape(shape)),
        )

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        cols = shape[1]
        row = scale_shape(shape)[1] * (4 if self.scale_dtype == "F32" else 1)
        return {
            "weight": (start * cols, stop * cols),
            "scale": (start // BLOCK * row, -(-stop // BLOCK) * row),
        }

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        import torch

        from surgery.codecs.ops import decode_fp8_block

        codes, scales = self.tensors(shape, start, stop, raw)
        return decode_fp8_block(codes, scales, torch.float32)

    def tensors(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(uint8 codes [stop - start, cols], float32 scales by block) of stored bytes."""
        import torch

        codes = torch.from_numpy(raw["weight"]).view(stop - start, shape[1])
        return codes, self.scales(raw["scale"], shape)

    def scales(self, raw: np.ndarray[Any, Any], shape: tuple[int, ...]) -> torch.Tensor:
        """float32 scales [blocks, ⌈cols/128⌉] from their stored bytes."""
        import torch

        bits = torch.from_numpy(raw)
        if self.scale_dtype == "F8_E8M0":
            # The byte is the exponent field of a float32; 0 is the subnormal 2^-127, 255 is NaN.
            exponent = bits.to(torch.int32)
            values = torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)
            values = torch.where(exponent == 255, torch.nan, values)
        else:
            values = bits.view(torch.float32)
        return values.view(-1, scale_shape(shape)[1])

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        from surgery.codecs.ops import encode_fp8_block

        return self.stored(*encode_fp8_block(tile, ue8m0=self.ue8m0))

    def stored(self, codes: torch.Tensor, scales: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """The bytes of each part."""
        import torch

        if self.scale_dtype == "F8_E8M0":
            kept = (scales.view(torch.int32) >> 23).to(torch.uint8)
        else:
            kept = scales.view(torch.uint8)
        return {"weight": codes.view(-1).numpy(), "scale": kept.reshape(-1).numpy()}

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        return {}

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        if key == "weight":
            return not all_exponent_bits_set(raw, NAN_CODE)
        if self.scale_dtype == "F8_E8M0":
            return not bool((raw == 0xFF).any())
        return not all_exponent_bits_set(raw.view("uint32"), 0x7F80_0000)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks down and across of a [rows, cols] matrix."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)
