"""Batches: every sequence once, within the limit, little padding."""

from __future__ import annotations

import random

import pytest
import torch

from surgery.calibrate.batches import make_batches


@pytest.mark.parametrize("limit", [1, 7, 64, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_sequence_once(limit: int, seed: int) -> None:
    draw = random.Random(seed)
    data = [
        (draw.randrange(3), [draw.randrange(1, 900) for _ in range(draw.randrange(1, 40))])
        for _ in range(draw.randrange(1, 30))
    ]
    batches = make_batches(data, limit, pad=901)
    found = []
    for batch in batches:
        rows, longest = batch.shape
        assert rows * longest <= limit or rows == 1
        assert longest == max(batch.lengths) and batch.tokens == sum(batch.lengths)
        mask = batch.valid(torch.device("cpu"))
        if mask is None:
            assert set(batch.lengths) == {longest}
            mask = torch.ones(rows * longest, dtype=torch.bool)
        assert int(mask.sum()) == batch.tokens
        assert torch.equal(mask.view(rows, longest), batch.ids != 901)
        found += [
            (batch.domain, tuple(ids[:length]))
            for ids, length in zip(batch.ids.tolist(), batch.lengths, strict=True)
        ]
    assert sorted(found) == sorted((domain, tuple(ids)) for domain, ids in data)


def test_domains_do_not_share_a_batch_and_come_in_order() -> None:
    batches = make_batches([(1, [1, 2]), (0, [3]), (1, [4]), (0, [5, 6, 7])], 100)
    assert [(batch.domain, batch.lengths) for batch in batches] == [(0, (3, 1)), (1, (2, 1))]


def test_equal_lengths_keep_their_order() -> None:
    """A file gives one layout."""
    (batch,) = make_batches([(0, [1, 1]), (0, [2, 2]), (0, [3, 3])], 100)
    assert batch.ids[:, 0].tolist() == [1, 2, 3]


def test_nothing_gives_no_batches() -> None:
    assert make_batches([], 10) == ()
