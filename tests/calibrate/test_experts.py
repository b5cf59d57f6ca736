"""Routed experts against a loop over tokens, and the order of what is sorted for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from walk_models import CPU, Families, distance, experts_of, whole

import surgery
from surgery.calibrate.experts import ExpertBank, RoutedExperts, Routing, sort_routing, sum_in_order
from surgery.calibrate.layers import LayeredModel
from surgery.calibrate.ranks import Ranks
from surgery.calibrate.state import by_expert


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("tokens", "choices", "experts"), [(1, 1, 1), (17, 3, 5), (40, 2, 64), (3, 4, 4)])
def test_routing_is_sorted_by_expert_rank_and_token(
    tokens: int, choices: int, experts: int, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)])
    valid = torch.rand(tokens, generator=generator) < 0.6 if padded else None
    routing = sort_routing(index, torch.rand(tokens, choices, generator=generator), experts, valid)
    expected = sorted(
        (int(index[token, rank]), rank, token)
        for token in range(tokens) if valid is None or valid[token]
        for rank in range(choices)
    )  # fmt: skip
    assert routing.order.tolist() == [rank * tokens + token for _, rank, token in expected]
    assert routing.counts == [sum(e == expert for e, _, _ in expected) for expert in range(experts)]
    parts = {expert: routing.order[place] for expert, place in routing.places()}
    assert list(parts) == sorted({expert for expert, _, _ in expected})
    assert sum(len(part) for part in parts.values()) == len(expected)


class Watching:
    """Remembers what experts were run on."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.out: torch.Tensor | None = None

    def routed(self, routing: Routing) -> None:
        self.seen.clear()

    def expert(self, expert: int, place: slice, *seen: torch.Tensor) -> None:
        inputs, inner, out = seen
        assert inputs.shape[0] == inner.shape[0] == out.shape[0] == place.stop - place.start
        self.seen.append((expert, place.stop - place.start))

    def combined(self, routing: Routing, out: torch.Tensor) -> None:
        self.out = out


def bank(folder: Path, layer: int, room: int = 1 << 30) -> ExpertBank:
    checkpoint = surgery.open(folder)
    model = LayeredModel(checkpoint, CPU, torch.float32)
    assert checkpoint.architecture.experts is not None
    module = model.experts_of(layer)
    return ExpertBank(
        module, by_expert(model.refs(layer)), checkpoint.architecture.experts, CPU, torch.float32, room
    )


def inputs(tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
    return torch.randn(tokens, 64, generator=generator), index, torch.rand(tokens, 2, generator=generator)


def test_outputs_by_a_loop_over_tokens(tiny: Families) -> None:
    folder = tiny("qwen3_moe")
    hidden, index, gates = inputs(29, 6)
    found = RoutedExperts(bank(folder, 1))(hidden, index, gates)
    stored = load_file(folder / "model.safetensors")
    expected = torch.zeros(29, 64, dtype=torch.float64)
    for token in range(29):
        for expert, gate in zip(index[token].tolist(), gates[token].double(), strict=True):
            where = f"model.layers.1.mlp.experts.{expert}"
            w = {n: stored[f"{where}.{n}_proj.weight"].double() for n in ("gate", "up", "down")}
            x = hidden[token].double()
            inner = w["gate"] @ x
            expected[token] += gate * (w["down"] @ (inner * torch.sigmoid(inner) * (w["up"] @ x)))
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "deepseek_v2"])
def test_outputs_of_the_whole_model(tiny: Families, family: str) -> None:
    """Biases and interleaved rows included, bit for bit."""
    folder = tiny(family)
    reference = experts_of(whole(folder).model.layers[1])
    hidden, index, gates = inputs(31, 6)
    with torch.no_grad():
        assert torch.equal(
            RoutedExperts(bank(folder, 1))(hidden, index, gates), reference(hidden, index, gates)
        )


def test_padding_goes_through_no_expert(tiny: Families) -> None:
    hidden, index, gates = inputs(20, 6)
    hidden[13:] = float("nan")
    valid = torch.arange(20) < 13
    watching = Watching()
    out = RoutedExperts(bank(tiny("olmoe"), 0), [watching], valid=valid)(hidden, index, gates)
    alone = RoutedExperts(bank(tiny("olmoe"), 0))(hidden[:13], index[:13], gates[:13])
    assert torch.equal(out[:13], alone) and not out[13:].any()
    assert sum(count for _, count in watching.seen) == 26 and watching.out is out


def test_room_bounds_what_is_kept(tiny: Families, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, index, gates = inputs(50, 6)
    one = 3 * 64 * 96 * 4
    results = []
    for room, kept in ((0, 0), (one - 1, 0), (2 * one, 2), (1 << 30, 6)):
        held = bank(tiny("mixtral"), 0, room)
        decoded: list[int] = []
        fetch = held._decode
        monkeypatch.setattr(
            held, "_decode", lambda expert, f=fetch, d=decoded: (d.append(expert), f(expert))[1]
        )
        results += [RoutedExperts(held)(hidden, index, gates) for _ in range(2)]
        assert len(held._decoded) == kept and held._used <= room
        assert len(decoded) == 6 + (6 - kept)  # what is not kept is read again
    assert all(torch.equal(each, results[0]) for each in results)


def test_counting_runs_no_expert(tiny: Families, monkeypatch: pytest.MonkeyPatch) -> None:
    held = bank(tiny("mixtral"), 0)
    monkeypatch.setattr(held, "_decode", lambda expert: pytest.fail("an expert was read"))
    watching = Watching()
    hidden, index, gates = inputs(9, 6)
    out = RoutedExperts(held, [watching], count_only=True)(hidden, index, gates)
    assert not out.any() and watching.seen == []


def test_ranks_split_the_experts(tiny: Families) -> None:
    """Two ranks in turn, their exchange done here: each runs its own experts, the sum is that of one."""
    hidden, index, gates = inputs(33, 6)
    single = RoutedExperts(bank(tiny("mixtral"), 0))(hidden, index, gates)
    parts: list[torch.Tensor] = []

    class Noting(Ranks):
        def add_up(self, tensor: torch.Tensor) -> None:
            parts.append(tensor.clone())

    experts = []
    for rank in range(2):
        watching = Watching()
        RoutedExperts(bank(tiny("mixtral"), 0), [watching], Noting(rank, 2))(hidden, index, gates)
        experts.append({expert % 2 for expert, _ in watching.seen})
    assert experts == [{0}, {1}]
    total = parts[0] + parts[1]

    class Giving(Ranks):
        def add_up(self, tensor: torch.Tensor) -> None:
            tensor.copy_(total)

    found: Any = RoutedExperts(bank(tiny("mixtral"), 0), ranks=Giving(1, 2))(hidden, index, gates)
    assert torch.equal(found, single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [True, False])
def test_gathered_outputs_sum_to_the_same_bits(dtype: torch.dtype, padded: bool) -> None:
    """Adding expert by expert, and adding a token's outputs afterwards, round alike."""
    generator = torch.Generator().manual_seed(5)
    index = torch.rand(23, 7, generator=generator).topk(3).indices
    valid = torch.rand(23, generator=generator) < 0.7 if padded else None
    routing = sort_routing(index, torch.rand(23, 3, generator=generator), 7, valid)
    weighted = torch.randn(routing.num_entries, 5, generator=generator).to(dtype)
    expected = torch.zeros(23, 5, dtype=dtype)
    for _, place in routing.places():
        expected.index_add_(0, routing.tokens[place], weighted[place])
    assert torch.equal(sum_in_order(weighted, routing, torch.zeros(23, 5, dtype=dtype)), expected)
