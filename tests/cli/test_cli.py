"""The command line: exit codes, JSON documents, and what a user sees of a whole run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from factories import deepseek_v3, vary

from surgery.cli.app import main
from surgery.resources import recipe_folder

DEMO = recipe_folder() / "demo"


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parents")
    deepseek_v3(folder / "a", 1)
    vary(folder / "a", folder / "b", 2, 0.1)
    return folder / "a", folder / "b"


@pytest.fixture
def chimera(parents: tuple[Path, Path]) -> list[str]:
    return ["chimera", "--set", f"parents.base={parents[0]}", "--set", f"parents.reasoner={parents[1]}"]


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_run_verify_diff_inspect(
    chimera: list[str], parents: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "child"
    assert main(["run", *chimera, "-o", str(out), "--json"]) == 0
    ran = document(capsys)
    assert ran["folder"] == str(out)
    assert {row["role"] for row in ran["distances"]} >= {"routed_expert", "attention"}
    assert main(["verify", str(out), "--recompute", "all", "--no-load", "--json"]) == 0
    checks = {each["check"]: each["state"] for each in document(capsys)["checks"]}
    assert checks["hashes"] == checks["lineage"] == checks["tensors"] == checks["finite"] == "passed"
    assert main(["diff", str(parents[0]), str(out), "--json"]) == 0
    roles = {row["role"]: row for row in document(capsys)["roles"] if not row["mtp"]}
    assert roles["routed_expert"]["rms"] > 0
    assert roles["attention"]["equal_bytes"] == roles["attention"]["tensors"]
    assert main(["inspect", str(out), "--json"]) == 0
    assert document(capsys)["model_type"] == "deepseek_v3"
    assert main(["report", str(out), "--to", str(tmp_path / "page.html")]) == 0
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_a_finished_output_is_refused_without_overwrite(
    chimera: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "child")
    assert main(["run", *chimera, "-o", out, "--quiet", "--json"]) == 0
    assert main(["run", *chimera, "-o", out]) == 5
    assert "--overwrite" in capsys.readouterr().err
    assert main(["run", *chimera, "-o", out, "--overwrite", "--quiet", "--json"]) == 0


def test_verify_finds_a_flipped_byte(
    chimera: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "child"
    main(["run", *chimera, "-o", str(out), "--quiet", "--json"])
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", str(out), "--recompute", "all", "--no-load", "--json"]) == 6
    states = {each["check"]: each["state"] for each in document(capsys)["checks"]}
    assert states["hashes"] == "failed" and states["lineage"] == "failed"
    assert main(["verify", str(out.parent)]) == 6


def test_plan_reports_what_run_refuses(
    chimera: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", *chimera, "--json"]) == 0
    found = document(capsys)
    assert found["mtp"]["tensors"] > 0 and found["disk"]["shortage"] == 0
    assert {row["action"] for row in found["coverage"]} == {"copy of base", "copy of reasoner"}
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert main(["plan", *chimera, "--json"]) == 0
    assert document(capsys)["disk"]["shortage"] > 0
    assert main(["plan", *chimera, "-o", str(tmp_path / "x")]) == 5
    assert main(["run", *chimera, "-o", str(tmp_path / "x")]) == 5
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["run", "chimera"], 2, "--out"),
        (["frobnicate"], 2, "frobnicate"),
        (["plan", "no-such-recipe"], 3, "no-such-recipe"),
        (["validate", "chimera", "--set", "steps.0.weigths.x=1"], 3, "did you mean `weights`"),
        (
            ["plan", "demo/chimera", "--set", "steps.0.weights.deliberate=1.5"],
            3,
            "less than or equal|at most",
        ),
        (["plan", "demo/chimera", "--set", "steps.0.select=[mtp]"], 3, "takes no tensor"),
        (["inspect", "/no/such/folder"], 4, "does not exist"),
        (["plan", "demo/chimera", "--set", "parents.terse=/no/such/folder"], 4, "does not exist"),
        (["plan", "demo/chimera", "-o", "x", "--memory", "1MB"], 5, "256"),
        (["plan", "demo/chimera", "--memory", "much"], 2, "no size"),
        (["recipes", "show", "nothing"], 2, "nothing"),
        (["diff", "a", "b", "--by", "mood"], 2, "mood"),
    ],
)
def test_bad_input_has_its_exit_code(
    arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert re.search(told, " ".join(captured.err.split()))
    assert "Traceback" not in captured.err


def test_errors_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "/no/such/folder", "--json"]) == 4
    error = document(capsys)["error"]
    assert error["kind"] == "CheckpointError" and error["exit_code"] == 4 and error["hint"]


def test_strict_turns_notes_into_exit_code_7(
    parents: tuple[Path, Path], chimera: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    vary(parents[0], other, 5, 0.1)
    config = json.loads((other / "config.json").read_text())
    config["rope_theta"] = 12345.0
    (other / "config.json").write_text(json.dumps(config))
    given = [*chimera, "--set", f"parents.reasoner={other}"]
    assert main(["run", *given, "-o", str(tmp_path / "x"), "--strict"]) == 7
    assert "rope_theta" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["run", *given, "-o", str(tmp_path / "x")]) == 0
    assert "rope_theta" in capsys.readouterr().err


def test_recipes_schema_and_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "ls", "--json"]) == 0
    assert "chimera" in {each["name"] for each in document(capsys)["recipes"]}
    assert main(["recipes", "show", "chimera"]) == 0
    assert "merge.aoe" in capsys.readouterr().out
    assert main(["recipes", "copy", "chimera", str(tmp_path / "mine.yaml")]) == 0
    assert main(["recipes", "copy", "chimera", str(tmp_path / "mine.yaml")]) == 5
    capsys.readouterr()
    assert main(["schema"]) == 0
    assert document(capsys)["properties"]["parents"]
    assert main(["doctor", "--json"]) == 0
    assert document(capsys)["packages"]["torch"] != "missing"


def test_stdout_holds_results_and_stderr_the_rest(chimera: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "surgery", "plan", *chimera], capture_output=True, text=True, check=True
    )
    assert "routed_expert" in done.stdout and "note" not in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
