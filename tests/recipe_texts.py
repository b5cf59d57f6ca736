"""Recipes as text for the tests of loading, and ways to break them."""

from __future__ import annotations

from typing import Any

import pytest

from surgery.errors import RecipeError
from surgery.recipe.load import LoadedRecipe, parse_recipe

CHIMERA = """\
parents:
  base: org/base
  reasoner: org/r1
steps:
  - op: merge.aoe
    base: base
    weights: {reasoner: 1.0}
    select: [routed_expert]
    threshold: 0.0
output:
  format: source
  tokenizer_from: base
"""
TWO_STEPS = """\
parents: {a: org/a, b: org/b}
steps:
  - op: merge.aoe
    name: first
    base: a
    weights: {b: 0.5}
  - op: merge.aoe
    base: a
    weights: {first: 0.5}
"""


def load(text: str, *overrides: str) -> LoadedRecipe:
    return parse_recipe(text, "r.yaml", overrides)


def refused(text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return caught.value


def edited(old: str, new: str, text: str = CHIMERA) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


def rows(error: RecipeError) -> list[tuple[str, ...]]:
    return list(error.table.rows) if error.table else []


def params(loaded: LoadedRecipe, step: int = 0) -> dict[str, Any]:
    return loaded.recipe.steps[step].operator.model_dump()
