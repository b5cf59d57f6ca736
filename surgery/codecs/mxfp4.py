"""MXFP4 (OCP Microscaling 1.0): e2m1 codes with one power of two for 32 columns.

    w[r, c] = e2m1[code[r, c]] · 2^(exponent[r, c // 32] − 127)

Two codes lie in a byte, the first in the low nibble; exponents are e8m0, where 255 stands for NaN. gpt-oss
stores its fused experts so, as `X_blocks` [experts, rows, groups, 16] and `X_scales` [experts, rows, groups].

Encoding, per group and in float32:

    exponent = floor(log2(max|w|)) − 2 + 127, one more where the mantissa of max|w| is 1.75 or above
    code     = e2m1(w / 2^(exponent − 127)), to nearest, ties to the even code, ±6 at most

The second half of the first line is compressed-tensors' deviation from the OCP text: maxima of 7 and 8 times
a power of two are equally far from 6. Decode → encode gives every value back, and the bytes too where a group
has a code of magnitude 4 or 6 (a group without one could as well have a smaller exponent).

A group of zeros gets the exponent 127; one that holds NaN or infinity becomes NaN as a whole, as the form has
no other way to say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import PartSpec, Spans
from surgery.codecs.levels import borders_below
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch

GROUP = 32
GROUP_BYTES = GROUP // 2
NAN_EXPONENT = 0xFF
LARGEST_EXPONENT = 252
"""Of what is encoded: 6 · 2^125 fits float32, 6 · 2^126 does not."""
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What codes 0 to 7 stand for; 8 to 15 are their negatives."""


def e2m1_values() -> torch.Tensor:
    """What the codes 0 to 15 stand for: float32 [16]."""
    import torch

    return torch.tensor([*MAGNITUDES, *(-each for each in MAGNITUDES)])


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """uint8 codes of float32 values: to nearest, ties to the even code, ±6 at most; the sign of 0 is kept."""
    import torch

    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(MAGNITUDES)])
    # A tie goes to the even code, so the borders below even codes count as theirs.
    middles[1::2] = torch.nextafter(middles[1::2], torch.tensor(0.0))
    return borders_below(values.abs(), middles) | (torch.signbit(values).to(torch.uint8) << 3)


def e8m0_values(exponents: torch.Tensor) -> torch.Tensor:
    """float32 powers of two of uint8 exponents: 2^(e − 127), NaN for 255."""
    import torch

    # The byte is the exponent field of a float32, whose 0 means subnormal: 2^-127.
    fields = exponents.to(torch.int32)
    values = torch.where(fields == 0, 1 << 22, fields << 23).view(torch.float32)
    return torch.where(fields == NAN_EXPONENT, torch.nan, values)


def decode_mxfp4(nibbles: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """float32 [rows, cols] of uint8 nibbles [rows, cols/2] and uint8 exponents [rows, cols/32]."""
    from surgery.codecs.packed_ops import decode_nibbles

    rows, groups = exponents.shape
    levels, scales = e2m1_values().to(nibbles.device), e8m0_values(exponents)
    count = rows * groups * GROUP
    values = decode_nibbles(
        nibbles.reshape(-1), levels, scales.reshape(-1), count, block=GROUP, high_first=False
    )
    return values.view(rows, groups * GROUP)


def encode_mxfp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 nibbles [rows, cols/2], uint8 exponents [rows, cols/32]) of float32 values [rows, cols].

    Raises ValueError where 32 does not divide the columns.
    """
    import torch

    rows, cols = values.shape
    groups, rest = divmod(cols, GROUP)
    if rest:
        raise ValueError(f"MXFP4 groups of {GROUP} do not divide {cols} columns")
    grouped = values.reshape(rows, groups, GROUP)
    largest = grouped.abs().amax(-1) if groups else grouped.new_empty(rows, 0)
    fields = (largest.view(torch.int32) + (1 << 21) >> 23) - 2
    exponents = torch.where(largest == 0, 127, fields.clamp(0, LARGEST_EXPONENT))
    # 2^(127 − e) is what an exponent of 254 − e stands for; a product with it is exact.
    codes = e2m1_codes(grouped * e8m0_values(254 - exponents)[..., None])
    whole = torch.isfinite(largest)
    exponents = torch.where(whole, exponents, NAN_EXPONENT).to(torch.uint8)
    codes = torch.where(whole[..., None], codes, 0).view(rows, cols // 2, 2)
    return codes[..., 0] | codes[..., 1] << 4, exponents


@dataclass(frozen=True, slots=True)
class Mxfp4Blocks:
    """One projection of gpt-oss' fused experts: `blocks` [rows, groups, 16] and `scales` [rows, groups]."""

    granule: int = 1
    decodable: bool = True

    @property
    def name(self) -> str:
        return "mxfp4"

    def parts(self, shape: tuple[int, ...]) -> tuple[PartSpec, ...]:
        rows, groups = shape[0], groups_of(shape)
        return (
            PartSpec("blocks", "_blocks", "U8", (rows, groups, GROUP_BYTES)),
            PartSpec("scales", "_scales", "U8", (rows, groups)),
        )

    def spans(self, shape: tuple[int, ...], start: int, stop: int) -> Spans:
        groups = groups_of(shape)
        row = groups * GROUP_BYTES
        return {"blocks": (start * row, stop * row), "scales": (start * groups, stop * groups)}

    def decode(
        self, shape: tuple[int, ...], start: int, stop: int, raw: Mapping[str, np.ndarray[Any, Any]]
    ) -> torch.Tensor:
        import torch

        rows, groups = stop - start, groups_of(shape)
        nibbles = torch.from_numpy(raw["blocks"]).view(rows, groups * GROUP_BYTES)
        return decode_mxfp4(nibbles, torch.from_numpy(raw["scales"]).view(rows, groups))

    def encode(self, tile: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        nibbles, exponents = encode_mxfp4(tile)
        return {"blocks": nibbles.view(-1).numpy(), "scales": exponents.view(-1).numpy()}

    def constants(self, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        return {}

    def finite(self, key: str, raw: np.ndarray[Any, Any]) -> bool:
        return key == "blocks" or not bool((raw == NAN_EXPONENT).any())


def groups_of(shape: tuple[int, ...]) -> int:
    """Groups in a row of [rows, cols]. Raises CheckpointError where 32 does not divide the columns."""
    groups, rest = divmod(shape[1], GROUP)
    if rest:
        raise CheckpointError(
            f"MXFP4 has groups of {GROUP} columns, which do not divide the {shape[1]} of a row",
            hint="store this tensor in bf16",
        )
    return groups
