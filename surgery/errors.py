"""Errors that users see, with the exit code the command line returns for each.

SurgeryError               1   anything unexpected that we could still name
├── UsageError             2   wrong arguments of a command or an API call
├── RecipeError            3   the recipe is invalid; carries file, line and column
├── CheckpointError        4   an input checkpoint cannot be used
├── PlanError              5   refused before starting: disk, memory, output folder in use
├── VerificationError      6   an output is not what its manifest says
├── StrictError            7   finished, with fallbacks, under --strict
└── InterruptedRun       130   stopped by the user; the same command resumes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows behind an error that names many things at once (tensors, shapes, files)."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class SurgeryError(Exception):
    """What failed and where (`message`), the rows behind it (`table`), what to do next (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", table: Table | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.table = table


class UsageError(SurgeryError):
    exit_code = 2


class RecipeError(SurgeryError):
    """`path` locates the fault inside the document, e.g. ("steps", 0, "weights"); the loader adds
    `location` as file:line:column."""

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        path: Sequence[str | int] = (),
        location: str = "",
        hint: str = "",
        table: Table | None = None,
    ) -> None:
        super().__init__(message, hint=hint, table=table)
        self.path = tuple(path)
        self.location = location

    def __str__(self) -> str:
        return f"{self.location}: {self.message}" if self.location else self.message


class CheckpointError(SurgeryError):
    exit_code = 4


class PlanError(SurgeryError):
    exit_code = 5


class VerificationError(SurgeryError):
    exit_code = 6


class StrictError(SurgeryError):
    exit_code = 7


class InterruptedRun(SurgeryError):
    exit_code = 130
