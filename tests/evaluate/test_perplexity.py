"""Perplexity and KL against a plain computation in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import Build
from transformers import AutoModelForCausalLM

from surgery.calibrate.tokenizer import load_tokenizer
from surgery.errors import CheckpointError, UsageError
from surgery.evaluate.divergence import Divergence, window_divergence
from surgery.evaluate.load import load_model
from surgery.evaluate.perplexity import (
    Document,
    Perplexity,
    logits_of,
    read_documents,
    window_nll,
    windows,
)
from surgery.stream.source import open_checkpoint

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 3


def plain_probabilities(folder: Path, ids: list[int]) -> torch.Tensor:
    """Next-token distributions of a window, [len(ids), vocabulary], all of it in float64."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        experts_implementation="eager",  # torch's grouped product has no float64
    )
    with torch.no_grad():
        probabilities: torch.Tensor = model(torch.tensor([ids])).logits[0].softmax(dim=-1)
    return probabilities


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_perplexity_is_that_of_a_plain_float64_pass(build: Build, family: str) -> None:
    folder = build(family)
    checkpoint = open_checkpoint(folder)
    cut = windows([Document(TEXT, ended=False)], load_tokenizer(checkpoint), context=100)
    assert [len(window) for window in cut] == [100, 100, len(TEXT) + 1 - 200]
    loaded = load_model(checkpoint)
    found = Perplexity.of(
        [window_nll(logits_of(loaded, window), window) for window in cut],
        [len(window) - 1 for window in cut],
        100,
    )
    expected = [
        -math.log(plain_probabilities(folder, list(window))[position, window[position + 1]])
        for window in cut
        for position in range(len(window) - 1)
    ]
    assert found.tokens == len(expected)
    assert found.nll.value == pytest.approx(math.fsum(expected) / len(expected), rel=1e-6)
    assert found.value == pytest.approx(math.exp(math.fsum(expected) / len(expected)), rel=1e-5)
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    assert (found.windows, found.context) == (3, 100)


def test_divergence_is_that_of_a_plain_float64_pass(build: Build) -> None:
    parent, child = build("llama", 1), build("llama", 2)
    ids = load_tokenizer(open_checkpoint(parent)).document(TEXT[:90], ended=False)
    found = window_divergence(
        logits_of(load_model(open_checkpoint(parent)), ids),
        logits_of(load_model(open_checkpoint(child)), ids),
    )
    p, q = plain_probabilities(parent, ids)[:-1], plain_probabilities(child, ids)[:-1]
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)
    assert found.agreeing == int((p.argmax(-1) == q.argmax(-1)).sum())
    assert found.tokens == len(ids) - 1


def test_a_model_is_no_way_from_itself_and_the_direction_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (3 * torch.randn(150, 40, generator=generator) for _ in range(2))
    assert window_divergence(one, one).kl == 0
    assert window_divergence(one, one).agreeing == 150
    assert window_divergence(one, two).kl != pytest.approx(window_divergence(two, one).kl, rel=1e-3)


def test_tokens_that_both_rule_out_add_nothing() -> None:
    one, two = torch.zeros(1, 3), torch.zeros(1, 3)
    one[0, 2] = two[0, 2] = -math.inf
    two[0, 0] = 1
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([math.e, 1]) / (math.e + 1)
    assert window_divergence(one, two).kl == pytest.approx(float((p * (p / q).log()).sum()))


def test_windows_are_put_together_by_tokens() -> None:
    each = [window_divergence(torch.eye(n, 5), torch.zeros(n, 5)) for n in (2, 3)]
    found = Divergence.of("p", each)
    assert found.kl.value == pytest.approx((each[0].kl + each[1].kl) / 5)
    assert (found.agreement.total, found.tokens, found.parent) == (5, 5, "p")


def test_nan_and_infinity_are_refused() -> None:
    bad = torch.zeros(3, 5)
    bad[1, 2] = math.nan
    with pytest.raises(CheckpointError, match="NaN"):
        window_nll(bad, [0, 1, 2, 3])
    with pytest.raises(CheckpointError, match="NaN"):
        window_divergence(bad, torch.zeros(3, 5))
    with pytest.raises(CheckpointError, match="shape"):
        window_divergence(torch.zeros(3, 5), torch.zeros(3, 6))


def test_a_hopeless_model_has_a_figure_that_json_can_hold() -> None:
    found = Perplexity.of([1e6, 1e6], [10, 10], 11)
    assert math.isfinite(json.loads(json.dumps(found.as_dict(), allow_nan=False))["value"])


def test_documents_have_ends_and_running_text_has_none(build: Build, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(build("llama")))
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n\n{"text": "c", "more": 1}\n')
    (tmp_path / "a.txt").write_text("ab\nc\n")
    documents = read_documents(tmp_path / "a.jsonl")
    assert documents == (Document("ab", ended=True), Document("c", ended=True))
    assert read_documents(tmp_path / "a.txt") == (Document("ab\nc\n", ended=False),)
    ((first,), cut) = windows(documents, tokenizer, 50), windows(documents, tokenizer, 3)
    assert [first[0], first[3], first[4], first[-1]] == [1, 2, 1, 2]
    assert [len(window) for window in cut] == [3, 3]  # the seventh token stands alone
    assert windows(documents, tokenizer, 3, limit=1) == cut[:1]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", '{"text": 1}', "a.jsonl:1: `text`"),
        ("a.jsonl", '{"text": "a"}\nx', "a.jsonl:2: no valid JSON"),
        ("a.jsonl", "\n", "holds no text"),
        ("a.txt", " \n", "holds no text"),
    ],
)
def test_unusable_texts_are_refused(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=complaint):
        read_documents(tmp_path / name)


def test_a_text_of_one_token_has_nothing_to_predict(build: Build) -> None:
    tokenizer = load_tokenizer(open_checkpoint(build("llama")), add_bos=False)
    with pytest.raises(UsageError, match="fewer than two tokens"):
        windows([Document("a", ended=False)], tokenizer, 10)
