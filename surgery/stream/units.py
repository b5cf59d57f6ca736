"""Byte counts as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?(?:([kmgt])(i?))?b?", re.ASCII | re.IGNORECASE)


def format_bytes(count: int) -> str:
    """Decimal units, three significant digits: 688 GB, 4.19 MB, 96 B."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.3g} TB"


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "1GiB" or "123"; kB, MB, GB, TB are decimal. Raises ValueError."""
    found = _SIZE.fullmatch(text)
    if not found:
        raise ValueError(f"`{text}` is no size; write it as 5GB, 500MB, 1GiB or a number of bytes")
    number, unit, binary = found.groups()
    power = "kmgt".index(unit.lower()) + 1 if unit else 0
    size = int(Decimal(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise ValueError(f"`{text}` is less than one byte")
    return size
