"""What goes in front of a prompt, and which tokens end a reply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TEMPLATE, Build, write_tokenizer

from surgery.calibrate.tokenizer import load_tokenizer
from surgery.errors import CheckpointError
from surgery.stream.source import open_checkpoint


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found |= changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def ids_of(text: str, folder: Path) -> list[int]:
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return [vocab[byte] for byte in text]


def test_the_template_makes_the_turn_and_the_start_token_goes_in_front(build: Build) -> None:
    folder = build("llama")
    tokenizer = load_tokenizer(open_checkpoint(folder))
    assert tokenizer.prompt("ab") == [1, 3, *ids_of("ab", folder), 4]
    assert tokenizer.text([5, *ids_of("ab", folder)]) == "<think>ab"
    assert tokenizer.document("ab", ended=True) == [1, *ids_of("ab", folder), 2]
    assert tokenizer.document("ab", ended=False) == [1, *ids_of("ab", folder)]
    assert tokenizer.pad == 0


@pytest.mark.parametrize(
    ("in_config", "in_tokenizer", "asked", "begins"),
    [
        (1, None, None, True),
        (None, None, None, False),
        (5, None, None, False),  # config.json means another token
        (1, False, None, False),
        (None, True, None, True),
        (1, None, False, False),
        (None, False, True, True),
    ],
)
def test_whether_sequences_begin_with_the_start_token(
    build: Build, in_config: int | None, in_tokenizer: bool | None, asked: bool | None, begins: bool
) -> None:
    folder = build("llama")
    edit(folder / "config.json", bos_token_id=in_config)
    edit(folder / "tokenizer_config.json", add_bos_token=in_tokenizer)
    tokenizer = load_tokenizer(open_checkpoint(folder), add_bos=asked)
    assert (tokenizer.prompt("a")[:2] == [1, 3]) is begins
    assert (tokenizer.document("a", ended=False)[0] == 1) is begins


def test_a_start_token_in_the_template_is_not_doubled(build: Build) -> None:
    folder = build("llama")
    write_tokenizer(folder, chat_template="<bos>" + TEMPLATE)
    assert load_tokenizer(open_checkpoint(folder)).prompt("a")[:2] == [1, 3]


def test_without_a_template_the_prompt_is_the_text(build: Build) -> None:
    folder = build("llama")
    edit(folder / "tokenizer_config.json", chat_template=None)
    assert load_tokenizer(open_checkpoint(folder)).prompt("ab") == [1, *ids_of("ab", folder)]


def test_any_file_may_name_end_tokens(build: Build) -> None:
    folder = build("llama")
    edit(folder / "generation_config.json", eos_token_id=[2, 9])
    edit(folder / "config.json", eos_token_id=7)
    assert load_tokenizer(open_checkpoint(folder)).ends == {2, 7, 9}


def test_side_files_may_lie_elsewhere(build: Build, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build("llama"))
    files = {name: path for name, path in checkpoint.side_files.items() if not name.startswith("tokenizer")}
    other = tmp_path / "other"
    other.mkdir()
    write_tokenizer(other, chat_template="<|user|>")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).rename(other / f"moved-{name}")
        files[name] = other / f"moved-{name}"
    assert load_tokenizer(checkpoint.replace(side_files=files)).prompt("a") == [1, 3]


def test_a_tokenizer_that_cuts_otherwise_than_its_file_is_noticed(build: Build) -> None:
    folder = build("llama")
    checkpoint = open_checkpoint(folder)
    assert load_tokenizer(checkpoint).as_shipped
    # transformers 5.17 takes Qwen2Tokenizer for this model_type, whatever tokenizer.json says.
    edit(folder / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    qwen = checkpoint.replace(config={**checkpoint.config, "model_type": "qwen2"})
    found = load_tokenizer(qwen)
    assert found.as_shipped is (type(found.plain).__name__ == "TokenizersBackend")


def test_missing_and_broken_tokenizers_are_refused(build: Build) -> None:
    folder = build("llama")
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="generation_config"):
        load_tokenizer(open_checkpoint(folder))
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(open_checkpoint(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        load_tokenizer(open_checkpoint(folder))
    assert "tokenizer files" in caught.value.hint


def test_a_template_that_refuses_is_an_error_of_the_checkpoint(build: Build) -> None:
    folder = build("llama")
    edit(folder / "tokenizer_config.json", chat_template="{{ raise_exception('system first') }}")
    tokenizer = load_tokenizer(open_checkpoint(folder))
    with pytest.raises(CheckpointError, match="system first"):
        tokenizer.prompt("a")
