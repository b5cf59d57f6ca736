"""Plain dtypes: bf16, fp16, fp32 and fp64 as they are, and forms that are only ever copied.

Rounding to bf16 and fp16 is to nearest, ties to even; float32 arithmetic in between (a float64
tensor is rounded to float32 on decoding, which `arithmetic on F64` in a plan points out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import PartSpec, Spans, matrix_shape
from surgery.codecs.magnitude import all_finite
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch

TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True, slots=True)
class Plain:
    """One stored tensor of a floating dtype, value by value."""

    dtype: str
    granule: int = 1
    decodable: bool = True

    @property
    def name(self) -> str:
        return self.dtype.lower()

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        return (PartSpec("weight", "", self.dtype, shape),)

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        row = matrix_shape(shape)[1] * ITEMSIZE[self.dtype]
        return {"weight": (start * row, stop * row)}

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        values = float_values(self.dtype, raw["weight"])
        return values if len(shape) < 2 else values.view(stop - start, matrix_shape(shape)[1])

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        return {"weight": float_bytes(self.dtype, tile)}

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        return {}

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        return all_finite(self.dtype, raw)


@dataclass(frozen=True, slots=True)
class Opaque:
    """Bytes of a form that this version copies but cannot compute with, e.g. packed integers.

    `form` says in words what it is; `weights` is False for plain integer buffers, which are no weights
    and pass through every output format.
    """

    form: str
    weights: bool = True
    granule: int = 1
    decodable: bool = False

    @property
    def name(self) -> str:
        return self.form

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        raise self._refusal()

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        raise self._refusal()

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        raise self._refusal()

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        raise self._refusal()

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        return {}

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        return True

    def _refusal(self) -> CheckpointError:
        return CheckpointError(
            f"tensors stored as {self.form} can be copied but not decoded",
            hint="give them a weight of 0 or 1, or start from a bf16 or FP8 checkpoint",
        )


def float_values(dtype: str, raw: np.ndarray[Any, Any]) -> torch.Tensor:
    """float32 values, in one dimension, of the stored bytes of a floating dtype."""
    import torch

    kind = getattr(torch, TORCH_DTYPES[dtype])
    values = torch.from_numpy(raw).view(kind) if raw.size else torch.empty(0, dtype=kind)
    return values.to(torch.float32)


def float_bytes(dtype: str, values: torch.Tensor) -> np.ndarray[Any, Any]:
    """The stored bytes of values rounded to a floating dtype."""
    import torch

    return tensor_bytes(values.to(getattr(torch, TORCH_DTYPES[dtype])))


def tensor_bytes(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a tensor, row after row."""
    import torch

    flat = values.reshape(-1)
    if flat.stride(0) != 1:  # of one element, whose stride may be anything, and no view likes that
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).cpu().numpy()
