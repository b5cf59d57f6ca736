"""Rendering: results on stdout, everything else on stderr; JSON for machines, tables for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from surgery.errors import RecipeError, SurgeryError, Table

_MARKS = {
    "passed": "[green]✓[/green]",
    "failed": "[red]✗[/red]",
    "skipped": "[yellow]–[/yellow]",
    "noted": "[yellow]![/yellow]",
}
WIDE = 160
"""Columns of output that no terminal shows."""
LONGEST_TABLE = 20
"""Rows of an error's table shown to people; JSON has all."""


def console(*, stderr: bool) -> Console:
    """A console as wide as the terminal; a file or a pipe gets room for every table."""
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=WIDE)


@dataclass
class Output:
    """Where and how a command speaks."""

    json: bool = False
    quiet: bool = False
    debug: bool = False
    out: Console = field(default_factory=lambda: console(stderr=False))
    err: Console = field(default_factory=lambda: console(stderr=True))

    def document(self, value: Mapping[str, Any]) -> None:
        """The one JSON document of a --json run."""
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def say(self, text: str) -> None:
        """A line of a result, for people."""
        if not self.json:
            self.out.print(text, soft_wrap=True, markup=False)

    def mark(self, state: str, text: str) -> None:
        """A line of a result behind a mark: passed, failed, skipped or noted."""
        if not self.json:
            self.out.print(f"{_MARKS[state]} {escape(text)}", soft_wrap=True)

    def note(self, text: str) -> None:
        """A line beside the result: something its reader should know."""
        if not self.quiet:
            self.err.print(f"[yellow]note[/yellow]  {escape(text)}", soft_wrap=True)

    def step(self, text: str) -> None:
        """What is being done now."""
        if not self.quiet:
            self.err.print(text, soft_wrap=True, markup=False)

    def next(self, command: str) -> None:
        """What to do next."""
        if not self.quiet and not self.json:
            self.err.print(f"[bold]next[/bold]  {escape(command)}", soft_wrap=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()
    ) -> None:
        """A table of a result; `right` are the columns with numbers."""
        if self.json:
            return
        table = RichTable(
            title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index in right else "left", header_style="bold")
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self.out.print(table)
        self.out.print()

    def events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """What users must hear of, on stderr."""
        for event in events:
            self.note(event["message"])

    def error(self, error: SurgeryError) -> None:
        """What failed, where, and what to do next; with --json also as the document."""
        location = error.location if isinstance(error, RecipeError) else ""
        if self.json:
            self.document({
                "schema": 1,
                "error": {
                    "kind": type(error).__name__, "message": error.message, "location": location,
                    "hint": error.hint, "exit_code": error.exit_code,
                    "table": _table_dict(error.table),
                },
            })  # fmt: skip
        self.err.print(f"[bold red]error[/bold red] {escape(str(error))}", soft_wrap=True)
        if error.hint:
            self.err.print(f"[bold]next[/bold]  {escape(error.hint)}", soft_wrap=True)
        if error.table and not self.json:
            self._error_table(error.table)

    def _error_table(self, found: Table) -> None:
        table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 2))
        for column in found.columns:
            table.add_column(column, header_style="bold")
        for row in found.rows[:LONGEST_TABLE]:
            table.add_row(*(escape(cell) for cell in row))
        self.err.print(table)
        if len(found.rows) > LONGEST_TABLE:
            self.err.print(f"  … {len(found.rows) - LONGEST_TABLE} more (all with --json)")

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """A progress callback (stage, done, total): bars on a terminal, nothing elsewhere."""
        if self.quiet or not self.err.is_terminal:
            yield lambda stage, done, total: None
            return
        what, amount = TextColumn("{task.description}"), TextColumn("{task.fields[amount]}")
        columns = (what, BarColumn(), amount, TimeRemainingColumn())
        with Progress(*columns, console=self.err, transient=True) as bars:
            tasks: dict[str, Any] = {}
            begun: dict[str, tuple[float, int]] = {}

            def tell(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total, amount="")
                    begun[stage] = (time.monotonic(), done)
                amount = _amount(stage, done, total, *begun[stage])
                bars.update(tasks[stage], completed=done, total=total, amount=amount)

            yield tell


def _amount(stage: str, done: int, total: int, begun: float, first: int) -> str:
    if stage == "write":
        return f"{done / 1e9:.2f}/{total / 1e9:.2f} GB"
    if stage.endswith("walk"):
        # Tokens count once in every layer.
        rate = (done - first) / max(time.monotonic() - begun, 1e-3)
        return f"{done / max(total, 1):.0%}, {rate:,.0f} tokens/s in a layer"
    return f"{done}/{total}"


def _table_dict(table: Table | None) -> dict[str, Any] | None:
    if table is None:
        return None
    return {"columns": list(table.columns), "rows": [list(row) for row in table.rows]}
