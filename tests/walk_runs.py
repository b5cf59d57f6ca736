"""Running recipes with walks: stopped somewhere, resumed, compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import file_hashes

import surgery
from surgery.operators.protocol import RunContext

CONTEXT = RunContext(snapshot_seconds=0)


class Killed(BaseException):
    """Stands for a signal: nothing handles it."""


def killer(stage: str, at: int) -> Callable[[str, int, int], None]:
    """Progress that stops a run when it is told of `stage` for the time number `at`."""
    told = [0]

    def tell(now: str, done: int, total: int) -> None:
        if now == stage:
            told[0] += 1
            if told[0] == at:
                raise Killed

    return tell


def kill(document: dict[str, Any], out: Path, stage: str, at: int, context: RunContext = CONTEXT) -> None:
    with pytest.raises(Killed):
        surgery.run(document, out, context=context, progress=killer(stage, at), threads=1)
    assert not out.exists()


def same(out: Path, other: Path) -> None:
    """All but what tells of the run: times stand in report, card and sums."""
    one, two = file_hashes(out), file_hashes(other)
    told = {"surgery_report.html", "SHA256SUMS", "README.md"}
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= told


def layers_walked(document: dict[str, Any], out: Path, **options: Any) -> int:
    """How many layers a run walked."""
    told: list[int] = []
    surgery.run(
        document, out, context=CONTEXT, threads=1,
        progress=lambda stage, done, total: told.append(done) if stage == "walk" else None, **options,
    )  # fmt: skip
    return max(0, len(told) - 1)
