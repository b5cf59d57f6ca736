"""Figures of a walk from headers, counted here by hand; and what they decide."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
from walk_models import Families, sequences, walked

import surgery
from surgery.calibrate.batches import make_batches
from surgery.calibrate.budget import batch_bytes, estimate_walk, expert_share, host_share

SHAPES = [(3, 20), (2, 17)]
TOKENS = 60 + 34


def test_counted_parts(tmp_path: Path) -> None:
    """An FP8 DeepSeek-V3 folder: stored bytes where it is carried, decoded ones where it is computed."""
    checkpoint = surgery.open(factories.deepseek_v3(tmp_path / "m", 1))
    found = estimate_walk(checkpoint, SHAPES, device="cuda", dtype="bfloat16", memory_bytes=1 << 30)
    layers = [
        [ref for ref in checkpoint.tensors.values() if ref.info.layer == n and not ref.info.mtp]
        for n in range(3)
    ]
    dense = [sum(ref.numel for ref in refs if ref.info.role != "routed_expert") * 2 for refs in layers]
    embedding = 320 * 256 * 2
    assert found.layer_bytes == max(*dense, embedding)
    expert = 3 * 256 * 128
    stored = expert + 3 * 2 * 4  # codes and float32 scales
    assert found.kept_bytes == 8 * stored
    assert found.expert_bytes == 3 * (stored + 2 * expert)
    assert found.hidden_bytes == TOKENS * 256 * 2 and not found.hidden_on_disk
    assert (found.tokens, found.batch_tokens) == (TOKENS, 60)
    assert found.host_bytes == 2 * found.hidden_bytes + 2 * found.expert_bytes
    assert found.disk_bytes == 2 * found.hidden_bytes
    norms = 256 * 2
    once = sum(ref.nbytes for refs in layers for ref in refs)
    again = sum(ref.nbytes for refs in layers[1:] for ref in refs if ref.info.role != "routed_expert")
    assert found.read_bytes == once + again + embedding + norms  # the router of a pruned layer runs again
    parts = found.as_dict()["parts"]
    assert found.device_bytes == sum(parts.values()) - parts["hidden_states"]


def test_a_small_budget_goes_to_disk(tiny: Families) -> None:
    checkpoint = surgery.open(tiny("mixtral"))
    hidden = TOKENS * 64 * 4
    for memory, on_disk in ((4 * hidden, False), (4 * hidden - 2, True)):
        found = estimate_walk(checkpoint, SHAPES, device="cpu", dtype="float32", memory_bytes=memory)
        assert found.hidden_on_disk == on_disk == (2 * hidden > host_share(memory))
        assert found.disk_bytes == (4 if on_disk else 2) * hidden
        assert found.kept_bytes == min(expert_share(memory), 6 * 3 * 64 * 96 * 4)
        assert found.host_bytes == found.device_bytes + (0 if on_disk else 2 * hidden)


def test_the_walk_goes_to_disk_where_the_estimate_says(tiny: Families, tmp_path: Path) -> None:
    checkpoint = surgery.open(tiny("mixtral"))
    batches = make_batches(sequences((20, 20, 20, 17, 17)), 60)
    hidden = sum(rows * longest for rows, longest in (batch.shape for batch in batches)) * 64 * 4
    for memory in (4 * hidden, 4 * hidden - 2):
        folder = tmp_path / str(memory)
        folder.mkdir()
        shapes = [batch.shape for batch in batches]
        estimate = estimate_walk(checkpoint, shapes, device="cpu", dtype="float32", memory_bytes=memory)
        walked(checkpoint, batches, host_bytes=host_share(memory), folder=folder, snapshot_seconds=1e9)
        written = sum(path.stat().st_size for path in folder.iterdir())
        assert written == (2 * hidden if estimate.hidden_on_disk else 0)


@pytest.mark.parametrize(
    "family",
    ["deepseek_v2", "deepseek_v3", "gpt_oss", "llama", "llama4_text", "mixtral", "qwen2_moe", "gemma2"],
)
def test_activations_grow_with_tokens(tiny: Families, family: str) -> None:
    """It grows with the tokens and the itemsize, and holds six vectors of each token at least."""
    checkpoint = surgery.open(tiny(family))
    small, large = (batch_bytes(checkpoint, tokens, 4) for tokens in (100, 300))
    assert large == pytest.approx(3 * small, rel=0.05) and small >= 100 * 64 * 4 * 6
    assert batch_bytes(checkpoint, 100, 2) < small


def test_dense_models_have_no_experts_to_keep(tiny: Families) -> None:
    found = estimate_walk(
        surgery.open(tiny("llama")), SHAPES, device="cpu", dtype="bfloat16", memory_bytes=1 << 30
    )
    assert found.expert_bytes == found.kept_bytes == 0 and found.read_bytes > 0


def test_fused_experts_count_as_others(tiny: Families) -> None:
    found = estimate_walk(
        surgery.open(tiny("gpt_oss")), SHAPES, device="cuda", dtype="float32", memory_bytes=1 << 30
    )
    expert = (3 * 64 * 96 + 2 * 96 + 64) * 4
    assert found.kept_bytes == 6 * expert
