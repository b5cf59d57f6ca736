"""What a sweep found, from its `sweep.json`: a figure, a page around it, a table for other programs.

The figure has a panel per quantity over the first axis whose values are numbers (over the points in order
where none is), one line for each combination of the other axes, and accuracy against the length of replies
with the points that no other beats in both. It stands alone; colours of text follow the reader's scheme.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from math import ceil
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from surgery.report.svg import category, element, line, number, round_up, text

TEMPLATE = "sweep.html.j2"
WIDE, TALL, LEFT, GAP, TOP = 390.0, 200.0, 52.0, 62.0, 64.0
CROWDED = 16.0
"""Points of the front that are nearer to the one before get no label."""
CSS = (
    "text{font:12.5px system-ui,sans-serif}.ink{fill:#22252a}.soft{fill:#646a73}.strong{font-weight:600}"
    ".grid{stroke:#e8e8e3}.front{stroke:#646a73;fill:none;stroke-dasharray:3 3}"
    "@media (prefers-color-scheme:dark){.ink{fill:#e4e6e8}.soft{fill:#9aa1aa}.grid{stroke:#2b2f34}"
    ".front{stroke:#9aa1aa}}"
)
Figure = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Quantity:
    """A figure of every point: {value, low, high} in a row, or None."""

    key: str
    title: str
    found: Callable[[Row], Figure | None]
    share: bool = False


@dataclass(frozen=True)
class Mark:
    """A point in a panel."""

    x: float
    y: float
    row: Row
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """The points that agree in all axes but that of x."""

    name: str
    colour: str
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """An axis of a panel: from value to place, and its ticks."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def at(self, value: float, length: float) -> float:
        return length * (value - self.low) / ((self.high - self.low) or 1.0)


def quantities(document: Mapping[str, Any]) -> list[Quantity]:
    """Those that some point has."""
    tag = (document.get("settings") or {}).get("tag") or "tag"
    known = [
        Quantity("accuracy", "accuracy", lambda row: _tasks(row).get("accuracy"), share=True),
        Quantity("reply_tokens", "mean reply tokens", lambda row: _tasks(row).get("reply_tokens")),
        Quantity("tagged", f"replies with {tag}", lambda row: _tasks(row).get("tagged"), share=True),
        Quantity("perplexity", "perplexity", lambda row: _figures(row).get("perplexity")),
    ]
    return [each for each in known if any(each.found(row) for row in document["points"])]


def sweep_csv(document: Mapping[str, Any]) -> str:
    """One line per point: its values, and each figure with the ends of its interval."""
    labels = [axis["label"] for axis in document["axes"]]
    shown = quantities(document)
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [f"{each.key}{end}" for each in shown for end in ("", "_low", "_high")]
    writer.writerow(["point", *labels, *columns, "problems", "error"])
    for row in document["points"]:
        cells: list[Any] = []
        for each in shown:
            found = each.found(row) or {}
            cells += [found.get(key) for key in ("value", "low", "high")]
        values = [row["values"].get(label) for label in labels]
        writer.writerow([row["name"], *values, *cells, _tasks(row).get("problems"), row["error"]])
    return out.getvalue()


def sweep_svg(document: Mapping[str, Any]) -> str:
    """The figure as a file of its own."""
    return str(_drawing(document)) + "\n"


def render_sweep(document: Mapping[str, Any]) -> str:
    """A self-contained HTML page: the figure, and the table."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = quantities(document)
    rows = [
        {
            "values": [row["values"].get(axis["label"], "") for axis in document["axes"]],
            "cells": [_written(each, each.found(row)) for each in shown],
            "note": row["error"] or (f"the same child as {row['same_as']}" if row["same_as"] else ""),
            "folder": row["folder"] or "",
        }
        for row in document["points"]
    ]
    measured = document["sweep"]["measuring"]
    return environment.get_template(TEMPLATE).render(
        title=" × ".join(axis["label"] for axis in document["axes"]),
        axes=document["axes"],
        columns=[each.title for each in shown],
        rows=rows,
        drawing=_drawing(document),
        steps=[str(step.get("op")) for step in document["sweep"]["recipe"]["steps"]],
        measured={key: value for key, value in measured.items() if not isinstance(value, Mapping)},
        files=[value["file"] for value in measured.values() if isinstance(value, Mapping)],
    )


def _tasks(row: Row) -> Figure:
    return _figures(row).get("tasks") or {}


def _figures(row: Row) -> Figure:
    return row.get("figures") or {}


def _written(quantity: Quantity, found: Figure | None) -> str:
    if not found:
        return "–"
    form = "{:.2f}" if quantity.share else "{:.4g}"
    value = form.format(found["value"])
    if found["low"] is None or found["high"] is None:
        return value
    return f"{value} ({form.format(found['low'])}–{form.format(found['high'])})"


def _drawing(document: Mapping[str, Any]) -> Markup:
    axis = _x_axis(document)
    series = _series(document, axis)
    shown = quantities(document)
    panels = [_over(document, axis, each, series) for each in shown]
    if {"accuracy", "reply_tokens"} <= {each.key for each in shown}:
        panels.append(_pareto(shown, series, axis))
    columns = min(2, max(len(panels), 1))
    placed = [
        element(
            "g", *panel,
            transform=f"translate({number(LEFT + (WIDE + GAP) * (index % columns))} "
            f"{number(TOP + (TALL + 78.0) * (index // columns))})",
        )
        for index, panel in enumerate(panels)
    ]  # fmt: skip
    width = LEFT + (WIDE + GAP) * columns
    height = TOP + (TALL + 78.0) * ceil(len(panels) / columns) - 24.0
    label = "what a sweep found: " + ", ".join(each.title for each in shown)
    return element(
        "svg", element("title", label), element("style", CSS), *_legend(series), *placed,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {number(width)} {number(height)}", role="img",
        aria_label=label,
    )  # fmt: skip


def _x_axis(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first axis of numbers."""
    return next(
        (axis for axis in document["axes"] if all(_number(value) is not None for value in axis["values"])),
        None,
    )


def _series(document: Mapping[str, Any], axis: Mapping[str, Any] | None) -> list[Series]:
    others = [each for each in document["axes"] if each is not axis]
    found: dict[str, Series] = {}
    for row in document["points"]:
        values = [row["values"].get(each["label"], "") for each in others] if axis else []
        name = ", ".join(values)
        found.setdefault(name, Series(name, category(len(found)))).rows.append(row)
    return list(found.values())


def _legend(series: Sequence[Series]) -> list[Markup]:
    drawn: list[Markup] = []
    x = LEFT
    for each in series:
        if each.name:
            drawn.append(element("circle", cx=x + 5, cy=18.0, r=5.0, fill=each.colour))
            drawn.append(text(x + 16, 22, each.name))
            x += 40 + 7.2 * len(each.name)
    return drawn


def _place(document: Mapping[str, Any], axis: Mapping[str, Any] | None, row: Row) -> float:
    if axis is None:
        return float(next(index for index, each in enumerate(document["points"]) if each is row))
    return _number(row["values"][axis["label"]]) or 0.0


def _over(
    document: Mapping[str, Any], axis: Mapping[str, Any] | None, quantity: Quantity, series: Sequence[Series]
) -> list[Markup]:
    """A quantity over the axis."""
    marks = {
        each.name: sorted(
            (
                Mark(_place(document, axis, row), found["value"], row, found["low"], found["high"])
                for row in each.rows
                if (found := quantity.found(row))
            ),
            key=lambda mark: mark.x,
        )
        for each in series
    }
    everything = [mark for each in marks.values() for mark in each]
    across = _x_scale(document, axis, sorted({mark.x for mark in everything}))
    up = _y_scale([mark.high or mark.y for mark in everything], share=quantity.share)
    drawn = _frame(quantity.title, axis["label"] if axis else "point", across, up)
    for each in series:
        places = [(across.at(mark.x, WIDE), TALL - up.at(mark.y, TALL)) for mark in marks[each.name]]
        for mark, (x, _) in zip(marks[each.name], places, strict=True):
            if mark.low is not None and mark.high is not None:
                low, high = (TALL - up.at(end, TALL) for end in (mark.low, min(mark.high, up.high)))
                drawn.append(_interval(x, low, high, each.colour))
        if axis is not None:
            drawn.append(_path(places, stroke=each.colour, stroke_width=2.0))
        for mark, place in zip(marks[each.name], places, strict=True):
            drawn.append(_dot(place, each.colour, mark.row["name"], f"{mark.y:.4g}"))
    return drawn


def _pareto(
    shown: Sequence[Quantity], series: Sequence[Series], axis: Mapping[str, Any] | None
) -> list[Markup]:
    """Accuracy against reply tokens, and the points that no other beats in both."""
    accuracy, tokens = (next(q for q in shown if q.key == key) for key in ("accuracy", "reply_tokens"))
    marks = [
        (each, Mark(length["value"], right["value"], row))
        for each in series
        for row in each.rows
        if (right := accuracy.found(row)) and (length := tokens.found(row))
    ]
    across = _y_scale([mark.x for _, mark in marks], share=False)
    up = _y_scale([], share=True)
    drawn = _frame("accuracy against mean reply tokens", tokens.title, across, up)

    def place(mark: Mark) -> tuple[float, float]:
        return across.at(mark.x, WIDE), TALL - up.at(mark.y, TALL)

    front = pareto([(mark.x, mark.y) for _, mark in marks])
    drawn.append(_path([place(marks[index][1]) for index in front], class_="front"))
    for each, mark in marks:
        drawn.append(_dot(place(mark), each.colour, mark.row["name"], f"{mark.y:.4g}, {mark.x:.4g} tokens"))
    last = (-CROWDED, -CROWDED)
    for index in front:
        x, y = place(marks[index][1])
        if abs(x - last[0]) + abs(y - last[1]) >= CROWDED:
            value = marks[index][1].row["values"][axis["label"]] if axis else ""
            drawn.append(text(x + 7, y + 14, value, class_="soft"))
            last = (x, y)
    return drawn


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indexes of the (cost, gain) than which no other has as much gain for less cost, by cost."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _frame(title: str, below: str, across: Scale, up: Scale) -> list[Markup]:
    drawn = [text(0, -14, title, class_="ink strong")]
    for value, written in up.ticks:
        y = TALL - up.at(value, TALL)
        drawn += [line(0, y, WIDE, y, class_="grid"), text(-8, y + 4, written, "end", class_="soft")]
    for value, written in across.ticks:
        x = across.at(value, WIDE)
        drawn += [
            line(x, 0, x, TALL, class_="grid"), text(x, TALL + 18, written, "middle", class_="soft"),
        ]  # fmt: skip
    return [*drawn, text(WIDE / 2, TALL + 36, below, "middle", class_="soft")]


def _x_scale(document: Mapping[str, Any], axis: Mapping[str, Any] | None, places: Sequence[float]) -> Scale:
    """Ticks at the values that were swept, as many as there is room for."""
    if not places:
        return Scale(0.0, 1.0, ())
    if axis is None:
        names = {float(index): row["name"] for index, row in enumerate(document["points"])}
        return Scale(
            places[0], places[-1], [(place, names[place]) for place in places[:: ceil(len(places) / 3)]]
        )
    every = ceil(len(places) / 11)
    return Scale(places[0], places[-1], [(place, f"{place:.6g}") for place in places[::every]])


def _y_scale(values: Sequence[float], *, share: bool) -> Scale:
    if share:
        return Scale(0.0, 1.0, [(part / 4, f"{part * 25}%") for part in range(5)])
    greatest = max(values, default=0.0) or 1.0
    step = round_up(greatest / 4)
    count = ceil(greatest / step - 1e-9)
    return Scale(0.0, step * count, [(step * index, f"{step * index:,.6g}") for index in range(count + 1)])


def _path(places: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    points = " ".join(f"{number(x)},{number(y)}" for x, y in places)
    return element("polyline", points=points, **{"fill": "none", **attributes})


def _interval(x: float, low: float, high: float, colour: str) -> Markup:
    return element("line", x1=x, x2=x, y1=low, y2=high, stroke=colour, stroke_opacity=0.35, stroke_width=3.0)


def _dot(place: tuple[float, float], colour: str, name: str, written: str) -> Markup:
    return element(
        "circle", element("title", f"{name}: {written}"), cx=place[0], cy=place[1], r=3.6, fill=colour
    )


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
