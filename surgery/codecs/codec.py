"""What a codec is: the pure functions between stored bytes and float32 rows.

A codec describes one stored form. It never reads a file: callers ask `spans` which bytes of each
part hold some rows, read them, and hand them to `decode`; `encode` gives the bytes back. `granule` is
the smallest number of rows that can be coded by themselves; tiles are multiples of it (the last tile
of a tensor may be shorter).

Shapes: a tensor of two or more dimensions is seen as [rows, cols] with the trailing dimensions
flattened, a one-dimensional one as rows alone, a scalar as one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

Bytes = "np.ndarray[Any, np.dtype[np.uint8]]"
Spans = dict[str, tuple[int, int]]
"""Part key -> byte range inside that part's stored tensor."""


class PartSpec(NamedTuple):
    """One stored tensor of the form: `suffix` is what its name has beyond the logical name."""

    key: str
    suffix: str
    dtype: str
    shape: tuple[int, ...]


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

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        """Whether stored bytes of one part hold neither NaN nor infinity."""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) as codecs see a tensor of this shape."""
    if len(shape) < 2:
        return prod(shape), 1
    return shape[0], prod(shape[1:])
