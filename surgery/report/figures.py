"""The charts of the report besides the heat map: where bytes came from, and how models compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from surgery.report.svg import category, element, figure, line, rect, text

_WIDTH = 1000.0


@dataclass(frozen=True)
class Stack:
    """One bar: bytes by origin (an index into the page's list of origins)."""

    label: str
    nbytes: Mapping[int, int]
    written: str
    """What stands behind the bar, such as its size."""


def coverage_bars(stacks: Sequence[Stack], origins: Sequence[str]) -> Markup:
    """Every bar is as long as the others and shows shares; the first one stands apart as the total."""
    left, right, tall, gap = 150.0, 810.0, 18.0, 8.0
    drawn: list[Markup] = []
    y = 4.0
    for index, stack in enumerate(stacks):
        total = sum(stack.nbytes.values())
        drawn.append(text(left - 12, y + 13, stack.label, "end", class_="ink strong" if not index else "ink"))
        x = left
        for origin, nbytes in sorted(stack.nbytes.items()):
            share = nbytes / total if total else 0.0
            tip = element("title", f"{stack.label}: {origins[origin]}\n{nbytes:,} bytes, {share:.1%}")
            wide = (right - left) * share
            drawn.append(rect(x, y, wide, tall, tip, class_="cell", fill=category(origin)))
            x += wide
        drawn.append(text(right + 14, y + 13, stack.written, class_="soft"))
        y += tall + gap + (8 if not index else 0)
    return figure(_WIDTH, y, "share of bytes by origin, for every role", *drawn, least_width=640)


@dataclass(frozen=True)
class Measure:
    """A value of one model, with the ends of its confidence interval where there is one."""

    value: float
    written: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Panel:
    """One quantity for all models; `top` is the end of its axis, `ticks` what is written along it."""

    title: str
    measures: Sequence[Measure | None]
    top: float
    ticks: Sequence[tuple[float, str]]


def comparison_chart(models: Sequence[str], children: Sequence[bool], panels: Sequence[Panel]) -> Markup:
    """Panels side by side over the same models; children stand out from their parents."""
    left, gap, tall, first = 178.0, 74.0, 30.0, 30.0  # values are written in the gap
    wide = min((_WIDTH - left) / max(len(panels), 1) - gap, 320.0)
    bottom = first + tall * len(models)
    drawn: list[Markup] = []
    for row, model in enumerate(models):
        style = "ink strong" if children[row] else "ink"
        drawn.append(_name(left - 14, first + tall * (row + 0.5) + 4, model, style))
    for index, panel in enumerate(panels):
        x = left + (wide + gap) * index
        drawn.append(text(x, 14, panel.title, class_="ink strong"))
        needed = sum(7.5 * len(written) + 12 for _, written in panel.ticks[1:])
        for number, (tick, written) in enumerate(panel.ticks):
            at = x + wide * tick / panel.top
            drawn.append(line(at, first - 4, at, bottom + 2, class_="grid"))
            if needed <= wide or number in (0, len(panel.ticks) - 1):
                drawn.append(text(at, bottom + 17, written, "middle", class_="soft"))
        for row, measure in enumerate(panel.measures):
            y = first + tall * row
            if measure is None:
                drawn.append(text(x + 6, y + tall / 2 + 4, "not measured", class_="soft"))
                continue
            drawn.extend(_bar(panel, measure, models[row], (x, y, wide, tall), children[row]))
    width = left + (wide + gap) * len(panels)
    return figure(width, bottom + 24, "models compared", *drawn, least_width=min(width, 640))


def _bar(
    panel: Panel, measure: Measure, model: str, box: tuple[float, float, float, float], child: bool
) -> list[Markup]:
    x, y, wide, tall = box
    middle = y + tall / 2

    def at(value: float) -> float:
        return x + wide * min(max(value / panel.top, 0.0), 1.0)

    tip = element("title", f"{model}\n{panel.title}: {measure.written}")
    end = at(measure.value)
    drawn = [rect(x, y + 6, end - x, tall - 12, tip, class_="child" if child else "parent", rx=1.5)]
    if measure.low is not None and measure.high is not None:
        low, high = at(measure.low), at(measure.high)
        drawn.append(line(low, middle, high, middle, class_="interval"))
        drawn.append(line(low, middle - 4, low, middle + 4, class_="interval"))
        drawn.append(line(high, middle - 4, high, middle + 4, class_="interval"))
        end = max(end, high)
    drawn.append(text(end + 7, middle + 4, measure.written, class_="ink strong" if child else "ink"))
    return drawn


def _name(x: float, y: float, model: str, style: str) -> Markup:
    """The end of a long name, which is what tells paths apart; the whole in the tooltip."""
    short = model if len(model) <= 20 else "…" + model[-19:]
    return element("text", short, element("title", model), x=x, y=y, text_anchor="end", class_=style)
