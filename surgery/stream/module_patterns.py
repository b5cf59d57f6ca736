"""Short lists of targets that match exactly the wanted modules: patterns over layers and experts.

Modules whose names differ in numbers alone share a pattern. It covers all numbers where no other module has
such a name, else the layers (the first number) that are wanted as a whole; what is left is named one by one.
Patterns that differ in their last component are joined:

    re:.*\\blayers\\.\\d+\\.mlp\\.experts\\.\\d+\\.(gate_proj|up_proj|down_proj)$

They begin at the component before the first number, as loaders put other words in front of it, unless a
module that is not wanted has the same name behind other words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Shape = tuple[str, ...]
"""The components of a name, with an empty one for every number."""


def describe(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names, and patterns behind `re:`, that match every wanted module and none of the others."""
    mine, theirs = _by_shape(wanted), _by_shape(others)
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for shape, numbers in mine.items():
        if len(numbers) == 1 or "" not in shape:
            names += [_name(shape, each) for each in numbers]
            continue
        layers = ""
        if shape in theirs:
            mixed = {each[0] for each in theirs[shape]}
            names += [_name(shape, each) for each in numbers if each[0] in mixed]
            whole = list(dict.fromkeys(each[0] for each in numbers if each[0] not in mixed))
            if not whole:
                continue
            layers = _either(whole)
        clash = any(other != shape and _tail(other) == _tail(shape) for other in theirs)
        start = 0 if clash else len(shape) - len(_tail(shape))
        front = r".*\b" if start else ""
        stem = front + _pattern(shape[start:-1], layers)
        found.setdefault(stem, []).append(re.escape(shape[-1]) if shape[-1] else r"\d+")
    return [f"re:{stem}{_either(ends)}$" for stem, ends in found.items()] + names


def _by_shape(names: Iterable[str]) -> dict[Shape, list[tuple[str, ...]]]:
    """The numbers in names by what is around them."""
    found: dict[Shape, list[tuple[str, ...]]] = {}
    for name in names:
        pieces = name.split(".")
        shape = tuple("" if piece.isdigit() else piece for piece in pieces)
        found.setdefault(shape, []).append(tuple(piece for piece in pieces if piece.isdigit()))
    return found


def _tail(shape: Shape) -> Shape:
    """What is left of a name from the component before its first number on."""
    return shape[max(shape.index("") - 1, 0) :] if "" in shape else shape


def _name(shape: Shape, numbers: tuple[str, ...]) -> str:
    left = iter(numbers)
    return ".".join(piece or next(left) for piece in shape)


def _pattern(shape: Shape, layers: str) -> str:
    """A regular expression for components in front of the last one; `layers` for the first number."""
    pieces = []
    for piece in shape:
        pieces.append(re.escape(piece) if piece else layers or r"\d+")
        layers = layers if piece else ""
    return "".join(f"{piece}\\." for piece in pieces)


def _either(ends: list[str]) -> str:
    ends = list(dict.fromkeys(ends))
    return ends[0] if len(ends) == 1 else f"({'|'.join(ends)})"
