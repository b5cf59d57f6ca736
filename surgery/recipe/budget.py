"""Budgets as people write them: `3.2bpw`, bits per weight, or a size (`2.5GB`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from surgery.errors import UsageError
from surgery.stream.units import parse_size

_BITS = re.compile(r"(\d{1,3}(?:\.\d{1,9})?) ?bpw", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """`bits` per weight, or None for a size; `nbytes` is what that comes to."""

    text: str
    bits: Fraction | None
    nbytes: int


def parse_budget(text: str) -> Budget:
    """What a budget says; bits per weight come to bytes once the weights are known. Raises UsageError."""
    found = _BITS.fullmatch(text)
    if found:
        return Budget(text, Fraction(found[1]), 0)
    try:
        return Budget(text, None, parse_size(text))
    except ValueError as error:
        raise UsageError(
            f"`{text}` is no budget", hint="write bits per weight as 3.2bpw, or a size as 2.5GB"
        ) from error
