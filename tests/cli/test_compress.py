"""`surgery sparsify` and `surgery quantize` on the command line: what they write, say and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from walk_models import Families, demos

import surgery
from surgery.cli.app import main


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return demos(tmp_path / "d.jsonl", repeat=4)


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_quantize_in_one_command(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ("--calibration", str(data), "--set", "bits=4", "--set", "group_size=16")
    arguments = ["quantize", str(tiny("deepseek_v3")), *given, "--format", "compressed-tensors"]
    assert main([*arguments, "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert "matrices as packed-int4-g16" in said.out
    assert f"surgeryverify{out}" in "".join(said.err.split())
    assert main(["verify", str(out), "--json"]) == 0
    assert document(capsys)["ok"]
    page = (out / "surgery_report.html").read_text()
    assert "Matrices of quantize.gptq" in page and "<polyline" in page
    card = (out / "README.md").read_text()
    assert "quantize.gptq" in card
    assert main(["inspect", str(out), "--json"]) == 0
    assert "packed-int4-g16" in capsys.readouterr().out


def test_sparsify_in_one_command(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["sparsify", str(tiny("llama")), "--calibration", str(data), "--set", "pattern=2:4"]
    assert main([*arguments, "-o", str(out)]) == 0
    assert "50.0% of their weights are zero" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    capsys.readouterr()
    wanda = [*arguments, "--op", "sparsify.wanda", "-o", str(tmp_path / "wanda"), "--json"]
    assert main(wanda) == 0
    assert document(capsys)["folder"] == str(tmp_path / "wanda")


def test_the_plan_says_what_the_walk_takes(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--calibration", str(data), "--set", "group_size=16", "--dry-run")
    arguments = ["quantize", str(tiny("mixtral")), *given, "-o", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == 0
    walk, write = document(capsys)["passes"]
    assert walk["matrices"] == 2 * (4 + 6 * 3) and walk["spool_bytes"] == walk["spool_bytes"] > 0
    assert write["bytes_written"] > 0
    assert main(arguments) == 0
    assert "quantize.gptq" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_eval_computes_with_packed_children(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("qwen3_moe")
    arguments = ["quantize", str(model), "--calibration", str(data), "--set", "bits=8", "-q"]
    assert main([*arguments, "--set", "group_size=16", "-o", str(tmp_path / "out")]) == 0
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    capsys.readouterr()
    for more in ([], ["--streamed"]):
        given = ["eval", str(tmp_path / "out"), "--parent", str(model), "--text", str(text), "--json"]
        assert main([*given, "--context", "64", *more]) == 0
        rows = {row["is_parent"]: row for row in document(capsys)["models"]}
        assert 0 < rows[False]["divergence"]["kl"]["value"] < 0.01


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--set", "bitz=4"], 3, "did you mean `bits`"),
        (["--set", "bits=9"], 3, "must be at most 8"),
        (["--set", "group_size=100"], 5, "do not divide"),
        (["--op", "quantize.gptp"], 3, "did you mean `quantize.gptq`"),
        (["--format", "gguf"], 3, "output.format"),
        (["--calibration", "nothing.jsonl"], 2, "no file nothing.jsonl"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str],
    more: list[str], code: int, said: str,
) -> None:  # fmt: skip
    given = ["--set", "group_size=16"] if "--calibration" in more else ["--calibration", str(data)]
    arguments = ["quantize", str(tiny("llama")), *given, *more, "-o", str(tmp_path / "out")]
    assert main(arguments) == code
    told = capsys.readouterr().err
    assert said in " ".join(told.split())
    assert not (tmp_path / "out").exists()


def test_no_data_is_needed_to_round(tiny: Families, tmp_path: Path) -> None:
    arguments = ["quantize", str(tiny("llama")), "--op", "quantize.rtn", "--set", "scheme=fp8", "-q"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    child = surgery.open(tmp_path / "out")
    assert child.quantization["format"] == "float-quantized"
