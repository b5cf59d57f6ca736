"""Entries of schemes: few, readable, and matching exactly what they are for."""

from __future__ import annotations

import random
import re

import pytest
import yaml

from surgery.recipe.entries import (
    UnitScheme,
    layers_in_words,
    numbers_pattern,
    recipe_text,
    scheme_entries,
)

ROLES = {
    "attention": ("self_attn.q_proj", "self_attn.o_proj"),
    "routed_expert": tuple(f"mlp.experts.{e}.{p}_proj" for e in range(12) for p in ("up", "down")),
    "shared_expert": ("mlp.shared_experts.up_proj",),
}


def unit(layer: int, role: str, scheme: str, prefix: str = "model.") -> UnitScheme:
    names = tuple(f"{prefix}layers.{layer}.{module}.weight" for module in ROLES[role])
    return UnitScheme(layer, role, names, scheme, 0.1)


def scheme_of(entries: dict[str, list[UnitScheme]], role: str, name: str) -> str | None:
    """The first that matches, as `quantize` reads them."""
    for entry, units in entries.items():
        if entry == role or (entry.startswith("re:") and re.search(entry[3:], name)):
            return units[0].scheme
    return None


@pytest.mark.parametrize("seed", range(8))
def test_patterns_match_their_numbers_alone(seed: int) -> None:
    chosen = random.Random(seed).sample(range(130), random.Random(seed).randint(1, 70))
    pattern = re.compile(numbers_pattern(chosen))
    assert [number for number in range(200) if pattern.fullmatch(str(number))] == sorted(chosen)


def test_patterns_are_short() -> None:
    assert numbers_pattern([3]) == "3"
    assert numbers_pattern(range(3, 10)) == "[3-9]"
    assert numbers_pattern([3, 4, 12]) == "([34]|12)"
    assert len(numbers_pattern(range(3, 61))) < 50
    assert layers_in_words([7, 3, 4, 5]) == "layers 3-5, 7" and layers_in_words([2]) == "layer 2"


@pytest.mark.parametrize("seed", range(6))
def test_every_matrix_gets_its_scheme(seed: int) -> None:
    generator = random.Random(seed)
    units = [
        unit(layer, role, generator.choice(["int2-g64", "int3-g64", "int8-g64"]))
        for layer in range(14)
        for role in ROLES
    ]
    others = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(14)]
    entries = scheme_entries(units, others)
    assert len(entries) <= 3 * 3
    for each in units:
        for name in each.names:
            assert scheme_of(entries, each.role, name) == each.scheme, name
    for name in others:
        assert scheme_of(entries, "router", name) is None, name


def test_roles_that_agree_need_no_pattern() -> None:
    units = [unit(layer, role, "int4-g64") for layer in range(5) for role in ROLES]
    assert list(scheme_entries(units, [])) == list(ROLES)
    units[3 * 2 + 1] = unit(2, "routed_expert", "int2-g64")
    assert next(iter(scheme_entries(units, []))) == r"re:layers\.2\.mlp\.experts\."


def test_names_that_share_no_module_are_told_apart_all_the_same() -> None:
    """A dense layer whose modules lie beside those of another role, and a vision tower of the same names."""
    mine = UnitScheme(1, "dense_mlp", ("m.layers.1.fc1.weight", "m.layers.1.fc2.weight"), "int2-g64", 0.1)
    same = mine._replace(layer=2, names=("m.layers.2.fc1.weight", "m.layers.2.fc2.weight"), scheme="int4-g64")
    more = same._replace(layer=3, names=("m.layers.3.fc1.weight", "m.layers.3.fc2.weight"))
    others = ["m.layers.1.q.weight", "vision.layers.1.fc1.weight"]
    entries = scheme_entries([mine, same, more], others)
    assert all(scheme_of(entries, "dense_mlp", name) == "int2-g64" for name in mine.names)
    assert all(scheme_of(entries, "dense_mlp", name) == "int4-g64" for name in more.names)
    assert all(scheme_of(entries, "other", name) is None for name in others)


def test_notes_stand_behind_their_entries() -> None:
    notes = {r"re:layers\.[3-5]\.mlp\.experts\.": "layers 3-5: 0.1", "attention": "layer 0: 0.2"}
    schemes = dict.fromkeys(notes, "int3-g64")
    document = {"steps": [{"op": "quantize.gptq", "schemes": schemes}]}
    text = recipe_text(document, notes, ["What", "this is"])
    assert yaml.safe_load(text) == document
    assert text.startswith("# What\n# this is\n")
    for entry, note in notes.items():
        assert any(entry in line and line.endswith(f"  # {note}") for line in text.splitlines())
