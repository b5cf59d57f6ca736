"""Replies do not depend on the batch and are those of transformers' generate."""

from __future__ import annotations

import random
from pathlib import Path

import factories
import pytest
import torch
from tiny_models import Build

from surgery.errors import UsageError
from surgery.evaluate.greedy import replies
from surgery.evaluate.load import LoadedModel, load_model
from surgery.stream.source import open_checkpoint

ENDS = frozenset(range(2, 22))
"""Many end tokens, so that random models end at many different lengths."""
NEW = 30


def prompts(count: int = 11) -> list[list[int]]:
    chance = random.Random(3)
    return [[chance.randrange(6, 300) for _ in range(chance.randrange(1, 40))] for _ in range(count)]


def generated(loaded: LoadedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = loaded.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
        eos_token_id=sorted(ENDS), pad_token_id=0,
    )  # fmt: skip
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def from_factory(tmp_path: Path, family: str) -> LoadedModel:
    loaded = load_model(open_checkpoint(getattr(factories, family)(tmp_path / family, 1)))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return loaded


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_reply_is_the_same_alone_in_any_batch_and_by_generate(build: Build, family: str) -> None:
    loaded = load_model(open_checkpoint(build(family)))
    alone = replies(loaded, prompts(), ends=ENDS, max_new_tokens=NEW, batch_size=1)
    assert len({len(reply) for reply in alone}) > 3  # rows leave the batch at different times
    for batch_size in (2, 5, 32):
        assert replies(loaded, prompts(), ends=ENDS, max_new_tokens=NEW, batch_size=batch_size) == alone
    assert [generated(loaded, prompt) for prompt in prompts()] == alone


@pytest.mark.parametrize("family", ["gpt_oss_bf16", "llama4_text", "qwen3_moe"])
def test_other_attention_and_routers(tmp_path: Path, family: str) -> None:
    loaded = from_factory(tmp_path, family)
    together = replies(loaded, prompts(), ends=ENDS, max_new_tokens=NEW)
    assert together == [generated(loaded, prompt) for prompt in prompts()]


def test_sliding_windows_shorter_than_the_reply(tmp_path: Path) -> None:
    loaded = from_factory(tmp_path, "gpt_oss_bf16")
    loaded.model.config.sliding_window = 8
    together = replies(loaded, prompts(), ends=frozenset({2}), max_new_tokens=NEW, batch_size=4)
    alone = replies(loaded, prompts(), ends=frozenset({2}), max_new_tokens=NEW, batch_size=1)
    assert together == alone


def test_replies_stop_at_the_limit_and_at_the_last_position(build: Build) -> None:
    loaded = load_model(open_checkpoint(build("llama", max_position_embeddings=24)))
    never = frozenset({-1})
    found = replies(loaded, [[7] * 4, [8] * 20], ends=never, max_new_tokens=10)
    assert [len(reply) for reply in found] == [10, 4]
    for prompt in ([], [9] * 24):
        with pytest.raises(UsageError, match="prompt 2 has"):
            replies(loaded, [[7], prompt], ends=never)


def test_finished_counts_up_to_all(build: Build) -> None:
    loaded = load_model(open_checkpoint(build("llama")))
    told: list[int] = []
    replies(loaded, prompts(7), ends=ENDS, max_new_tokens=5, batch_size=3, finished=told.append)
    assert told == list(range(1, 8))
    assert replies(loaded, [], ends=ENDS) == []
