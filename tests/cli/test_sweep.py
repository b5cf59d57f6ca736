"""`surgery sweep` at the command line: documents, tables, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from surgery.cli.app import main
from surgery.errors import CheckpointError


@pytest.fixture
def sweep(parents: dict[str, Path], tmp_path: Path) -> list[str]:
    return [
        "sweep", "chimera", "-o", str(tmp_path / "out"), "--set", f"parents.base={parents['base']}",
        "--set", f"parents.reasoner={parents['reasoner']}", "--over", "steps.0.weights.reasoner=0:1:0.5",
    ]  # fmt: skip


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_dry_run_then_children_then_what_was_made(
    sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*sweep, "--dry-run", "--json"]) == 0
    planned = document(capsys)
    assert [point["name"] for point in planned["points"]] == ["reasoner=0", "reasoner=0.5", "reasoner=1"]
    assert planned["together"] and planned["disk"]["needed"] < planned["bytes_if_separate"]
    assert not (tmp_path / "out").exists()
    assert main([*sweep, "--dry-run"]) == 0
    assert "once for all children" in capsys.readouterr().out
    assert main([*sweep, "--threads", "1", "--json"]) == 0
    made = document(capsys)
    assert [row["folder"] for row in made["points"]] == ["reasoner=0", "reasoner=0.5", "reasoner=1"]
    files = {
        (status.st_ino, status.st_size)
        for path in (tmp_path / "out").rglob("*.safetensors")
        if (status := path.stat())
    }
    apart = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    if sum(size for _, size in files) < apart:  # hard links; reflinks do not show
        assert planned["disk"]["needed"] - sum(size for _, size in files) < planned["disk"]["needed"] // 4
    assert main([*sweep, "--threads", "1"]) == 0
    assert "3 in" in capsys.readouterr().out


def test_what_is_refused_and_with_which_code(
    sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for more, code, told in (
        (["--keep", "some"], 2, "--keep some"),
        (["--tasks", str(tmp_path / "none.jsonl")], 2, "none.jsonl"),
        (["--over", "steps.0.threshold=0:1:0"], 2, "steps of 0"),
        (["--select-over", "every"], 2, "no role"),
        (["--max-points", "2"], 2, "more than 2"),
        (["--over", "steps.0.weights.base=2,3"], 3, "--set steps.0.weights.base=2"),
        (["--memory", "1MB"], 5, "memory"),
    ):
        assert main([*sweep, *more]) == code, more
        assert told in capsys.readouterr().err
    monkeypatch.setattr("surgery.recipe.sweep_plan.free_bytes", lambda folder: 1000)
    assert main([*sweep, "--dry-run"]) == 5
    captured = capsys.readouterr()
    assert "too little" in captured.out and "more than is free" in captured.err


def test_points_that_failed_are_told_and_exit_with_one(
    sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(models: object, **told: object) -> None:
        raise CheckpointError("no place for x")

    monkeypatch.setattr("surgery.recipe.sweep.evaluate", failing)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    assert main([*sweep, "--tasks", str(tmp_path / "p.jsonl"), "--threads", "1"]) == 1
    captured = capsys.readouterr()
    assert "3 of 3 points could not be measured" in captured.err and "no place for x" in captured.err
    assert "tries them again" in captured.err
    assert (tmp_path / "out" / "reasoner=0.5" / "surgery_manifest.json").is_file()
