"""Trained models: the figures that their makers measured, before FP8 rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.evaluate.run import evaluate

ZOO = Path(__file__).parents[2].parent / "shared" / "zoo"

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(not ZOO.is_dir(), reason="../shared/zoo is not there"),
]


def test_one_parent_answers_at_once_and_the_other_reasons() -> None:
    found = evaluate(
        [ZOO / "nano-terse", ZOO / "nano-deliberate"],
        tasks=ZOO / "data" / "reasoning-test.jsonl",
        limit=20,
    )
    terse, deliberate = (row.tasks for row in found.rows)
    assert terse is not None and deliberate is not None
    assert terse.accuracy.low < 0.417 < terse.accuracy.high
    assert deliberate.accuracy.low < 0.893 < deliberate.accuracy.high
    assert (terse.tagged.value, deliberate.tagged.value) == (0.0, 1.0)
    assert terse.reply_tokens.value == pytest.approx(21, abs=3)
    assert deliberate.reply_tokens.value == pytest.approx(161, abs=16)
    assert terse.cut_off.count == deliberate.cut_off.count == 0


def test_perplexity_of_the_first_rows() -> None:
    text = ZOO / "data" / "math-valid.jsonl"
    found = evaluate([ZOO / "nano-base"], text=text, context=512, max_windows=24)
    measured = found.rows[0].perplexity
    assert measured is not None
    assert measured.value == pytest.approx(1.795, abs=0.0005)
    assert (measured.tokens, measured.windows) == (24 * 511, 24)
