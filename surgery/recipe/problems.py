"""What is wrong with a recipe, and how it is told: all problems at once, each with its place.

A problem knows its path inside the document; the places of paths come from the document that was read
(`document.py`) or from the `--set` that put a value there (`overrides.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from surgery.errors import RecipeError, Table

DocPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a value stands: 1-based line and column of its first character and of its key's."""

    line: int
    column: int
    key_line: int
    key_column: int
    text: str = ""
    """The scalar as it was written, before YAML made a number or a truth value of it."""
    origin: str = ""
    """The override that put the value there; empty for what the file says."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault. `at_key` places it at the key rather than the value; `position` overrules `path`."""

    path: DocPath
    message: str
    hint: str = ""
    at_key: bool = False
    position: Position | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """The positions of one document, and how they are written."""

    filename: str
    positions: Mapping[DocPath, Position]

    def nearest(self, path: Sequence[str | int]) -> Position | None:
        """The position of `path`, or of its nearest ancestor that exists."""
        for length in range(len(path), -1, -1):
            found = self.positions.get(tuple(path[:length]))
            if found:
                return found
        return None

    def locate(self, path: Sequence[str | int], *, at_key: bool = False) -> str:
        """file:line:column of the value (or the key) at `path`, or the override that set it.

        Falls back to the nearest ancestor; a document without positions (plain data) gives the path itself.
        """
        exact = tuple(path) in self.positions
        return self.write(self.nearest(path), at_key and exact) or dotted(path) or self.filename

    def write(self, position: Position | None, at_key: bool = False) -> str:
        """A position as text; empty for None."""
        if position is None or position.origin:
            return position.origin if position else ""
        line, column = (
            (position.key_line, position.key_column) if at_key else (position.line, position.column)
        )
        return f"{self.filename}:{line}:{column}"

    def error(self, problems: Iterable[Problem]) -> RecipeError:
        """One error for all problems: the first in the document leads, the others are rows of its table."""
        first, *others = dict.fromkeys(sorted(problems, key=self._order))
        rows = tuple(
            (self._place(each), f"{each.message}; {each.hint}" if each.hint else each.message)
            for each in others
        )
        return RecipeError(
            first.message,
            path=first.path,
            location=self._place(first),
            hint=first.hint,
            table=Table(("location", "problem"), rows) if rows else None,
        )

    def _place(self, problem: Problem) -> str:
        if problem.position:
            return self.write(problem.position, problem.at_key)
        return self.locate(problem.path, at_key=problem.at_key)

    def _order(self, problem: Problem) -> tuple[bool, int, int]:
        position = problem.position or self.nearest(problem.path)
        if position is None:
            return False, 0, 0
        if problem.at_key:
            return bool(position.origin), position.key_line, position.key_column
        return bool(position.origin), position.line, position.column


def dotted(path: Sequence[str | int]) -> str:
    """A path as `--set` takes it."""
    return ".".join(map(str, path))


def nearest_name(given: object, choices: Iterable[str]) -> str | None:
    """The choice that was probably meant."""
    by_folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(str(given).casefold(), by_folded, 1)
    return by_folded[close[0]] if close else None


def suggest(given: object, choices: Sequence[str], what: str) -> str:
    """A hint: the choice that was probably meant, or all of them."""
    close = nearest_name(given, choices)
    return f"did you mean `{close}`?" if close else f"{what}: {', '.join(choices) or 'none'}"
