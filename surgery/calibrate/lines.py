"""Text files and JSONL, with errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery.errors import UsageError


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file, split at line feeds alone; UsageError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text: {error}") from error


def read_json_file(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; UsageError where it cannot be read or holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds {type(found).__name__}, not a JSON object")
    return found


def read_object(line: str, where: str) -> dict[str, Any]:
    """One line of a JSONL file; UsageError with its file and line where it holds no object."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: no valid JSON: {error}", hint="one JSON object per line") from error
    if not isinstance(found, dict):
        raise UsageError(f"{where}: {type(found).__name__}, not a JSON object")
    return found
