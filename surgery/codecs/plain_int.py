"""Unpacked integers of compressed-tensors ("int-quantized"): one int8 for every code.

    X.weight              int8 [rows, cols]              code − 2^(b−1)
    X.weight_scale        [rows, groups], [rows, 1]      or [1]: one for the tensor
    X.weight_zero_point   int8 [rows, groups]            asymmetric only, less 2^(b−1) as well

One scale for the whole tensor counts as one for each of its rows, all of them equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import WHOLE, PartSpec, Spans
from surgery.codecs.magnitude import all_finite
from surgery.codecs.plain import ITEMSIZE, TORCH_DTYPES, float_bytes, float_values
from surgery.codecs.schemes import IntScheme
from surgery.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.codecs.grid import Quantized


@dataclass(frozen=True, slots=True)
class PlainInt:
    """`per_tensor`: symmetric, one scale for all rows. `scale_dtype` is BF16, F16 or F32."""

    scheme: IntScheme
    scale_dtype: str = "BF16"
    per_tensor: bool = False
    decodable: bool = True

    @property
    def name(self) -> str:
        return f"int8-tensor of {self.scheme}" if self.per_tensor else f"unpacked-{self.scheme}"

    @property
    def granule(self) -> int:
        return WHOLE if self.per_tensor else 1

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        grid = (1,) if self.per_tensor else (shape[0], self.scheme.groups(shape[1]))
        weight = PartSpec("weight", "", "I8", shape)
        scale = PartSpec("scale", "_scale", self.scale_dtype, grid)
        if self.scheme.symmetric:
            return weight, scale
        return weight, scale, PartSpec("zero", "_zero_point", "I8", grid)

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        groups, size = self.scheme.groups(shape[1]), ITEMSIZE[self.scale_dtype]
        row = groups * size
        found = {
            "weight": (start * shape[1], stop * shape[1]),
            "scale": (0, size) if self.per_tensor else (start * row, stop * row),
        }
        if not self.scheme.symmetric:
            found["zero"] = (start * groups, stop * groups)
        return found

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        return self.quantized((stop - start, shape[1]), raw).values()

    def quantized(self, shape: tuple[int, ...], raw: Mapping[str, np.ndarray[Any, Any]]) -> Quantized:
        import torch

        from surgery.codecs.grid import Quantized

        rows, cols = shape
        groups = self.scheme.groups(cols)
        scales = float_values(self.scale_dtype, raw["scale"])
        scales = scales.expand(rows).contiguous() if self.per_tensor else scales
        scales = scales.view(rows, groups)
        if self.scheme.symmetric:
            zeros = torch.full_like(scales, self.scheme.middle, dtype=torch.uint8)
        else:
            zeros = self._codes(raw["zero"]).view(rows, groups)
        return Quantized(self._codes(raw["weight"]).view(rows, cols), scales, zeros)

    def _codes(self, raw: np.ndarray[Any, Any]) -> torch.Tensor:
        """uint8 codes of int8 bytes; the sum wraps as two's complement does."""
        import torch

        return torch.from_numpy(raw) + self.scheme.middle

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        import torch

        from surgery.codecs.encode_ops import encode_codes
        from surgery.codecs.grid import Grid, absmax_grid, quantize

        dtype = getattr(torch, TORCH_DTYPES[self.scale_dtype])
        if not self.per_tensor:
            return self.pack(encode_codes(tile, self.scheme, dtype))
        grid = absmax_grid(tile, self.scheme, dtype)
        # Rows of zeros have the scale 1, which must not stand for all.
        kept = torch.where(tile.abs().amax(1, keepdim=True) > 0, grid.scales, 0.0).amax()
        grid = Grid(torch.full_like(grid.scales, float(kept) or 1.0), grid.zeros)
        return self.pack(quantize(tile, grid, self.scheme))

    def pack(self, quantized: Quantized) -> dict[str, np.ndarray[Any, Any]]:
        scales = quantized.scales
        if self.per_tensor:
            if bool((scales != scales[:1, :1]).any()):
                raise UsageError(f"{self.name} has one scale for the whole tensor")
            scales = scales[:1, :1]
        found = {
            "weight": self._stored(quantized.codes),
            "scale": float_bytes(self.scale_dtype, scales),
        }
        if not self.scheme.symmetric:
            found["zero"] = self._stored(quantized.zeros)
        elif bool((quantized.zeros != self.scheme.middle).any()):
            raise UsageError(f"{self.scheme} has no place for zero points")
        return found

    def _stored(self, codes: torch.Tensor) -> np.ndarray[Any, Any]:
        return (codes - self.scheme.middle).view(-1).numpy()

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        return {}

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        return key != "scale" or all_finite(self.scale_dtype, raw)
