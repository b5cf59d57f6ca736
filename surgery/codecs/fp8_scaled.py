"""FP8 of compressed-tensors ("float-quantized"): e4m3 codes with one scale a row, or one for the tensor.

    w[r, c] = code[r, c] · scale[r]          (stored as `X.weight`, and `X.weight_scale` [rows, 1] or [1])

Encoding, in float32: scale = max|w| / 448 over the row or the tensor, rounded to the dtype it is stored in
(1 where that is zero); code = e4m3(clamp(w / scale, ±448)), to nearest, ties to even. One scale for the whole
tensor needs all of its rows at once. Blocks of 128 × 128 are `fp8_block`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from surgery.codecs.codec import WHOLE, PartSpec, Spans
from surgery.codecs.magnitude import all_finite
from surgery.codecs.plain import ITEMSIZE, float_bytes, float_values

if TYPE_CHECKING:
    import numpy as np
    import torch

LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Fp8Scaled:
    """`per` says what shares a scale; `scale_dtype` is BF16, F16 or F32."""

    per: Literal["channel", "tensor"] = "channel"
    scale_dtype: str = "BF16"
    decodable: bool = True

    @property
    def name(self) -> str:
        return f"fp8-{self.per}"

    @property
    def granule(self) -> int:
        return WHOLE if self.per == "tensor" else 1

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        scale = (1,) if self.per == "tensor" else (shape[0], 1)
        return (
            PartSpec("weight", "", "F8_E4M3", shape),
            PartSpec("scale", "_scale", self.scale_dtype, scale),
        )

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        cols, size = shape[1], ITEMSIZE[self.scale_dtype]
        scale = (0, size) if self.per == "tensor" else (start * size, stop * size)
        return {"weight": (start * cols, stop * cols), "scale": scale}

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        import torch

        codes = torch.from_numpy(raw["weight"]).view(torch.float8_e4m3fn).to(torch.float32)
        return codes.view(stop - start, shape[1]).mul_(float_values(self.scale_dtype, raw["scale"])[:, None])

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        import torch

        largest = tile.abs().amax(1, keepdim=True) if tile.numel() else torch.zeros(tile.shape[0], 1)
        if self.per == "tensor":
            largest = largest.amax(0, keepdim=True)
        scales = stored_scales(largest / LARGEST, self.scale_dtype)
        codes = e4m3_codes(tile / scales)
        return {"weight": codes.view(-1).numpy(), "scale": float_bytes(self.scale_dtype, scales)}

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        return {}

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        return all_finite("F8_E4M3" if key == "weight" else self.scale_dtype, raw)


def stored_scales(scales: torch.Tensor, dtype: str) -> torch.Tensor:
    """float32 scales as they come back from `dtype`, 1 where that is zero."""
    import torch

    from surgery.codecs.plain import TORCH_DTYPES

    kept = scales.to(getattr(torch, TORCH_DTYPES[dtype])).to(torch.float32)
    return torch.where(kept == 0, 1.0, kept)


def e4m3_codes(values: torch.Tensor) -> torch.Tensor:
    """uint8 codes of float32 values, to nearest, ties to even, ±448 at most; NaN stays NaN."""
    import torch

    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
