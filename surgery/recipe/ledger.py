"""What a sweep has measured so far: `sweep.json` in its folder, whole after every point.

The file holds what the sweep is (recipe without the swept values, inputs, problems, settings); a sweep that
is something else is refused with the first difference named. The swept values are no part of it, so that
points can be added to a sweep.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.errors import PlanError
from surgery.stream.journal import LOCK, first_difference, lock
from surgery.stream.writer import disk_error

NAME = "sweep.json"
SCHEMA = 1

Row = Mapping[str, Any]


class Ledger:
    """Rows of measured points by name; `record` puts one on disk."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Continues what is in the folder. Raises PlanError where that is another sweep."""
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.rows: dict[str, Row] = {}
        self.facts: dict[str, Any] = {}
        """What else the document says."""
        found = read_sweep(folder)
        if found is not None:
            self._continue(found)

    def _continue(self, found: Mapping[str, Any]) -> None:
        earlier = dict(found.get("sweep") or {})
        if not any(row.get("figures") for row in found.get("points", ())):
            earlier["measuring"] = self.identity.get("measuring")
        difference = first_difference(earlier, self.identity)
        if difference:
            raise PlanError(
                f"{self.folder} holds another sweep: {difference}",
                hint="use another output folder, or restart with --fresh",
            )
        self.rows = {row["name"]: row for row in found.get("points", ())}
        self.facts = {key: value for key, value in found.items() if key not in ("schema", "sweep", "points")}

    def record(self, row: Row) -> None:
        """Keep the row of one point, in place of an earlier one."""
        self.rows[row["name"]] = row
        self.write(list(self.rows))

    def write(self, order: Sequence[str]) -> dict[str, Any]:
        """Put the document on disk, rows in this order and then those of other points; returns it."""
        names = [*order, *(name for name in self.rows if name not in order)]
        self.rows = {name: self.rows[name] for name in names if name in self.rows}
        document = {
            "schema": SCHEMA, "sweep": self.identity, **self.facts, "points": list(self.rows.values()),
        }  # fmt: skip
        write_text(self.folder / NAME, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        return document


def read_sweep(folder: Path) -> dict[str, Any] | None:
    """The document in a folder, None where there is none. Raises PlanError where it cannot be read."""
    path = folder / NAME
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read: {error}", hint="restart with --fresh") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise PlanError(f"{path} is no sweep of this version", hint="restart with --fresh")
    return found


@contextmanager
def sweep_folder(folder: Path, *, fresh: bool) -> Iterator[None]:
    """The folder, locked for this process. `fresh` empties it, where a sweep made it; what holds anything
    else is refused."""
    if folder == Path.cwd():
        raise PlanError("the output is the current folder", hint="give a folder that can be created")
    if folder.exists() and not folder.is_dir():
        raise PlanError(f"{folder} is a file", hint="choose another output folder")
    ours = any((folder / name).is_file() for name in (NAME, LOCK))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise PlanError(
            f"{folder} exists, is not empty and holds no sweep", hint="choose another output folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"cannot create {folder}: {error.strerror}", hint="choose another folder") from error
    held = lock(folder)
    try:
        if fresh:
            for path in folder.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
        (folder / LOCK).unlink(missing_ok=True)
    finally:
        os.close(held)


def write_text(path: Path, text: str) -> None:
    """A file that is whole or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(error, path) from error
