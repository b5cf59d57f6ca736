"""Whatever is given as a recipe, nothing but RecipeError comes of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recipe_texts import CHIMERA, load

from surgery.errors import RecipeError
from surgery.recipe.load import load_recipe, recipe_from_dict, shipped_recipes


def survives(text: str, *overrides: str) -> None:
    try:
        loaded = load(text, *overrides)
    except RecipeError as error:
        assert error.location
        assert error.message.isprintable() or error.message
        str(error).encode()
    else:
        assert recipe_from_dict(loaded.recipe.resolved()).recipe == loaded.recipe


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.text(max_size=8),
    st.sampled_from([
        "base", "reasoner", "merge.aoe", "routed_expert", "all", "mtp", "re:(", "re:a{99999999999}",
        "layers:3-1", "layers:0-9", "source", "1e-3", "1e999", "nan", "no", "a:b",
        "surgery.errors:Table", "5GB",
    ]),
)  # fmt: skip
KEYS = st.one_of(
    st.sampled_from([
        "parents", "steps", "output", "op", "name", "base", "weights", "select", "threshold", "norm", "role",
        "match", "layers", "format", "tokenizer_from", "shard_size", "allow_nonfinite", "reasoner",
        "operator", "head", "embedding", "no", "<<", "=", "",
    ]),
    st.integers(-1, 99), st.booleans(), st.none(), st.floats(), st.text(max_size=4),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
STEPS = st.fixed_dictionaries(
    {"op": st.just("merge.aoe"), "base": st.just("base"), "weights": VALUES | st.just({"reasoner": 0.5})},
    optional={"select": VALUES, "threshold": VALUES, "norm": VALUES, "name": VALUES},
)
RECIPES = st.fixed_dictionaries(
    {
        "parents": st.just({"base": "x", "reasoner": "y"}) | VALUES,
        "steps": st.lists(STEPS | VALUES, max_size=2),
    },
    optional={"output": VALUES, "extra": VALUES},
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
@example(b"\xff\xfe")
@example(b"%YAML 1.1\n--- !!set {a, b}")
@example(b"!!binary x: y")
def test_random_bytes(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "r.yaml")
        path.write_bytes(data)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
    assert caught.value.location.startswith(str(path))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,?<~=. \t\n\\xuU0123\ud7ff\u2028\x85\x00", max_size=60))
@example("? a\n: - b\n  -\tc")
@example("%YAML " + "9" * 5000 + ".1\n---\na: b")
@example("a: " + "9" * 5000)
@example("a: 2024-99-99")
@example("a: !!int x\nb: !!float y\nc: !!bool z\nd: !!timestamp q\ne: !!null n")
def test_random_text(text: str) -> None:
    survives(text)


@settings(max_examples=300, deadline=None)
@given(VALUES | RECIPES)
@example(
    {
        "parents": {"a": "x"},
        "steps": [{"op": "merge.aoe", "base": "a", "weights": {}, "select": [{"role": None}]}],
    }
)
def test_random_yaml(data: Any) -> None:
    survives(yaml.safe_dump(data))


@settings(max_examples=150, deadline=None)
@given(RECIPES)
def test_random_plain_data(data: Any) -> None:
    try:
        recipe_from_dict(data)
    except RecipeError as error:
        assert error.location


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_recipes(data: st.DataObject) -> None:
    text = shipped_recipes()[data.draw(st.sampled_from(["chimera", "tri-mind"]))].read_text()
    lines = [line for line in text.splitlines() if not line.strip().startswith("#")]
    at = data.draw(st.integers(0, len(lines) - 1))
    column = data.draw(st.integers(0, len(lines[at])))
    inserted = data.draw(
        st.sampled_from(["", " ", ":", "- ", "{", "}", "[", "]", "no", "~", "0", "\n", "*", "&x "])
    )
    removed = data.draw(st.integers(0, 5))
    lines[at] = lines[at][:column] + inserted + lines[at][column + removed :]
    survives("\n".join(lines))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(KEYS.map(str) | st.sampled_from(["0", "1", "99999999999", "²"]), min_size=1, max_size=5),
    VALUES.map(lambda value: yaml.safe_dump(value, default_flow_style=True)) | st.text(max_size=10),
)
def test_random_overrides(path: list[str], value: str) -> None:
    survives(CHIMERA, f"{'.'.join(path)}={value}")
