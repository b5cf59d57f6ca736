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

compressed-tensors stores the same as `X.weight_scale`, its scales in bf16 or fp16 too; they are rounded to
that before a code is chosen.

Where NaN or infinity is allowed to pass, the scale is taken over the finite values of the block; NaN
stays NaN and infinity becomes the largest value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import PartSpec, Spans
from surgery.codecs.fp8_scaled import LARGEST, e4m3_codes, stored_scales
from surgery.codecs.magnitude import all_finite
from surgery.codecs.plain import float_bytes, float_values

if TYPE_CHECKING:
    import numpy as np
    import torch

BLOCK = 128
SCALE_BYTES = {"F32": 4, "F8_E8M0": 1, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True)
class Fp8Block:
    """`scale_dtype` is F32, F8_E8M0, BF16 or F16; `ue8m0` keeps scales to powers of two."""

    scale_dtype: str = "F32"
    ue8m0: bool = False
    suffix: str = "_scale_inv"
    granule: int = BLOCK
    decodable: bool = True

    @property
    def name(self) -> str:
        return "fp8-block-ue8m0" if self.ue8m0 else "fp8-block"

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        return (
            PartSpec("weight", "", "F8_E4M3", shape),
            PartSpec("scale", self.suffix, self.scale_dtype, scale_shape(shape)),
        )

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        cols = shape[1]
        row = scale_shape(shape)[1] * SCALE_BYTES[self.scale_dtype]
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

        if self.half_scales:
            return float_values(self.scale_dtype, raw).view(-1, scale_shape(shape)[1])
        bits = torch.from_numpy(raw)
        if self.scale_dtype == "F8_E8M0":
            # The byte is the exponent field of a float32; 0 is the subnormal 2^-127, 255 is NaN.
            exponent = bits.to(torch.int32)
            values = torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)
            values = torch.where(exponent == 255, torch.nan, values)
        else:
            values = bits.view(torch.float32)
        return values.view(-1, scale_shape(shape)[1])

    @property
    def half_scales(self) -> bool:
        """Whether scales are stored in 16 bits, which no kernel computes with."""
        return self.scale_dtype in ("BF16", "F16")

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        from surgery.codecs.ops import encode_fp8_block
        from surgery.codecs.reference import block_amax, divide_blocks

        if self.half_scales:
            scales = stored_scales(block_amax(tile) / LARGEST, self.scale_dtype)
            return self.stored(e4m3_codes(divide_blocks(tile, scales)), scales)
        return self.stored(*encode_fp8_block(tile, ue8m0=self.ue8m0))

    def stored(self, codes: torch.Tensor, scales: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """The bytes of each part."""
        import torch

        if self.half_scales:
            return {"weight": codes.view(-1).numpy(), "scale": float_bytes(self.scale_dtype, scales)}
        if self.scale_dtype == "F8_E8M0":
            kept = (scales.view(torch.int32) >> 23).to(torch.uint8)
        else:
            kept = scales.view(torch.uint8)
        return {"weight": codes.view(-1).numpy(), "scale": kept.reshape(-1).numpy()}

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        return {}

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        return all_finite("F8_E4M3" if key == "weight" else self.scale_dtype, raw)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks down and across of a [rows, cols] matrix."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)
