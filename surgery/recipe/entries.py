"""Schemes of units, layer by role, as the few entries of `schemes` that a person would write.

The scheme that most layers of a role have is an entry of the role's name; layers that have another come
before it, all of one scheme in one entry:

    re:layers\\.(3|[6-8])\\.mlp\\.experts\\.: int3-g64
    routed_expert: int2-g64
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from surgery.stream.module_patterns import describe

WEIGHT = ".weight"


class UnitScheme(NamedTuple):
    """The matrices of one role in one layer, by their tensors' names, their scheme, and the error with it."""

    layer: int
    role: str
    names: tuple[str, ...]
    scheme: str
    error: float


def scheme_entries(units: Sequence[UnitScheme], others: Iterable[str]) -> dict[str, list[UnitScheme]]:
    """Entries in order, with the units that each is for; `others` are the names of matrices that have none
    of them. The first entry that matches wins."""
    every = {name for unit in units for name in unit.names} | set(others)
    first: dict[str, list[UnitScheme]] = {}
    last: dict[str, list[UnitScheme]] = {}
    for role in dict.fromkeys(unit.role for unit in units):
        by_scheme: dict[str, list[UnitScheme]] = {}
        for unit in units:
            if unit.role == role:
                by_scheme.setdefault(unit.scheme, []).append(unit)
        most = max(by_scheme.values(), key=len)
        last[role] = most
        for members in by_scheme.values():
            if members is not most:
                for pattern in _patterns(members, every):
                    first[f"re:{pattern}"] = members
    return {**first, **last}


def numbers_pattern(numbers: Iterable[int]) -> str:
    """A regular expression for some numbers, digit by digit in runs: `(3|[6-8]|1[0-9])`."""
    tens: dict[int, list[int]] = {}
    for number in sorted(set(numbers)):
        tens.setdefault(number // 10, []).append(number % 10)
    found = [f"{ten or ''}{_digits(digits)}" for ten, digits in tens.items()]
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"


def layers_in_words(layers: Iterable[int]) -> str:
    """`layer 3`, `layers 3-5, 7`."""
    ordered = sorted(set(layers))
    runs: list[list[int]] = []
    for layer in ordered:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    told = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' if len(ordered) > 1 else ''} {told}"


def recipe_text(document: Mapping[str, Any], notes: Mapping[str, str], head: Sequence[str]) -> str:
    """YAML with `head` as comments above it, and behind each entry of `schemes` its note."""
    lines = [f"# {line}".rstrip() for line in head]
    written = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True, width=10_000)
    starts = {yaml.safe_dump(entry, width=10_000).partition("\n")[0] + ":": entry for entry in notes}
    for line in written.splitlines():
        entry = next((entry for start, entry in starts.items() if line.strip().startswith(start)), None)
        lines.append(line if entry is None else f"{line}  # {notes[entry]}")
    return "\n".join(lines) + "\n"


def _digits(digits: Sequence[int]) -> str:
    """One digit, or a class of some."""
    if len(digits) == 1:
        return str(digits[0])
    whole = digits[-1] - digits[0] + 1 == len(digits) and len(digits) > 2
    return f"[{digits[0]}-{digits[-1]}]" if whole else f"[{''.join(map(str, digits))}]"


def _patterns(members: Sequence[UnitScheme], every: set[str]) -> list[str]:
    """Regular expressions that match the matrices of some layers and none of the others."""
    wanted = {name for unit in members for name in unit.names}
    inside = [
        name.partition(f"layers.{unit.layer}.")[2].split(".")[:-1] for unit in members for name in unit.names
    ]
    common = []
    for pieces in zip(*inside, strict=False):
        if len(set(pieces)) > 1:
            break
        common.append(f"{re.escape(pieces[0])}\\.")
    pattern = f"layers\\.{numbers_pattern(unit.layer for unit in members)}\\.{''.join(common)}"
    if {name for name in every if re.search(pattern, name)} == wanted:
        return [pattern]
    modules = (name.removesuffix(WEIGHT) for name in sorted(wanted))
    rest = (name.removesuffix(WEIGHT) for name in every - wanted)
    found = describe(modules, rest)
    return [
        each[3:].removesuffix("$") + re.escape(WEIGHT) + "$" if each.startswith("re:")
        else f"^{re.escape(each + WEIGHT)}$"
        for each in found
    ]  # fmt: skip
