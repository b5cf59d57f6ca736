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
LARGEST_CODE = 448.0
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

        codes = torch.from_numpy(raw["weight"]).to(torch.int32)
        values = _e4m3_values().index_select(0, codes).view(stop - start, shape[1])
        return scale_blocks(values, self.scales(raw["scale"], shape))

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
        import torch

        scales = block_amax(tile)
        if not bool(torch.isfinite(scales).all()):
            scales = block_amax(torch.where(torch.isfinite(tile), tile, 0.0))
        scales = scales.div_(LARGEST_CODE)
        if self.ue8m0:
            scales = ceil_to_power_of_two(scales)
        scales = torch.where(scales > 0, scales, 1.0)
        codes = divide_blocks(tile, scales).clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn)
        if self.scale_dtype == "F8_E8M0":
            stored = (scales.view(torch.int32) >> 23).to(torch.uint8)
        else:
            stored = scales.view(torch.uint8)
        return {
            "weight": codes.view(torch.uint8).view(-1).numpy(),
            "scale": stored.reshape(-1).numpy(),
        }

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        if key == "weight":
            return not all_exponent_bits_set(raw, NAN_CODE)
        if self.scale_dtype == "F8_E8M0":
            return not bool((raw == 0xFF).any())
        return not all_exponent_bits_set(raw.view("uint32"), 0x7F80_0000)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks down and across of a [rows, cols] matrix."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def _e4m3_values() -> torch.Tensor:
    """float32 values of the 256 codes."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


def _is_whole(tile: torch.Tensor) -> bool:
    return tile.shape[0] % BLOCK == 0 and tile.shape[1] % BLOCK == 0


def scale_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """values [R, C] · scales [⌈R/128⌉, ⌈C/128⌉], in place."""
    if _is_whole(values):
        _blocks(values).mul_(scales[:, None, :, None])
        return values
    return values.mul_(_spread(scales, values))


def divide_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """values [R, C] / scales [⌈R/128⌉, ⌈C/128⌉] as a new tensor, by IEEE division."""
    if _is_whole(values):
        return (_blocks(values) / scales[:, None, :, None]).view(values.shape)
    return values / _spread(scales, values)


def block_amax(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block of [R, C], as [⌈R/128⌉, ⌈C/128⌉]."""
    import torch

    if not _is_whole(values):
        down, across = scale_shape((values.shape[0], values.shape[1]))
        pad = (0, across * BLOCK - values.shape[1], 0, down * BLOCK - values.shape[0])
        values = torch.nn.functional.pad(values, pad)
    return _blocks(values).abs().amax(dim=(1, 3))


def ceil_to_power_of_two(values: torch.Tensor) -> torch.Tensor:
    """Positive float32 values rounded up to the next power of two (normal range)."""
    import torch

    bits = values.contiguous().view(torch.int32)
    return (((bits + 0x7F_FFFF) >> 23) << 23).view(torch.float32)


def _blocks(values: torch.Tensor) -> torch.Tensor:
    rows, cols = values.shape
    return values.view(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)


def _spread(scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    spread = scales.repeat_interleave(BLOCK, 0)[: like.shape[0]]
    return spread.repeat_interleave(BLOCK, 1)[:, : like.shape[1]]
