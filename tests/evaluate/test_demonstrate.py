"""Demonstrations: a model's own replies, written as calibration reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from walk_models import Families, alone

import surgery
from surgery.calibrate.data import Calibration, read_calibration
from surgery.calibrate.tokenizer import load_tokenizer
from surgery.cli.app import main
from surgery.errors import PlanError, UsageError
from surgery.evaluate.demonstrate import demonstrations, read_prompts

PROMPTS = ("hi", "What is 2 + 3?", "Ünïcode — 東京", "a\nb")


def prompts(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": text, "id": 1}) + "\n" for text in texts or PROMPTS))
    return path


def test_replies_are_those_of_generate(tiny: Families, tmp_path: Path) -> None:
    """Through the template, greedy, up to an end token or the limit."""
    folder, out = tiny("qwen3_moe"), tmp_path / "demos.jsonl"
    told = demonstrations(str(folder), prompts(tmp_path / "p.jsonl"), out, max_new_tokens=12)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer = load_tokenizer(surgery.open(folder))
    model = alone(folder)
    tokens = cut = 0
    for text, row in zip(PROMPTS, rows, strict=True):
        ids = torch.tensor([tokenizer.prompt(text)])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
            eos_token_id=2, pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        tokens += len(said)
        cut += said[-1] != 2
        assert row == {"prompt": text, "reply": tokenizer.text(said[:-1] if said[-1] == 2 else said)}
    assert told.as_dict() == {"file": str(out), "replies": 4, "tokens": tokens, "cut_off": cut}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos.jsonl", "p.jsonl"]


def test_calibration_reads_what_was_said(tiny: Families, tmp_path: Path) -> None:
    """A demonstration begins as the prompt does, and goes through the template as a conversation."""
    folder, out = tiny("llama"), tmp_path / "demos.jsonl"
    demonstrations(str(folder), prompts(tmp_path / "p.jsonl"), out, max_new_tokens=6)
    tokenizer = load_tokenizer(surgery.open(folder))
    found = read_calibration(Calibration.model_validate(str(out)), tokenizer)
    assert len(found.sequences) == 4
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for (_, ids), row in zip(found.sequences, rows, strict=True):
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["reply"]}]
        assert list(ids) == tokenizer.conversation(turns)


def test_limits_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n{"prompt": ""}\n')
    assert read_prompts(path, 2) == ["a", "b"]
    with pytest.raises(UsageError, match=r"p\.jsonl:5"):
        read_prompts(path)


@pytest.mark.parametrize("line", ["", "{}", '{"prompt": 3}', '{"prompt": ""}', "[1]", "{", '{"text": "a"}'])
def test_prompts_that_are_none(tiny: Families, tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=r"p\.jsonl"):
        demonstrations(str(tiny("llama")), path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_files_that_are_there_stay(tiny: Families, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    path = prompts(tmp_path / "p.jsonl", "a")
    with pytest.raises(PlanError, match="exists"):
        demonstrations(str(tiny("llama")), path, out, max_new_tokens=2)
    assert out.read_text() == "mine\n"
    demonstrations(str(tiny("llama")), path, out, max_new_tokens=2, overwrite=True)
    assert json.loads(out.read_text())["prompt"] == "a"


@pytest.mark.parametrize("place", ["folder", "nowhere"])
def test_places_that_cannot_be_written(tiny: Families, tmp_path: Path, place: str) -> None:
    """Told before the model has replied to anything."""
    (tmp_path / "folder").mkdir()
    out = tmp_path / "folder" if place == "folder" else tmp_path / "no" / "where.jsonl"
    path = prompts(tmp_path / "p.jsonl", "a")
    told: list[str] = []
    with pytest.raises((PlanError, UsageError)):
        demonstrations(
            str(tiny("llama")), path, out, max_new_tokens=2, overwrite=True,
            progress=lambda stage, *_: told.append(stage),
        )  # fmt: skip
    assert told == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder", "p.jsonl"]


def test_on_the_command_line(tiny: Families, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts in, demonstrations out, and the next command that it names works."""
    folder, out = tiny("mixtral"), tmp_path / "demos.jsonl"
    path = prompts(tmp_path / "p.jsonl")
    given = ["demonstrate", str(folder), "--prompts", str(path), "-o", str(out), "--max-new-tokens", "5"]
    assert main([*given, "--limit", "2"]) == 0
    said = capsys.readouterr()
    following = f"surgery prune {folder} --calibration {out} --set keep=0.5 -o OUT"
    assert "".join(following.split()) in "".join(said.err.split())
    assert "2 replies" in " ".join(said.out.split()) and len(out.read_text().splitlines()) == 2
    assert main(given) == 5
    capsys.readouterr()
    assert main([*given, "--overwrite", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["replies"] == 4 and document["schema"] == 1
    assert main(["prune", str(folder), "--calibration", str(out), "--set", "keep=0.5", "-o",
                 str(tmp_path / "out"), "--quiet"]) == 0  # fmt: skip
