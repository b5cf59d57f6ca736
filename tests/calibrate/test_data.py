"""Calibration data: what sequences come out, and what is refused with file and line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_models import write_tokenizer
from walk_models import Families

import surgery
from surgery.calibrate.data import Calibration, CalibrationSet, read_calibration
from surgery.calibrate.tokenizer import Tokenizer, load_tokenizer
from surgery.errors import CheckpointError, PlanError, UsageError

BOS, EOS, USER, ASSISTANT = 1, 2, 3, 4


@pytest.fixture(scope="module")
def tokenizer(tiny: Families) -> Tokenizer:
    return load_tokenizer(surgery.open(tiny("llama")))


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(data: Any, tokenizer: Tokenizer, **limits: Any) -> CalibrationSet:
    return read_calibration(Calibration.model_validate(data), tokenizer, **limits)


def text_of(ids: tuple[int, ...], tokenizer: Tokenizer) -> str:
    return tokenizer.text([each for each in ids if each > 5])


def test_texts_are_documents_with_start_and_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "d.jsonl", {"text": "abc"}, {"text": "Ä b", "else": 1})
    found = read(file, tokenizer)
    assert [(d, ids[0], ids[-1]) for d, ids in found.sequences] == [(0, BOS, EOS)] * 2
    assert [text_of(ids, tokenizer) for _, ids in found.sequences] == ["abc", "Ä b"]
    assert found.tokens == sum(len(ids) for _, ids in found.sequences) == 5 + 6
    assert found.domains == ("all",) and found.cut == found.left_over == 0


def test_conversations_go_through_the_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The three ways to write one conversation give the same ids, as the template says."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    rows = [{"messages": turns}] + [
        {"prompt": "hi", key: "yo"} for key in ("reply", "response", "completion")
    ]
    found = read(write(tmp_path / "d.jsonl", *rows), tokenizer)
    assert len({ids for _, ids in found.sequences}) == 1
    (ids,) = {ids for _, ids in found.sequences}
    text = {each: tokenizer.plain.encode(each, add_special_tokens=False) for each in ("hi", "yo")}
    assert list(ids) == [BOS, USER, *text["hi"], ASSISTANT, *text["yo"], EOS]


REASONER = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}"
    "<|assistant|>{{ m['content'].split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>OPEN{% endif %}"
)
"""As DeepSeek-R1's: reasoning of past turns is cut out; the variant opens the reasoning itself."""


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_reasoning_of_the_last_reply_stays(tmp_path: Path, tokenizer: Tokenizer, opened: str) -> None:
    tokenizer.plain.chat_template = REASONER.replace("OPEN", opened)
    row = {"prompt": "hi", "reply": "<think>\nlong</think>yo"}
    ((_, ids),) = read(write(tmp_path / "d.jsonl", row), tokenizer).sequences
    said = tokenizer.text(ids).replace("\n", "")
    assert said == "<bos><|user|>hi<|assistant|><think>long</think>yo<eos>"
    assert ids[-1] == EOS


def test_empty_replies_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"d\.jsonl:1: the last turn is empty"):
        read(write(tmp_path / "d.jsonl", {"prompt": "hi", "reply": " "}), tokenizer)


def test_other_files_are_one_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "prose.txt").write_text("one\n\ntwo")
    ((_, ids),) = read(str(tmp_path / "prose.txt"), tokenizer).sequences
    assert text_of(ids, tokenizer) == "one\n\ntwo" and ids[-1] != EOS


def test_long_documents_are_cut_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "d.jsonl", {"text": "a" * 30}, {"text": "b"}, {"text": "c" * 8})
    found = read({"files": file, "sequence_length": 10}, tokenizer)
    assert [len(ids) for _, ids in found.sequences] == [10, 3, 10] and found.cut == 1
    assert found.describe()["cut"] == 1


def test_packed_sequences_are_one_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "d.jsonl", {"text": "a" * 11}, {"text": "b" * 4}, {"text": "c" * 9})
    data = {"files": file, "sequence_length": 8, "packed": True}
    found = read(data, tokenizer)
    row = [each for text in ("a" * 11, "b" * 4, "c" * 9) for each in tokenizer.document(text, ended=True)]
    assert [list(ids) for _, ids in found.sequences] == [row[i : i + 8] for i in (0, 8, 16)]
    assert found.left_over == len(row) - 24
    assert len(read({**data, "num_samples": 2}, tokenizer).sequences) == 2
    with pytest.raises(UsageError, match="fewer than 64 tokens"):
        read({**data, "sequence_length": 64}, tokenizer)


def test_samples_are_the_first_ones_of_each_domain(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = write(tmp_path / "1.jsonl", {"text": "a"}, {"text": "b"})
    two = write(tmp_path / "2.jsonl", {"text": "c"})
    three = write(tmp_path / "3.jsonl", {"text": "d"}, {"text": "e"}, {"text": "f"}, {"text": "g"})
    found = read({"files": {"x": [one, two], "y": three}, "num_samples": 3}, tokenizer)
    assert [(d, text_of(ids, tokenizer)) for d, ids in found.sequences] == [
        (0, "a"), (0, "b"), (0, "c"), (1, "d"), (1, "e"), (1, "f")
    ]  # fmt: skip
    assert found.describe()["domains"] == {"x": 3, "y": 3}
    assert read({"x": [one, two], "y": three}, tokenizer).domains == ("x", "y")


def test_the_hash_is_of_ids_and_domains_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    a = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    b = write(tmp_path / "b.jsonl", {"text": "one", "id": 7}, {}, {"text": "two"})
    Path(b).write_text(Path(b).read_text().replace("{}\n", "\n"))
    digests = [
        read(a, tokenizer).digest,
        read(b, tokenizer).digest,
        read({"all": a}, tokenizer).digest,
        read({"x": a}, tokenizer).digest,
        read({"files": a, "sequence_length": 4}, tokenizer).digest,
        read({"files": a, "num_samples": 1}, tokenizer).digest,
        read(write(tmp_path / "c.jsonl", {"text": "two"}, {"text": "one"}), tokenizer).digest,
        read(write(tmp_path / "d.jsonl", {"text": "onet"}, {"text": "wo"}), tokenizer).digest,
    ]
    assert digests[0] == digests[1] == digests[2]
    assert len({*digests}) == len(digests) - 2


def test_files_beside_the_recipe(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder goes first."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    write(tmp_path / "there" / "d.jsonl", {"text": "there"})
    monkeypatch.chdir(tmp_path / "here")
    folders = (tmp_path / "there",)
    ((_, ids),) = read("d.jsonl", tokenizer, folders=folders).sequences
    assert text_of(ids, tokenizer) == "there"
    write(tmp_path / "here" / "d.jsonl", {"text": "here"})
    ((_, ids),) = read("d.jsonl", tokenizer, folders=folders).sequences
    assert text_of(ids, tokenizer) == "here"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "no valid JSON"),
        ("[]", "not a JSON object"),
        ('{"text": ""}', "`text` is empty"),
        ('{"text": "  \\n"}', "`text` is empty"),
        ('{"text": 3}', "neither"),
        ("{}", "neither"),
        ('{"prompt": "p"}', "without its `reply`"),
        ('{"prompt": "p", "reply": 3}', "turns"),
        ('{"messages": []}', "turns"),
        ('{"messages": "hi"}', "turns"),
        ('{"messages": [{"role": "user"}]}', "turns"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "turns"),
    ],
)
def test_lines_that_cannot_be_read(tmp_path: Path, tokenizer: Tokenizer, line: str, told: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=told) as caught:
        read(str(path), tokenizer)
    assert f"{path}:3" in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "array.json").write_text('[{"text": "a"}]')
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe4"}')
    for name, told in (
        ("empty.jsonl", "no document"), ("blank.jsonl", "no document"), ("blank.txt", "no text"),
        ("latin.jsonl", "UTF-8"), ("array.json", "JSONL"), ("none.jsonl", "no file"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=told) as caught:
            read(str(tmp_path / name), tokenizer)
        assert name in caught.value.message
    for name in ("hf://datasets/owner", "hf://datasets/owner/name", "hf://datasets//name/file"):
        with pytest.raises(UsageError, match="names no file"):
            read(name, tokenizer)


def test_longer_than_the_model_takes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "d.jsonl", {"text": "a" * 400})
    with pytest.raises(PlanError, match=r"300 tokens.*256 positions") as caught:
        read({"files": file, "sequence_length": 300}, tokenizer, longest=256)
    assert "256" in caught.value.hint
    found = read(file, tokenizer, longest=256)
    assert len(found.sequences[0][1]) == 256 and found.cut == 1


def test_the_tokenizer_of_another_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "d.jsonl", {"text": "ÿ~"})
    largest = max(read(file, tokenizer).sequences[0][1])
    assert read(file, tokenizer, vocab_size=largest + 1).tokens
    with pytest.raises(PlanError, match=f"id {largest}.*{largest} tokens"):
        read(file, tokenizer, vocab_size=largest)


def test_chats_without_a_template(tiny: Families, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    write_tokenizer(folder, chat_template=None)
    bare = load_tokenizer(surgery.open(folder))
    with pytest.raises(CheckpointError, match="no chat template"):
        read(write(tmp_path / "d.jsonl", {"prompt": "p", "reply": "r"}), bare)
    assert read(write(tmp_path / "t.jsonl", {"text": "t"}), bare).tokens == 3


@pytest.mark.parametrize(
    "data",
    [
        None, 3, [], {}, {"files": {}}, {"files": []}, {"files": {"a": []}}, {"files": "f", "else": 1},
        {"files": "f", "num_samples": 0}, {"files": "f", "num_samples": 1.5}, {"files": "f", "packed": "yes"},
        {"files": "f", "sequence_length": 1}, {"files": [3]}, {"files": {"a": {"b": "c"}}},
        {"num_samples": 3},
    ],
)  # fmt: skip
def test_settings_that_are_none(data: Any) -> None:
    with pytest.raises(ValidationError):
        Calibration.model_validate(data)
