"""What `surgery eval` found, as the table and the panels of the report.

Reads the JSON document of an evaluation; a quantity that no model has is left out. Models that the manifest
doesn't list as parents are children, and stand out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any

from surgery.report.figures import Measure, Panel
from surgery.report.svg import round_up

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Quantity:
    """One column. `found` takes a model's row to {value, low, high} or None; `shown` is whether it has a
    panel in the chart, `share` whether it goes from 0 to 1."""

    title: str
    found: Callable[[Row], Mapping[str, Any] | None]
    written: Callable[[float], str]
    shown: bool
    share: bool = False


@dataclass(frozen=True)
class TableCell:
    """A figure, and below it what it is based on and how sure it is."""

    value: str
    details: Sequence[str] = ()


@dataclass(frozen=True)
class TableRow:
    name: str
    model: str
    is_child: bool
    cells: Sequence[TableCell]


@dataclass(frozen=True)
class Comparison:
    """`by_task` has accuracy alone, and is None where the problems are of one task."""

    columns: Sequence[str]
    rows: Sequence[TableRow]
    by_task: tuple[Sequence[str], Sequence[TableRow]] | None
    panels: Sequence[Panel]
    caption: str
    notes: Sequence[str]


def read_evaluation(evaluation: Mapping[str, Any], parents: Mapping[str, Any]) -> Comparison:
    """`parents` are the manifest's inputs, by label."""
    models: Sequence[Row] = evaluation.get("models") or ()
    settings = evaluation.get("settings") or {}
    of_parents = {*parents, *(str(found.get("model")) for found in parents.values())}
    inherited = [not of_parents.isdisjoint((str(row.get("name")), str(row.get("model")))) for row in models]
    quantities = [each for each in _quantities(evaluation) if any(each.found(row) for row in models)]

    def rows(columns: Sequence[Quantity]) -> list[TableRow]:
        return [
            TableRow(
                str(row.get("name", "")), str(row.get("model", "")), any(inherited) and not parent,
                [_cell(column, column.found(row)) for column in columns],
            )
            for row, parent in zip(models, inherited, strict=True)
        ]  # fmt: skip

    tasks = list(dict.fromkeys(task for row in models for task in _tasks(row).get("by_task") or {}))
    of_tasks = [_accuracy_of(task) for task in tasks]
    return Comparison(
        columns=[each.title for each in quantities],
        rows=rows(quantities),
        by_task=(tasks, rows(of_tasks)) if len(tasks) > 1 else None,
        panels=[_panel(each, models) for each in quantities if each.shown],
        caption=_caption(models, settings),
        notes=[str(note) for note in evaluation.get("notes") or ()],
    )


def _quantities(evaluation: Mapping[str, Any]) -> list[Quantity]:
    tag = (evaluation.get("settings") or {}).get("tag") or "tag"
    parent = evaluation.get("parent") or "parent"
    found = [
        Quantity("accuracy", lambda row: _tasks(row).get("accuracy"), _share, True, share=True),
        Quantity("mean reply tokens", lambda row: _tasks(row).get("reply_tokens"), _count, True),
        Quantity(f"replies with {tag}", lambda row: _tasks(row).get("tagged"), _share, True, share=True),
        Quantity("perplexity", lambda row: row.get("perplexity"), _four_digits, True),
        Quantity(f"KL from {parent}", lambda row: _from_parent(row).get("kl"), _three_digits, False),
        Quantity(
            f"same token as {parent}",
            lambda row: _from_parent(row).get("agreement"),
            _share,
            False,
            share=True,
        ),
    ]
    if any((_tasks(row).get("cut_off") or {}).get("count") for row in evaluation.get("models") or ()):
        found.insert(
            3, Quantity("cut off", lambda row: _tasks(row).get("cut_off"), _share, False, share=True)
        )
    return found


def _from_parent(row: Row) -> Mapping[str, Any]:
    return row.get("divergence") or {}


def _tasks(row: Row) -> Mapping[str, Any]:
    return row.get("tasks") or {}


def _accuracy_of(task: str) -> Quantity:
    return Quantity(task, lambda row: (_tasks(row).get("by_task") or {}).get(task), _share, False, share=True)


def _cell(quantity: Quantity, found: Mapping[str, Any] | None) -> TableCell:
    if not found or found.get("value") is None:
        return TableCell("–")
    details = []
    if quantity.share and found.get("total"):
        details.append(f"{found['count']:,} of {found['total']:,}")
    low, high = found.get("low"), found.get("high")
    if low is not None and high is not None:
        details.append(f"{quantity.written(low)} to {quantity.written(high)}")
    return TableCell(quantity.written(found["value"]), details)


def _panel(quantity: Quantity, models: Sequence[Row]) -> Panel:
    measures = [_measure(quantity, quantity.found(row)) for row in models]
    if quantity.share:
        return Panel(quantity.title, measures, 1.0, [(0.0, "0%"), (0.5, "50%"), (1.0, "100%")])
    ends = [end for each in measures if each for end in (each.value, each.high) if end is not None]
    greatest = max(ends, default=0.0) or 1.0
    step = round_up(greatest / 3)
    top = step * ceil(greatest / step - 1e-9)
    ticks = [(step * index, f"{step * index:,.6g}") for index in range(round(top / step) + 1)]
    return Panel(quantity.title, measures, top, ticks)


def _measure(quantity: Quantity, found: Mapping[str, Any] | None) -> Measure | None:
    if not found or found.get("value") is None or not isfinite(found["value"]):
        return None
    low, high = found.get("low"), found.get("high")
    if low is None or high is None or not isfinite(high):
        low = high = None
    return Measure(found["value"], quantity.written(found["value"]), low, high)


def _caption(models: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """How it was measured."""
    parts = []
    problems = next((_tasks(row)["problems"] for row in models if _tasks(row).get("problems")), None)
    if problems is not None:
        limit = settings.get("max_new_tokens")
        at_most = f", replies of at most {limit:,} tokens" if limit else ""
        parts.append(f"{problems:,} problems, answered greedily{at_most}.")
    text = next((row["perplexity"] for row in models if row.get("perplexity")), None)
    if text is not None:
        parts.append(f"Perplexity over {text['tokens']:,} tokens in windows of {text['context']:,}.")
    confidence = settings.get("confidence")
    if confidence:
        parts.append(f"Ranges are {confidence:.0%} confidence intervals.")
    return " ".join(parts)


def _share(value: float) -> str:
    return f"{value:.1%}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".removesuffix(".")


def _four_digits(value: float) -> str:
    return f"{value:#.4g}".removesuffix(".")
