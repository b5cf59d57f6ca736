"""Keep-lists: what is read, what is refused, and what else a number of experts must fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import factories
import pytest
from folders import change_config, change_shards
from walk_models import Families

import surgery
from surgery.errors import CheckpointError, PlanError, UsageError
from surgery.operators.experts.groups import Groups
from surgery.operators.experts.keep import (
    KeepList,
    apply_keep,
    check_keep,
    expert_shape,
    read_keep_list,
)

LISTS: dict[str, Any] = {"1": [0, 3], "2": [5, 1]}
DOCUMENT = {"kind": "surgery-keep-list", "schema": 1, "n_group": 1, "topk_group": 1, "layers": LISTS}


def test_a_list_reads_back(tmp_path: Path) -> None:
    keep = KeepList({3: (4, 1), 11: (0, 2)}, Groups(2, 1))
    (tmp_path / "k.json").write_text(keep.dump())
    assert read_keep_list(tmp_path / "k.json") == keep and keep.count == 2


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"schema": 2},
        {"layers": {}},
        {"layers": None},
        {"layers": [[0, 1]]},
        {"layers": {"one": [0, 1]}},
        {"layers": {"1": 3}},
        {"layers": {"1": ["0", "1"]}},
        {"layers": {"1": [0.0, 1.0]}},
        {"layers": {"1": [True, False]}},
        {"n_group": None},
        {"n_group": "one"},
        {"n_group": 0},
        {"topk_group": -1},
        {"n_group": 1.0},
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "k.json"
    path.write_text(json.dumps(DOCUMENT | change))
    with pytest.raises(UsageError) as caught:
        read_keep_list(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_files_that_hold_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "k.json").write_text(text)
    with pytest.raises(UsageError, match=r"k\.json"):
        read_keep_list(tmp_path / "k.json")


@pytest.mark.parametrize(
    ("layers", "groups", "told"),
    [
        ({1: (0, 1)}, Groups(), "1 layers"),
        ({1: (0, 1), 2: (0, 1), 3: (0, 1)}, Groups(), "3 layers"),
        ({0: (0, 1), 2: (0, 1)}, Groups(), "layers"),
        ({1: (0, 0), 2: (0, 1)}, Groups(), "layer 1"),
        ({1: (0, 1), 2: (0, 8)}, Groups(), "layer 2"),
        ({1: (0, 1), 2: (-1, 1)}, Groups(), "layer 2"),
        ({1: (0, 1, 2), 2: (0, 1)}, Groups(), "layer 2 keeps 2"),
        ({1: (0,), 2: (1,)}, Groups(), "every token 2 experts"),
        ({1: tuple(range(8)), 2: tuple(range(8))}, Groups(), "nothing to drop"),
        ({1: (), 2: ()}, Groups(), "0"),
        ({1: (0, 1, 2), 2: (0, 1, 2)}, Groups(2, 1), "3 experts in 2 groups"),
        ({1: (0, 1), 2: (0, 1)}, Groups(2, 1), "2 experts in 2 groups"),
        ({1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}, Groups(2, 3), "3 of them"),
        ({1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}, Groups(4, 4), "groups of 1 are too small"),
    ],
)
def test_lists_that_do_not_fit_the_model(
    tiny: Families, layers: dict[int, tuple[int, ...]], groups: Groups, told: str
) -> None:
    checkpoint = surgery.open(tiny("deepseek_v3"))
    shape = expert_shape(checkpoint)
    with pytest.raises(PlanError, match=told):
        check_keep(shape, KeepList(layers, groups))
    with pytest.raises(PlanError, match=told):
        apply_keep(checkpoint, shape, KeepList(layers, groups), "prune", "test")


def test_shapes_of_families(tiny: Families) -> None:
    for family, (layers, count, top_k) in {
        "mixtral": ((0, 1), 6, 2),
        "glm4_moe": ((1, 2), 6, 2),
        "llama4_text": ((0, 1), 4, 1),
        "gpt_oss": ((0, 1), 6, 2),
    }.items():
        shape = expert_shape(surgery.open(tiny(family)))
        assert (shape.layers, shape.count, shape.top_k) == (layers, count, top_k)
        assert not shape.groups.limited
    assert expert_shape(surgery.open(tiny("deepseek_v3"))).groups == Groups(2, 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_models_without_experts(tiny: Families, family: str) -> None:
    with pytest.raises(CheckpointError, match="no routed experts"):
        expert_shape(surgery.open(tiny(family)))


def test_config_and_tensors_that_disagree(tmp_path: Path) -> None:
    folder = factories.qwen3_moe(tmp_path / "model", 1)
    change_config(folder, num_experts=9)
    with pytest.raises(CheckpointError, match=r"8 experts, config\.json says 9"):
        expert_shape(surgery.open(folder))
    change_config(folder, num_experts=8, num_experts_per_tok=None)
    with pytest.raises(CheckpointError, match="num_experts_per_tok"):
        expert_shape(surgery.open(folder))


def test_an_expert_that_is_not_there(tmp_path: Path) -> None:
    folder = factories.qwen3_moe(tmp_path / "model", 1)
    change_shards(
        folder, lambda t: {name: each for name, each in t.items() if ".1.mlp.experts.4." not in name}
    )
    with pytest.raises(CheckpointError, match=r"layer 1.*7 experts"):
        expert_shape(surgery.open(folder))


def test_greedy_deepseek_v2_has_no_groups(tiny: Families, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("deepseek_v2"), tmp_path / "model"))
    assert expert_shape(surgery.open(folder)).groups == Groups(2, 1)
    change_config(folder, topk_method="greedy")
    assert expert_shape(surgery.open(folder)).groups == Groups()


def test_pruning_twice(tiny: Families) -> None:
    """A lazy result is pruned again: the numbers are those of the first result."""
    checkpoint = surgery.open(tiny("deepseek_v3"))
    once = surgery.experts.drop(checkpoint, keep_list=_list(tiny, {"1": [7, 1, 2, 4], "2": [3, 0, 5, 6]}))
    twice = surgery.experts.drop(once, keep_list=_list(tiny, {"1": [3, 0], "2": [1, 2]}))
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    for layer, number, original in ((1, 0, 4), (1, 1, 7), (2, 0, 0), (2, 1, 5)):
        new = twice.tensors[name.format(layer, number)].read()
        assert new.equal(checkpoint.tensors[name.format(layer, original)].read())
    assert twice.config["n_routed_experts"] == 2
    rows = twice.tensors["model.layers.1.mlp.gate.weight"].read()
    assert rows.equal(checkpoint.tensors["model.layers.1.mlp.gate.weight"].read()[[4, 7]])
    bias = twice.tensors["model.layers.2.mlp.gate.e_score_correction_bias"].read()
    assert bias.flatten().equal(
        checkpoint.tensors["model.layers.2.mlp.gate.e_score_correction_bias"].read().flatten()[[0, 5]]
    )


def _list(tiny: Families, layers: dict[str, list[int]]) -> str:
    folder = tiny("deepseek_v3").parent / "lists"
    folder.mkdir(exist_ok=True)
    path = folder / f"{abs(hash(str(layers)))}.json"
    path.write_text(json.dumps({**DOCUMENT, "layers": layers}))
    return str(path)
