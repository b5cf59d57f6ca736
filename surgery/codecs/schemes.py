"""Schemes of quantization by name: what a recipe says of a tensor's precision.

int4            whole numbers of 2 to 8 bits, symmetric, in the group size of the operator
int4-g64        in groups of 64 columns; `int8-channel`: one group a row
int4-asym       with a zero point for each group
fp8             e4m3 with one scale a row (`fp8-channel`); `fp8-tensor`, `fp8-block` (128 × 128)
nf4             normal floats of bitsandbytes, blocks of 64
mxfp4           e2m1 with one power of two for 32 columns (OCP MX)
keep            as stored
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

BITS = (2, 3, 4, 5, 6, 7, 8)
FloatForm = Literal["fp8-channel", "fp8-tensor", "fp8-block", "nf4", "mxfp4"]
_FORMS: tuple[str, ...] = get_args(FloatForm)
_INT = re.compile(r"int(\d+)((?:-(?:g\d+|channel|asym|sym))*)")


@dataclass(frozen=True, slots=True)
class IntScheme:
    """`bits` of a code, columns of a group (0: the whole row), and whether 0 is the middle of the grid."""

    bits: int
    group_size: int = 0
    symmetric: bool = True

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def width(self, cols: int) -> int:
        """Columns of a group in a row of `cols`."""
        return self.group_size or cols

    def groups(self, cols: int) -> int:
        """Groups of a row. Raises ValueError where the group size does not divide the columns."""
        count, rest = divmod(cols, self.width(cols))
        if rest:
            raise ValueError(f"groups of {self.group_size} do not divide {cols} columns")
        return count

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else "channel"
        return f"int{self.bits}-{group}" + ("" if self.symmetric else "-asym")


@dataclass(frozen=True, slots=True)
class FloatScheme:
    """A small floating form."""

    form: FloatForm

    def __str__(self) -> str:
        return self.form


Scheme = IntScheme | FloatScheme


def parse_scheme(text: str, group_size: int = 128, symmetric: bool = True) -> Scheme | None:
    """The scheme that a name stands for, None for `keep`; `group_size` and `symmetric` hold where it says
    neither. Raises ValueError for what is no scheme."""
    if text == "keep":
        return None
    if text in (*_FORMS, "fp8"):
        form = "fp8-channel" if text == "fp8" else text
        return FloatScheme(next(each for each in get_args(FloatForm) if each == form))
    found = _INT.fullmatch(text)
    if found is None or int(found[1]) not in BITS:
        raise ValueError(
            f"`{text}` is no scheme; known: int2 to int8 (with -g64, -channel, -asym), fp8, "
            f"{', '.join(_FORMS)}, keep"
        )
    for word in filter(None, found[2].split("-")):
        if word == "channel":
            group_size = 0
        elif word in ("asym", "sym"):
            symmetric = word == "sym"
        else:
            group_size = int(word[1:])
            if group_size < 1:
                raise ValueError(f"`{text}`: groups have at least one column")
    return IntScheme(int(found[1]), group_size, symmetric)
