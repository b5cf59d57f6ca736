"""Several models in one table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Build, edit_tensors, to_fp8, write_tokenizer

from surgery.errors import UsageError
from surgery.evaluate.run import evaluate
from surgery.stream.source import open_checkpoint

SENTENCE = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    lines = [{"task": "ab"[n % 2], "prompt": f"What is {n}?", "answer": str(n)} for n in range(6)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 6)
    return path


def test_parent_and_children_in_one_table(build: Build, tmp_path: Path, problems: Path, text: Path) -> None:
    base = build("deepseek_v3", 1)
    fp8 = to_fp8(base, tmp_path / "fp8")
    told: list[tuple[str, int, int]] = []
    found = evaluate(
        {"fp8": str(fp8), "base": base},
        tasks=problems,
        text=text,
        parent="base",
        max_new_tokens=8,
        context=64,
        progress=lambda *each: told.append(each),
    )
    child, parent = found.rows
    assert (child.name, parent.name, found.parent) == ("fp8", "base", "base")
    assert (child.is_parent, parent.is_parent) == (False, True)
    assert parent.divergence is None
    assert child.divergence is not None and 0 < child.divergence.kl.value < 0.3
    assert child.divergence.parent == "base"
    assert child.perplexity is not None and parent.perplexity is not None
    assert child.divergence.tokens == child.perplexity.tokens == len(SENTENCE) * 6 + 1 - 5
    assert child.perplexity.value == pytest.approx(parent.perplexity.value, rel=0.2)
    assert child.tasks is not None and list(child.tasks.by_task) == ["a", "b"]
    assert len(child.tasks.replies) == child.tasks.accuracy.total == 6
    stages = ("load", "replies", "text")
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == [
        f"{name}: {stage}" for name in ("base", "fp8") for stage in stages
    ]
    assert all(done == total for stage, done, total in told if (stage, done + 1, total) not in told)
    assert found.notes == ()

    document = found.as_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert list(document) == ["schema", "models", "parent", "settings", "versions", "notes"]
    assert document["schema"] == 1
    assert document["settings"]["context"] == 64
    assert document["settings"]["dtype"] == "float32"
    assert document["models"][0]["tasks"]["problems"] == 6


def test_figures_do_not_depend_on_who_else_is_in_the_table(build: Build, problems: Path, text: Path) -> None:
    one, two = build("llama", 1), build("llama", 2)

    def row(models: list[Path], **options: Any) -> dict[str, Any]:
        found = evaluate(models, tasks=problems, text=text, max_new_tokens=6, **options).as_dict()
        figures = next(each for each in found["models"] if each["name"] == "llama-2")
        return {key: figures[key] for key in ("tasks", "perplexity", "divergence")}

    assert row([one, two], parent=one, batch_size=1) == row([two], parent=one)
    assert {**row([two], parent=one), "divergence": None} == row([two])


def test_an_extra_parent_is_a_row_and_models_may_be_lazy(build: Build, text: Path) -> None:
    child, parent = build("llama", 1), build("llama", 2)
    found = evaluate([open_checkpoint(child)], text=text, parent=parent)
    assert [row.name for row in found.rows] == ["llama-2", "llama-1"]
    assert [row.is_parent for row in found.rows] == [True, False]
    assert found.settings.context == 256  # the models' own maximum is below 512
    assert found.rows[0].tasks is None


def test_names_tell_models_apart(build: Build, tmp_path: Path, text: Path) -> None:
    first = build("llama", 1)
    second = tmp_path / "other" / "llama-1"
    second.parent.mkdir()
    second.symlink_to(first)
    named = [row.name for row in evaluate([str(first), str(second)], text=text).rows]
    assert named == [str(first), str(second)]
    assert [row.name for row in evaluate([f"{first}/"], text=text, parent=str(first)).rows] == ["llama-1"]
    with pytest.raises(UsageError, match="twice"):
        evaluate([first, first], text=text)


def test_notes_say_what_was_left_out_and_not_measured(build: Build, problems: Path) -> None:
    folder = build("deepseek_v3", num_nextn_predict_layers=1)
    extra = {"model.layers.3.eh_proj.weight": torch.ones(64, 128)}
    edit_tensors(folder, lambda tensors: tensors.update(extra))
    found = evaluate([folder], tasks=problems, parent=folder, max_new_tokens=2, limit=1)
    assert found.rows[0].left_out == ("model.layers.3.eh_proj.weight",)
    assert found.rows[0].tasks is not None and found.rows[0].tasks.accuracy.total == 2
    assert [note.partition(":")[0].split()[0] for note in found.notes] == ["deepseek_v3-0", "no"]


def test_tokenizers_that_differ_are_told_before_weights_are_read(build: Build, text: Path) -> None:
    one, two = build("llama", 1), build("llama", 2)
    write_tokenizer(two, add_bos_token=False)
    told: list[Any] = []
    with pytest.raises(UsageError, match="no KL divergence"):
        evaluate([one], text=text, parent=two, progress=lambda *each: told.append(each))
    assert told == []
    notes = evaluate([one, two], text=text).notes
    assert any("do not compare" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "nothing to measure"),
        ({"text": "absent"}, "absent"),
        ({"tasks": "absent"}, "absent"),
        ({"text": "text", "context": 1}, "context"),
        ({"text": "text", "context": 1000}, "256"),
        ({"text": "text", "batch_size": 0}, "batch_size"),
        ({"text": "text", "max_windows": 0}, "max_windows"),
        ({"text": "text", "answer": "("}, "pattern"),
        ({"text": "text", "device": "abacus"}, "abacus"),
    ],
)
def test_settings_are_checked(build: Build, text: Path, options: dict[str, Any], complaint: str) -> None:
    if options.get("text") == "text":
        options = {**options, "text": text}
    with pytest.raises(UsageError, match=complaint):
        evaluate([build("llama")], **options)
    with pytest.raises(UsageError, match="no models"):
        evaluate([], text=text)


def test_small_models_compute_with_one_thread_and_torch_is_left_as_it_was(build: Build, text: Path) -> None:
    before = torch.get_num_threads()
    folder = build("llama")
    torch.set_num_threads(2)
    seen: dict[int | None, set[int]] = {None: set(), 3: set()}
    try:
        for threads, counts in seen.items():
            evaluate(
                [folder],
                text=text,
                threads=threads,
                progress=lambda *_, counts=counts: counts.add(torch.get_num_threads()),
            )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {None: {1}, 3: {3}}


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, surgery.evaluate.run; print({'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_the_function_of_the_api_stays_one_once_its_modules_are_loaded() -> None:
    import surgery

    for _ in range(2):
        with pytest.raises(UsageError, match="nothing to measure"):
            surgery.evaluate(["model"])
