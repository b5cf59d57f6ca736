"""What a codec is: the pure functions between stored bytes and float32 rows.

A codec describes one stored form. It never reads a file: callers ask `spans` which bytes of each
part hold some rows, read them, and hand them to `decode`; `encode` gives the bytes back. `granule` is
the smallest number of rows that can be coded by themselves, WHOLE where no rows can be cut; tiles are
multiples of it (the last tile of a tensor may be shorter).

Integer forms (`IntCodec`) also give and take codes and scales as they are, so that what a solver chose is
what is stored and one packed form turns into another code by code.

Shapes: a tensor of two or more dimensions is seen as [rows, cols] with the trailing dimensions
flattened, a one-dimensional one as rows alone, a scalar as one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from surgery.codecs.schemes import IntScheme

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.codecs.grid import Quantized

Bytes = "np.ndarray[Any, np.dtype[np.uint8]]"
Spans = dict[str, tuple[int, int]]
"""Part key -> byte range inside that part's stored tensor."""
WHOLE = 1 << 40
"""The granule of forms whose rows cannot be cut: no tensor has as many."""


_ITEMSIZE = {"U8": 1, "F16": 2, "F32": 4, "I32": 4}


class PartSpec(NamedTuple):
    """One stored tensor of the form: `suffix` is what its name has beyond the logical name, less `replaces`
    (AutoGPTQ stores `X.weight` as `X.qweight`)."""

    key: str
    suffix: str
    dtype: str
    shape: tuple[int, ...]
    replaces: str = ""

    def stored_name(self, logical: str) -> str:
        """The name in files."""
        return logical.removesuffix(self.replaces) + self.suffix


def whole_spans(parts: Iterable[PartSpec]) -> Spans:
    """The spans of a form whose rows cannot be cut: every part from end to end."""
    return {part.key: (0, prod(part.shape) * _ITEMSIZE[part.dtype]) for part in parts}


class Codec(Protocol):
    """One stored form; instances are compared by value."""

    @property
    def name(self) -> str: ...

    @property
    def granule(self) -> int: ...

    @property
    def decodable(self) -> bool:
        """False for forms that can be copied but not computed with."""

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        """The stored tensors of a logical tensor of this shape."""

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        """Byte ranges that hold rows start..stop (start a multiple of the granule)."""

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        """float32 rows [stop - start, cols] (1-D for one-dimensional tensors) from uint8 parts."""

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """uint8 bytes of each part for float32 rows that start at a multiple of the granule."""

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        """uint8 bytes of the parts that follow from the shape alone; `encode` leaves them out."""

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        """Whether stored bytes of one part hold neither NaN nor infinity."""


@runtime_checkable
class IntCodec(Codec, Protocol):
    """A stored form of codes on a grid of whole numbers."""

    @property
    def scheme(self) -> IntScheme: ...

    @property
    def scale_dtype(self) -> str:
        """The stored dtype of scales: BF16, F16 or F32."""

    def quantized(self, shape: tuple[int, ...], raw: Mapping[str, np.ndarray[Any, Any]]) -> Quantized:
        """The exact codes and grid [rows, cols] of uint8 parts. `raw` holds a tensor of this shape, or the
        rows of a larger one that `spans` names (shape is then that of the rows)."""

    def pack(self, quantized: Quantized) -> dict[str, np.ndarray[Any, Any]]:
        """The uint8 parts, constants left out, of codes on a grid of this scheme [rows, cols]. Scales are
        rounded to `scale_dtype`."""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) as codecs see a tensor of this shape."""
    if len(shape) < 2:
        return prod(shape), 1
    return shape[0], prod(shape[1:])
