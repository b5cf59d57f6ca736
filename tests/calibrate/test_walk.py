"""The walk against transformers' own forward of the whole model, and how it holds what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from tiny_models import to_decoded
from walk_models import (
    CPU,
    Families,
    alone,
    distance,
    masked_routers,
    run,
    sequences,
    settings,
    walked,
    whole,
)

import surgery
from surgery.calibrate.batches import Batch, make_batches
from surgery.calibrate.walk import Walk, WalkSettings
from surgery.operators.experts.groups import Groups
from surgery.operators.experts.keep import ExpertShape, KeepList, apply_keep, expert_shape, keep_tensors
from surgery.stream.checkpoint import Checkpoint

MIXTURES = [
    "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4_text", "mixtral", "olmoe", "qwen2_moe",
    "qwen3_moe",
]  # fmt: skip
DENSE = ["gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"]
LENGTHS = (23, 23, 23, 14, 9)


@pytest.mark.parametrize("family", [*MIXTURES, *DENSE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_whole_model(tiny: Families, family: str, dtype: torch.dtype) -> None:
    checkpoint = surgery.open(tiny(family))
    batches = make_batches(sequences(LENGTHS), 3 * LENGTHS[0])
    assert [batch.lengths for batch in batches] == [LENGTHS[:3], LENGTHS[3:]]
    full, padded = walked(checkpoint, batches, dtype).logits()
    model = whole(checkpoint, dtype)
    reference = run(model, batches[0].ids)
    assert reference.std() > 0.01
    assert torch.equal(full, reference)
    rounding = 1e-5 if dtype is torch.float32 else 0.03
    for row, length in enumerate(batches[1].lengths):
        lone = run(model, batches[1].ids[row : row + 1, :length])
        assert distance(padded[row, :length], lone[0]) < rounding


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_checkpoints_with_a_prediction_layer(tmp_path: Path, ragged: bool, dtype: torch.dtype) -> None:
    folder = factories.deepseek_v3(tmp_path / "model", 5, ragged=ragged)
    checkpoint = surgery.open(folder)
    assert any(ref.info.mtp for ref in checkpoint.tensors.values())
    (batch,) = make_batches(sequences((11, 11)), 100)
    (logits,) = walked(checkpoint, [batch], dtype).logits()
    assert torch.equal(logits, run(whole(checkpoint, dtype), batch.ids))


def test_fp8_decoded_without_the_toolkit(tmp_path: Path) -> None:
    """The reference decodes block by block and loads by transformers alone."""
    folder = factories.deepseek_v3(tmp_path / "model", 5, shards=1, mtp=False)
    decoded = to_decoded(folder, tmp_path / "decoded")
    (batch,) = make_batches(sequences((19,)), 100)
    (logits,) = walked(surgery.open(folder), [batch]).logits()
    assert distance(logits, run(alone(decoded), batch.ids)) < 1e-5


def test_lazy_checkpoints(parents: dict[str, Path]) -> None:
    """A merge that was never written, walked: the logits of the merge in memory."""
    merged = surgery.merge.aoe(
        {name: surgery.open(parents[name], name) for name in ("base", "reasoner")},
        base="base",
        weights={"reasoner": 0.5},
    )
    (batch,) = make_batches(sequences((13, 13)), 100)
    (logits,) = walked(merged, [batch]).logits()
    assert torch.equal(logits, run(whole(merged), batch.ids))
    (base,) = walked(surgery.open(parents["base"]), [batch]).logits()
    assert distance(logits, base) > 0.01


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3"])
def test_budgets_do_not_change_bits(tiny: Families, tmp_path: Path, family: str) -> None:
    """Experts read again for every batch, and hidden states in mapped files."""
    checkpoint = surgery.open(tiny(family))
    batches = make_batches(sequences(LENGTHS), 40)
    free = [logits.clone() for logits in walked(checkpoint, batches).logits()]
    tight = walked(checkpoint, batches, room_bytes=0, host_bytes=0, folder=tmp_path, snapshot_seconds=1e9)
    assert {path.name for path in tmp_path.iterdir()} == {"hidden-now-0.bin", "hidden-next-0.bin"}
    assert all(torch.equal(*pair) for pair in zip(free, tight.logits(), strict=True))


def test_until_stops_in_front_of_a_layer(tiny: Families) -> None:
    """What is in hand then is what the layer gets in the whole model."""

    checkpoint = surgery.open(tiny("deepseek_v3"))
    (batch,) = make_batches(sequences((12, 12)), 100)
    walk = Walk(checkpoint, [batch], [], settings())
    walk.run(until=2)
    model = whole(checkpoint)
    seen: list[torch.Tensor] = []
    model.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, batch.ids)
    assert torch.equal(walk._now.get(0, CPU), seen[0])
    assert [row.layer for row in walk.report] == [0, 1]


def test_report_has_the_size_and_change_of_hidden_states(tiny: Families) -> None:
    """Root mean squares and relative changes by hooks, padding left out."""
    checkpoint = surgery.open(tiny("olmoe"))
    lengths = (21, 8)
    (batch,) = make_batches(sequences(lengths), 100)
    walk = walked(checkpoint, [batch])
    model = whole(checkpoint)
    states: list[list[torch.Tensor]] = [[] for _ in range(len(model.model.layers) + 1)]
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, args, n=number: states[n].append(args[0][0].double()))
    model.model.norm.register_forward_pre_hook(lambda _, args: states[-1].append(args[0][0].double()))
    for row, length in enumerate(lengths):
        run(model, batch.ids[row : row + 1, :length])
    flat = [torch.cat(each) for each in states]
    for number, row in enumerate(walk.report):
        before, after = flat[number], flat[number + 1]
        assert row.rms == pytest.approx(float(after.square().mean().sqrt()), rel=1e-5)
        assert row.change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)


def test_progress_counts_tokens_without_padding(tiny: Families) -> None:
    told: list[tuple[str, int, int]] = []
    batches = make_batches(sequences((10, 7)), 100)
    walked(surgery.open(tiny("qwen3")), batches, progress=lambda *row: told.append(row))
    assert told == [("walk", done, 34) for done in (0, 17, 34)]


class Noting:
    """A step that keeps the hidden states in front of the experts, and may hand on other tensors."""

    shape: ExpertShape

    def __init__(self, keep: dict[int, tuple[int, ...]] | None = None) -> None:
        self.keep = keep or {}
        self.seen: dict[int, list[torch.Tensor]] = {}
        self.experts = ()

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        if not self.keep:
            return checkpoint
        shape = expert_shape(checkpoint)
        return apply_keep(checkpoint, shape, KeepList(self.keep, Groups()), "prune", "test")

    def observe(self, layer: int, **_: Any) -> Any:
        self.layer = layer
        self.seen[layer] = []
        return self

    @contextmanager
    def watch(self, built: Any) -> Iterator[None]:
        norm = built.module.post_attention_layernorm
        handle = norm.register_forward_pre_hook(lambda _, args: self.seen[self.layer].append(args[0]))
        try:
            yield
        finally:
            handle.remove()

    def batch(self, batch: Batch) -> None:
        assert batch.domain == 0

    def finish(self, layer: int, refs: Any, replay: Any) -> Any:
        if not self.keep:
            return None
        return keep_tensors(refs, self.keep[layer], self.shape)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None:
        assert state == {}


@pytest.mark.parametrize("propagate", ["original", "changed"])
def test_several_steps_in_one_walk(tiny: Families, propagate: Any) -> None:
    """The second of three steps rewrites: what goes on, and what the third one sees, is by `propagate`."""
    checkpoint = surgery.open(tiny("mixtral"))
    keep = {0: (1, 2, 5), 1: (0, 3, 4)}
    steps = [Noting(), Noting(keep), Noting()]
    steps[1].shape = expert_shape(checkpoint)
    batches = make_batches(sequences((21, 21)), 21)
    Walk(checkpoint, batches, steps, settings(), propagate).run()
    model = whole(checkpoint)
    states: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for number in states:
        model.model.layers[number].post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, n=number: states[n].append(args[0])
        )
    with masked_routers(model, keep) if propagate == "changed" else nullcontext():
        for batch in batches:
            run(model, batch.ids)
    for step in steps:
        for number, seen in states.items():
            assert len(step.seen[number]) == len(batches)
            for found, reference in zip(step.seen[number], seen, strict=True):
                assert distance(found, reference) < 1e-5


def test_a_layer_that_is_done_holds_no_experts(tiny: Families) -> None:
    """What is kept for the next batch must not outlive its layer."""
    batches = make_batches(sequences((12, 12, 9)), 24)
    settings = WalkSettings(torch.device("cpu"), torch.float32, 1 << 30, 1 << 30)
    walk = Walk(surgery.open(tiny("mixtral")), batches, [], settings)
    walk.run()
    for layer in range(walk._models[0].num_layers):
        experts = walk._models[0].experts_of(layer)
        assert experts is not None and "surgery_experts" not in experts.__dict__
