"""The points of a sweep: every combination of values that some fields of a recipe take.

    steps.0.weights.reasoner=0:1:0.1      0, 0.1, …, 1: both ends, in decimal, so 0.3 is 0.3
    steps.0.threshold=0,0.001,0.01        these values
    all,routed,others                     classes of tensors for `select` of a step

Values are text until a recipe reads them, as in `--set`; a point is the recipe with one override per axis.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import chain, count, product

from surgery.errors import UsageError
from surgery.recipe.problems import suggest
from surgery.stream.select import matcher

CLASSES = {
    "all": ("all",),
    "routed": ("routed_expert",),
    "attention": ("attention",),
    "shared": ("shared_expert",),
    "others": ("not:routed_expert",),
}
"""Classes of tensors by their short names; `others` is all but the routed experts."""
POINTS = 100
"""Points of a sweep unless told otherwise: a step too small makes thousands by mistake."""
MOST_VALUES = 10_000
LONGEST_NAME = 200
_STEP = re.compile(r"steps\.(\d+)\.")
_UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")


@dataclass(frozen=True)
class Axis:
    """A field of the recipe, what people call it, and its values as (what people see, YAML)."""

    path: str
    label: str
    values: tuple[tuple[str, str], ...]

    @property
    def numbers(self) -> bool:
        """Whether all values are numbers, so that they can be the x of a plot."""
        return all(number(shown) is not None for shown, _ in self.values)


@dataclass(frozen=True)
class Point:
    """One child: its name, which is that of its folder, and the overrides that make it."""

    name: str
    values: tuple[tuple[str, str], ...]
    """(label, value) of each axis."""
    overrides: tuple[str, ...]


def axes_of(over: Sequence[str], select_over: str | None) -> tuple[Axis, ...]:
    """The axes that `--over` and `--select-over` stand for. Raises UsageError."""
    given = [_parse(text) for text in over]
    if select_over is not None:
        given.append(_parse_select(select_over, given))
    if not given:
        raise UsageError("a sweep without an axis", hint="give one: --over steps.0.weights.reasoner=0:1:0.1")
    paths = [path for path, _ in given]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"{path} is swept twice", hint="give all its values in one --over, as a,b,c")
    labels = _labels(paths)
    return tuple(Axis(path, label, values) for (path, values), label in zip(given, labels, strict=True))


def points_of(axes: Sequence[Axis], most: int = POINTS) -> tuple[Point, ...]:
    """Every combination, the first axis running slowest. Raises UsageError for more than `most`."""
    size = math.prod(len(axis.values) for axis in axes)
    if size > most:
        sizes = " × ".join(str(len(axis.values)) for axis in axes)
        raise UsageError(
            f"the sweep has {size} points ({sizes}), more than {most}",
            hint=f"use a larger step, or allow them with --max-points {size}",
        )
    points: dict[str, Point] = {}
    for chosen in product(*(axis.values for axis in axes)):
        values = tuple((axis.label, shown) for axis, (shown, _) in zip(axes, chosen, strict=True))
        overrides = tuple(f"{axis.path}={text}" for axis, (_, text) in zip(axes, chosen, strict=True))
        name = _name(values, points)
        points[name] = Point(name, values, overrides)
    return tuple(points.values())


def _name(values: Sequence[tuple[str, str]], taken: Container[str]) -> str:
    """What any file system takes: `reasoner=0.5,select=routed`, numbered where two would be the same."""
    name = ",".join(_UNSAFE.sub("-", f"{label}={shown}") for label, shown in values)[:LONGEST_NAME]
    return next(each for each in chain([name], (f"{name}~{n}" for n in count(2))) if each not in taken)


def number(text: str) -> Decimal | None:
    """The value as a number, None where it is none."""
    try:
        found = Decimal(text)
    except InvalidOperation:
        return None
    return found if found.is_finite() else None


def _parse(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    path, equals, written = text.partition("=")
    path = path.strip()
    if not equals or not path or not all(path.split(".")):
        raise UsageError(f"--over {text} is no axis", hint="write it as PATH=START:STOP:STEP or PATH=A,B,C")
    if path.endswith(".select"):
        return path, _classes(written, f"--over {text}")
    if ":" in written and "," not in written:
        return path, tuple((value, value) for value in _range(written, text))
    values = [each.strip() for each in written.split(",")]
    if not all(values):
        raise UsageError(f"--over {text} has an empty value", hint="write the values as A,B,C")
    _refuse_twice(values, f"--over {text}")
    return path, tuple((value, value) for value in values)


def _range(written: str, text: str) -> Iterator[str]:
    pieces = [number(piece.strip()) for piece in written.split(":")]
    if len(pieces) != 3 or None in pieces:
        raise UsageError(
            f"--over {text}: `{written}` is no range of numbers",
            hint="write it as START:STOP:STEP, e.g. 0:1:0.1, or list the values as A,B,C",
        )
    start, stop, step = (piece for piece in pieces if piece is not None)
    if step == 0 or (stop - start) * step < 0:
        size = abs(step) or Decimal("0.1")
        raise UsageError(
            f"--over {text}: steps of {step} do not lead from {start} to {stop}",
            hint=f"write {start}:{stop}:{size if stop >= start else -size}",
        )
    steps = int((stop - start) / step)
    if steps > MOST_VALUES:
        raise UsageError(f"--over {text} has {steps + 1} values", hint="use a larger step")
    for index in range(steps + 1):
        yield _plain(start + step * index)
    if (stop - start) % step:
        yield _plain(stop)


def _plain(value: Decimal) -> str:
    """Without exponent and without zeros at the end."""
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def _parse_select(text: str, given: Sequence[tuple[str, object]]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """`PATH.select=NAMES`, or NAMES for the step that the first axis belongs to (else the first step)."""
    path, equals, names = text.partition("=")
    if equals and path.strip().startswith("steps."):
        if not path.strip().endswith(".select"):
            raise UsageError(
                f"--select-over {text}: {path} is no select",
                hint="write steps.0.select=all,routed",
            )
        return path.strip(), _classes(names, f"--select-over {text}")
    found = next((step[1] for each, _ in given if (step := _STEP.match(each))), "0")
    return f"steps.{found}.select", _classes(text, f"--select-over {text}")


def _classes(written: str, where: str) -> tuple[tuple[str, str], ...]:
    """Names of classes or selectors, joined by `+` where several make one."""
    names = [name.strip() for name in written.split(",")]
    if not all(names):
        raise UsageError(f"{where} has an empty name", hint=f"known: {', '.join(CLASSES)}, and any selector")
    _refuse_twice(names, where)
    found = []
    for name in names:
        entries: list[str] = []
        for piece in name.split("+"):
            entries += CLASSES.get(piece, (piece,))
        for entry in entries:
            try:
                matcher(entry)
            except ValueError as error:
                hint = suggest(entry, list(CLASSES), "classes")
                raise UsageError(f"{where}: {error}", hint=hint) from error
        found.append((name, json.dumps(entries)))
    return tuple(found)


def _refuse_twice(values: Sequence[str], where: str) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UsageError(f"{where} has {value} twice")


def _labels(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    pieces = [path.split(".") for path in paths]
    labels = []
    for mine in pieces:
        length = 1
        while length < len(mine) and (
            mine[-length].isdecimal() or sum(other[-length:] == mine[-length:] for other in pieces) > 1
        ):
            length += 1
        labels.append(".".join(mine[-length:]))
    return labels
