"""Every criterion against its formula, read out of a walk, with one domain and with two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import torch
from expert_sums import naive_sums
from folders import file_hashes, opaque_experts, strict_manifest
from walk_models import DEMOS, Families, alone, demos, experts_of, masked_routers, run

import surgery
from surgery.calibrate.statistics import FIELDS, read_statistics
from surgery.calibrate.tokenizer import load_tokenizer
from surgery.errors import CheckpointError, PlanError
from surgery.operators.experts.criterion import Criterion
from surgery.recipe.table import operator_class

Row = Mapping[str, float]
BY_HAND: dict[str, Callable[[Row], float]] = {
    "experts.easy_ep": lambda e: e["gate_norm_token"],
    "experts.reap": lambda e: e["gate_norm"] / e["count"] if e["count"] else 0.0,
    "experts.frequency": lambda e: e["count"],
    "experts.gating": lambda e: e["gate"],
    "experts.ean": lambda e: e["norm"],
    "experts.man": lambda e: e["norm"] / e["count"] if e["count"] else 0.0,
}
FAMILIES = ["deepseek_v3", "qwen3_moe", "mixtral"]


def by_hand(op: str, table: Any) -> list[float]:
    """[experts] from [domains, fields, experts]: each domain's scores over their sum, averaged."""
    each = [[BY_HAND[op](dict(zip(FIELDS, column, strict=True))) for column in domain.T] for domain in table]
    if len(each) == 1:
        return each[0]
    shares = [[score / sum(scores) for score in scores] for scores in each]
    return [sum(column) / len(shares) for column in zip(*shares, strict=True)]


def ids_of(folder: Path, texts: Sequence[str], domain: int) -> list[tuple[int, list[int]]]:
    tokenizer = load_tokenizer(surgery.open(folder))
    return [(domain, tokenizer.document(f"{text} 0", ended=True)) for text in texts]


def prune(folder: Path, out: Path, op: str, **params: Any) -> dict[str, Any]:
    surgery.run({"parents": {"model": str(folder)}, "steps": [{"op": op, **params}]}, out)
    return strict_manifest(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_criteria_by_the_formulas(tiny: Families, tmp_path: Path, family: str) -> None:
    """A walk with one domain, then every criterion from its statistics; kept are the best three."""
    folder = tiny(family)
    data = ids_of(folder, DEMOS, 0)
    reference = naive_sums(folder, family, data)
    first = prune(
        folder, tmp_path / "walk", "experts.easy_ep", keep=3, calibration=str(demos(tmp_path / "d.jsonl"))
    )
    manifests = {"experts.easy_ep": first} | {
        op: prune(folder, tmp_path / op, op, keep=3, statistics=str(tmp_path / "walk/surgery_experts.json"))
        for op in BY_HAND if op != "experts.easy_ep"
    }  # fmt: skip
    for op, manifest in manifests.items():
        for row in manifest["measurements"][-1]["layers"]:
            scores = by_hand(op, reference[row["layer"]])
            assert row["scores"] == pytest.approx(scores, rel=2e-5), op
            ranked = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))
            assert row["kept"] == sorted(ranked[:3])
            assert row["load"] == reference[row["layer"]][0, 0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_domains_weigh_the_same(tiny: Families, tmp_path: Path, family: str) -> None:
    """A domain with five times the tokens counts no more than the other."""
    folder = tiny(family)
    files = {
        "prose": demos(tmp_path / "p.jsonl", DEMOS[:3] * 5),
        "code": demos(tmp_path / "c.jsonl", DEMOS[3:]),
    }
    data = [*ids_of(folder, DEMOS[:3] * 5, 0), *ids_of(folder, DEMOS[3:], 1)]
    reference = naive_sums(folder, family, data, 2)
    calibration = {name: str(path) for name, path in files.items()}
    manifest = prune(folder, tmp_path / "out", "experts.easy_ep", keep=3, calibration=calibration)
    found = manifest["measurements"][-1]
    assert found["domains"] == ["prose", "code"]
    common = total = 0
    for row in found["layers"]:
        table = reference[row["layer"]]
        assert row["scores"] == pytest.approx(by_hand("experts.easy_ep", table), rel=2e-5)
        assert sum(row["scores"]) == pytest.approx(1)
        lists = [set(np.argsort(-table[domain, 6])[:3].tolist()) for domain in (0, 1)]
        common, total = common + len(lists[0] & lists[1]), total + 3
    assert found["overlap"] == [{"domains": ["prose", "code"], "share": pytest.approx(common / total)}]


def test_one_walk_serves_every_criterion_and_ratio(tiny: Families, tmp_path: Path) -> None:
    """Statistics of one walk give what fresh walks give."""
    folder = tiny("qwen3_moe")
    data = str(demos(tmp_path / "d.jsonl"))
    prune(folder, tmp_path / "first", "experts.frequency", keep=5, calibration=data)
    for op, keep in (("experts.easy_ep", 3), ("experts.reap", 0.5), ("experts.man", 2)):
        prune(folder, tmp_path / f"{op}-walk", op, keep=keep, calibration=data)
        statistics = str(tmp_path / "first" / "surgery_experts.json")
        prune(folder, tmp_path / f"{op}-read", op, keep=keep, statistics=statistics)
        walked, read = (file_hashes(tmp_path / f"{op}-{how}") for how in ("walk", "read"))
        for name in ("model.safetensors", "config.json", "surgery_keep.json", "surgery_experts.json"):
            assert walked[name] == read[name], (op, name)


def test_statistics_of_another_model_are_refused(tiny: Families, tmp_path: Path) -> None:
    data = str(demos(tmp_path / "d.jsonl"))
    prune(tiny("qwen3_moe"), tmp_path / "first", "experts.easy_ep", keep=3, calibration=data)
    statistics = str(tmp_path / "first" / "surgery_experts.json")
    for folder in (tiny("qwen3_moe", seed=1), tiny("mixtral"), tmp_path / "first"):
        with pytest.raises(PlanError, match="another model"):
            prune(folder, tmp_path / "out", "experts.reap", keep=2, statistics=statistics)
    assert not (tmp_path / "out").exists()


def test_statistics_behind_pruned_layers_are_refused(tiny: Families, tmp_path: Path) -> None:
    folder, data = tiny("qwen3_moe"), str(demos(tmp_path / "d.jsonl"))
    prune(folder, tmp_path / "first", "experts.easy_ep", keep=3, calibration=data, propagate="changed")
    with pytest.raises(PlanError, match="behind pruned layers"):
        prune(
            folder, tmp_path / "out", "experts.reap", keep=2,
            statistics=str(tmp_path / "first" / "surgery_experts.json"),
        )  # fmt: skip


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_changed_layers_are_what_later_layers_see(tiny: Families, tmp_path: Path, family: str) -> None:
    """`propagate: changed`: the second layer's sums are those of the model with its first layer pruned."""
    folder = tiny(family)
    data = str(demos(tmp_path / "d.jsonl"))
    original = prune(folder, tmp_path / "o", "experts.easy_ep", keep=3, calibration=data)
    changed = prune(folder, tmp_path / "c", "experts.easy_ep", keep=3, calibration=data, propagate="changed")
    one, two = (m["measurements"][-1]["layers"] for m in (original, changed))
    assert one[0] == two[0] and one[1]["scores"] != two[1]["scores"]
    model = alone(folder)
    layer = two[1]["layer"]
    counts = np.zeros(len(two[1]["load"]))
    experts_of(model.model.layers[layer]).register_forward_pre_hook(
        lambda _, args: np.add.at(counts, args[1].numpy().reshape(-1), 1)
    )
    with masked_routers(model, {two[0]["layer"]: two[0]["kept"]}):
        for _, ids in ids_of(folder, DEMOS, 0):
            run(model, torch.tensor([ids]))
    assert counts.tolist() == two[1]["load"]


def test_load_after_is_that_of_the_pruned_layer(tiny: Families, tmp_path: Path) -> None:
    """Layer by layer on the unpruned model's hidden states, by hooks on the model with one router masked."""
    folder = tiny("qwen3_moe")
    manifest = prune(
        folder, tmp_path / "o", "experts.easy_ep", keep=3, calibration=str(demos(tmp_path / "d.jsonl"))
    )
    for row in manifest["measurements"][-1]["layers"]:
        model = alone(folder)
        counts = np.zeros(6)
        experts_of(model.model.layers[row["layer"]]).register_forward_pre_hook(
            lambda _, args, counts=counts: np.add.at(counts, args[1].numpy().reshape(-1), 1)
        )
        with masked_routers(model, {row["layer"]: row["kept"]}):
            for _, ids in ids_of(folder, DEMOS, 0):
                run(model, torch.tensor([ids]))
        assert counts[row["kept"]].tolist() == row["load_after"]
        assert counts.sum() == sum(row["load_after"])


def test_idle_experts_are_reported(tiny: Families, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", num_experts=24)
    data = str(demos(tmp_path / "d.jsonl", ("ab",)))
    manifest = prune(folder, tmp_path / "out", "experts.easy_ep", keep=12, calibration=data)
    (event,) = [event for event in manifest["events"] if event["kind"] == "idle experts"]
    statistics = read_statistics(tmp_path / "out" / "surgery_experts.json")
    idle = sum(int((statistics.of(layer, "count") == 0).sum()) for layer in statistics.layers)
    assert idle > 0 and f"{idle} experts" in event["message"]


def test_idle_domains_and_experts_score_nothing() -> None:
    """No token, no score, and no division by zero."""
    for op in BY_HAND:
        criterion: Any = operator_class(op).model_validate({"keep": 2, "statistics": "s"})
        table = np.zeros((2, len(FIELDS), 4))
        assert criterion.layer_scores(table).tolist() == [0.0] * 4
        table[0, :, 1] = 2.0
        scores = criterion.layer_scores(table)
        assert scores[1] > 0 and scores[[0, 2, 3]].tolist() == [0.0] * 3 and np.isfinite(scores).all()


def test_counts_from_forms_that_are_only_copied_cannot_be_taken(tmp_path: Path) -> None:
    folder = opaque_experts(factories.qwen3_moe(tmp_path / "model", 2))
    with pytest.raises(CheckpointError, match="hqq"):
        prune(
            folder, tmp_path / "out", "experts.easy_ep", keep=2, calibration=str(demos(tmp_path / "d.jsonl"))
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "model"]


def test_mxfp4_experts_score_as_their_values(tmp_path: Path) -> None:
    """They fit bf16 exactly, so a copy in it gives the same sums, bit for bit."""
    folder = factories.gpt_oss_mxfp4(tmp_path / "model", 2)
    wide = surgery.open(folder).save(tmp_path / "wide", format="bf16").folder
    found = []
    for each in (folder, wide):
        calibration = str(demos(tmp_path / "d.jsonl"))
        manifest = prune(
            each, tmp_path / f"{each.name}-out", "experts.easy_ep", keep=2, calibration=calibration
        )
        found.append((manifest["measurements"][-1], manifest["steps"][-1]["decision"]["layers"]))
    assert found[0] == found[1]


def test_experts_that_run_all_at_once_cannot_be_observed(tiny: Families, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="in one operation"):
        prune(
            tiny("llama4_text"), tmp_path / "out", "experts.easy_ep", keep=2,
            calibration=str(demos(tmp_path / "d.jsonl")),
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_both_and_neither_source_are_refused() -> None:
    for params in ({}, {"calibration": "a", "statistics": "b"}, {"statistics": "b", "propagate": "changed"}):
        with pytest.raises(ValueError, match=r"calibration|propagate"):
            operator_class("experts.easy_ep").model_validate({"keep": 2, **params})
    assert issubclass(operator_class("experts.easy_ep"), Criterion)
