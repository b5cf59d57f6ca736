"""Targets made of names and patterns match exactly the wanted modules, by brute force over all names."""

from __future__ import annotations

import random
import re

import pytest

from surgery.stream.module_patterns import describe


def matches(targets: list[str], name: str) -> bool:
    return any(
        re.match(target.removeprefix("re:"), name) is not None if target.startswith("re:") else target == name
        for target in targets
    )


def deepseek(prefix: str = "model", layers: int = 6, experts: int = 12) -> list[str]:
    names = ["lm_head"]
    for layer in range(layers):
        front = f"{prefix}.layers.{layer}"
        names += [f"{front}.self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "o_proj")]
        if layer == 0:
            names += [f"{front}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
            continue
        names.append(f"{front}.mlp.gate")
        for place in ("shared_experts", *(f"experts.{expert}" for expert in range(experts))):
            names += [f"{front}.mlp.{place}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    return names


def exact(wanted: set[str], names: list[str]) -> list[str]:
    targets = describe(
        [name for name in names if name in wanted], [name for name in names if name not in wanted]
    )
    assert {name for name in names if matches(targets, name)} == wanted
    return targets


def test_all_routed_experts_are_one_pattern() -> None:
    names = deepseek(layers=62, experts=64)
    assert exact({name for name in names if ".experts." in name}, names) == [
        r"re:.*\blayers\.\d+\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$"
    ]


def test_layers_are_listed_where_not_all_are_wanted_and_the_rest_by_name() -> None:
    names = deepseek()
    wanted = {name for name in names if ".experts." in name and ".layers.1." not in name}
    wanted |= {"model.layers.1.mlp.experts.3.up_proj", "lm_head"}
    assert exact(wanted, names) == [
        r"re:.*\blayers\.(2|3|4|5)\.mlp\.experts\.\d+\.(up_proj|gate_proj|down_proj)$",
        "lm_head",
        "model.layers.1.mlp.experts.3.up_proj",
    ]


def test_a_pattern_does_not_reach_into_another_tower() -> None:
    names = deepseek("language_model.model") + deepseek("vision_tower") + deepseek("sub_layers_model")
    for tower in ("language_model.model", "vision_tower"):
        exact({name for name in names if name.startswith(tower)} - {"lm_head"}, list(dict.fromkeys(names)))


def test_names_without_numbers_and_with_special_characters_stay_themselves() -> None:
    names = ["a+b.layers.0.x", "a+b.layers.1.x", "aab.layers.0.y", "lm_head", "proj.0", "proj.1"]
    for wanted in ({"a+b.layers.0.x", "a+b.layers.1.x"}, {"proj.0", "proj.1"}, {"lm_head"}, set()):
        exact(wanted, names)


@pytest.mark.parametrize("seed", range(25))
def test_any_choice_of_modules_is_matched_exactly(seed: int) -> None:
    drawn = random.Random(seed)
    names = deepseek(layers=4, experts=3) + deepseek("other.model", layers=2, experts=2)[1:]
    chance = drawn.choice([0.05, 0.5, 0.95])
    wanted = {name for name in names if drawn.random() < chance}
    if seed % 2:
        wanted |= {name for name in names if "layers.1." in name}
    exact(wanted, names)


def test_the_description_of_a_large_model_is_short() -> None:
    names = deepseek(layers=62, experts=256)
    wanted = {name for name in names if ".experts." in name and int(name.split(".")[2]) < 10}
    targets = exact(wanted, names)
    assert sum(map(len, targets)) < 200
