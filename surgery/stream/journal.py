"""The journal of a run: what is finished, and for which inputs and settings.

One JSON object a line, appended and synced. The first line holds the fingerprint (recipe, inputs,
settings that change results, versions); a run whose fingerprint differs is refused with the first
difference named. A torn last line, left by a kill, is ignored.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import PlanError
from surgery.stream.writer import disk_error

NAME = "surgery-journal.jsonl"
LOCK = "surgery-lock"


class Journal:
    """An open journal in a work folder; holds the folder's lock until closed."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self._path = folder / NAME
        self.shards: dict[str, dict[str, Any]] = {}
        """Finished shards by file name."""
        self._lock = lock(folder)
        try:
            self._file = open(self._path, "ab", buffering=0)
        except OSError as error:
            os.close(self._lock)
            raise disk_error(error, self._path) from error
        try:
            self._begin(fingerprint, folder)
        except BaseException:
            self.close()
            raise

    def _begin(self, fingerprint: Mapping[str, Any], folder: Path) -> None:
        events = read_events(self._path)
        if events:
            _compare(events[0].get("fingerprint", {}), fingerprint, folder)
            self._cut_torn_line()
            self.shards = {each["shard"]: each for each in events if each.get("event") == "shard"}
        else:
            self._file.truncate(0)
            self.append({"event": "start", "fingerprint": fingerprint})

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event and wait until it is on disk."""
        try:
            self._file.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self._path) from error

    def close(self) -> None:
        self._file.close()
        os.close(self._lock)

    def _cut_torn_line(self) -> None:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)


def lock(folder: Path) -> int:
    """Take the work folder for this process, or refuse."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise PlanError(
            f"another process is writing to {folder}", hint="wait for it, or write to another folder"
        ) from error
    return descriptor


def read_events(path: Path) -> list[dict[str, Any]]:
    """The whole events of a journal, up to the first line that is none."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            event = json.loads(line)
        except ValueError:
            break
        if not isinstance(event, dict):
            break
        events.append(event)
    return events


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    difference = first_difference(old, json.loads(json.dumps(new)))
    if difference:
        raise PlanError(
            f"{folder} holds an unfinished run of something else: {difference}",
            hint="use another output folder, or restart with --fresh",
        )


def first_difference(old: Any, new: Any, where: str = "") -> str:
    """The first place where two JSON values differ, in words; empty when equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            found = first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            found = first_difference(left, right, f"{where}.{index}")
            if found:
                return found
        return ""
    return "" if old == new else f"{where} was {json.dumps(old)}, is {json.dumps(new)}"
