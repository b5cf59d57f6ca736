"""What `surgery eval` found, as the table and the panels of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.report.figures import Panel


@dataclass(frozen=True)
class TableCell:
    value: str
    detail: str = ""


@dataclass(frozen=True)
class TableRow:
    name: str
    cells: Sequence[TableCell]


@dataclass(frozen=True)
class Comparison:
    models: Sequence[str]
    child: int | None
    panels: Sequence[Panel]
    columns: Sequence[str]
    rows: Sequence[TableRow]
    caption: str
    notes: Sequence[str]


def read_evaluation(evaluation: Mapping[str, Any]) -> Comparison:
    return Comparison((), None, (), (), (), "", ())
