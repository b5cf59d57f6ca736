"""Measuring through the walk gives the figures of the model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from walk_models import Families, run, sequences, whole

import surgery
from surgery.errors import UsageError
from surgery.evaluate.run import evaluate
from surgery.evaluate.streamed import stream_model

SENTENCE = "The quick brown fox jumps over the lazy dog. "


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "llama"])
def test_logits_of_every_window(tiny: Families, family: str, tmp_path: Path) -> None:
    checkpoint = surgery.open(tiny(family))
    windows = [ids for _, ids in sequences((30, 30, 30, 11, 30, 2))]
    cpu = torch.device("cpu")
    streamed = stream_model(
        checkpoint, windows, device=cpu, dtype=torch.float32, memory_bytes=1 << 28, folder=tmp_path
    )
    model = whole(checkpoint)
    found = list(streamed.logits())
    assert [len(each) for each in found] == [len(ids) - 1 for ids in windows]
    for ids, logits in zip(windows, found, strict=True):
        assert torch.allclose(logits, run(model, torch.tensor([ids]))[0, :-1], rtol=1e-4, atol=1e-5)
    assert streamed.left_out == ()


def test_figures_of_the_model_in_memory(tiny: Families, tmp_path: Path) -> None:
    """Perplexity and divergence from a parent, documents that fill no window included."""
    text = tmp_path / "text.txt"
    text.write_text(SENTENCE * 9)
    models = {"a": tiny("qwen3_moe"), "b": tiny("qwen3_moe", seed=1)}
    rows = [
        evaluate(models, text=text, parent="a", context=48, streamed=streamed).rows
        for streamed in (False, True)
    ]
    for memory, walk in zip(*rows, strict=True):
        assert memory.perplexity is not None and walk.perplexity is not None
        assert walk.perplexity.value == pytest.approx(memory.perplexity.value, rel=1e-5)
        assert walk.perplexity.tokens == memory.perplexity.tokens
        if memory.divergence is not None:
            assert walk.divergence is not None and memory.divergence.kl.value > 0.01
            assert walk.divergence.kl.value == pytest.approx(memory.divergence.kl.value, rel=1e-4)
    assert rows[1][1].divergence is not None


def test_replies_need_the_whole_model(tiny: Families, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="whole model"):
        evaluate({"a": tiny("llama")}, tasks=tmp_path / "p.jsonl", streamed=True)
