"""`--set`: what it changes, and how its faults are told."""

from __future__ import annotations

import pytest
from recipe_texts import CHIMERA, edited, load, params, refused, rows

from surgery.recipe.schema import Output


def test_overrides_replace_values() -> None:
    loaded = load(
        CHIMERA, "parents.base=/models/v3 copy", "steps.0.weights.reasoner=0.5", "output.format=bf16",
        "steps.0.select=[routed_expert, {role: attention, layers: 3-5}]", "output.tokenizer_from=",
        "steps.0.threshold=1e-3",
    )  # fmt: skip
    recipe = loaded.recipe
    assert recipe.parents == {"base": "/models/v3 copy", "reasoner": "org/r1"}
    assert recipe.output == Output(format="bf16")
    assert params(loaded)["weights"] == {"reasoner": 0.5}
    assert params(loaded)["threshold"] == 0.001
    assert params(loaded)["select"][1]["layers"] == "3-5"
    assert loaded.locate(("parents", "base")) == "--set parents.base=/models/v3 copy"
    assert loaded.locate(("steps", 0, "base")) == "r.yaml:6:11"


def test_overrides_add_what_is_missing() -> None:
    text = CHIMERA[: CHIMERA.index("output:")]
    loaded = load(text, "output.format=bf16", "parents.extra=org/x", "steps.0.weights={extra: 1.0}")
    assert loaded.recipe.output.format == "bf16"
    assert loaded.recipe.steps[0].operator.input_names() == ("base", "extra")
    assert load(edited("  format: source\n  tokenizer_from: base\n", ""), "output.format=bf16")


def test_overrides_reach_layer_anchors() -> None:
    text = edited("1.0", "{0: 0.0, 60: 1.0}")
    loaded = load(text, "steps.0.weights.reasoner.60=0.5", "steps.0.weights.reasoner.30=0.2")
    assert params(loaded)["weights"] == {"reasoner": {0: 0.0, 30: 0.2, 60: 0.5}}


def test_the_last_override_wins() -> None:
    assert params(load(CHIMERA, "steps.0.threshold=1", "steps.0.threshold=2"))["threshold"] == 2


def test_an_override_repairs_a_fault() -> None:
    assert load(edited("org/base", "[1]"), "parents.base=org/base").recipe.parents["base"] == "org/base"


BAD_OVERRIDES = [
    ("steps.0.foo=1", "unknown key `foo`", "keys here: op, name, base, weights, select, threshold, norm"),
    ("steps.0.threshhold=1", "unknown key `threshhold`", "did you mean `threshold`?"),
    ("outptu.format=bf16", "unknown key `outptu`", "did you mean `output`?"),
    ("steps.0.weights.reasoner=2", "`steps.0.weights.reasoner` must be at most 1, not 2", ""),
    ("steps.0.weights={reasoner: on}", "`steps.0.weights.reasoner` must be a number, not `on`", ""),
    ("steps.0.weights={resoner: 1}", "`resoner` is no parent and no earlier step",
     "did you mean `reasoner`?"),
    ("parents.base=7", "`parents.base` must be text, not `7`", 'put it in quotes: "7"'),
    ("steps.1.base=x", "`steps` has 1 items; there is no item 1 (the first is 0)", ""),
    ("steps.-1.base=x", "`steps` is a list; `-1` is no index", ""),
    ("steps.first.base=x", "`steps` is a list; `first` is no index", ""),
    ("parents.base.x=1", "`parents.base` is neither a mapping nor a list, so it has no `x`", ""),
    ("steps.0.select=[a", "this is no YAML: while parsing a flow sequence, expected ',' or ']', but got "
     "'<stream end>'", "put the value in quotes, and the whole argument in quotes again for the shell"),
    ("output={format: bf16, format: source}", "`format` is set twice, first in line 1", ""),
    ("nonsense", "`nonsense` is no override", "write it as path=value, e.g. steps.0.threshold=0.01"),
    ("=1", "`=1` is no override", "write it as path=value, e.g. steps.0.threshold=0.01"),
    ("a..b=1", "`a..b=1` is no override", "write it as path=value, e.g. steps.0.threshold=0.01"),
    ("", "`` is no override", "write it as path=value, e.g. steps.0.threshold=0.01"),
]  # fmt: skip


@pytest.mark.parametrize("override, message, hint", BAD_OVERRIDES, ids=[f[0] for f in BAD_OVERRIDES])
def test_faults_of_overrides_name_the_override(override: str, message: str, hint: str) -> None:
    error = refused(CHIMERA, override)
    assert (error.location, error.message, error.hint) == (f"--set {override}", message, hint)


def test_faults_of_the_file_come_before_those_of_overrides() -> None:
    error = refused(edited("threshold", "treshold"), "output.fromat=bf16")
    assert error.location == "r.yaml:9:5"
    assert rows(error) == [("--set output.fromat=bf16", "unknown key `fromat`; did you mean `format`?")]
