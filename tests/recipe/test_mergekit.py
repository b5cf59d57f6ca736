"""mergekit's YAML: what is read, that it means the same, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipe_texts import load, refused
from typer.testing import CliRunner

from surgery.cli.app import app
from surgery.recipe.load import load_recipe

TIES = """\
models:
  - model: org/Base-7B
  - model: org/Math-7B
    parameters:
      weight: [0.2, 0.8, 0.4]
      density: 0.5
  - model: other/Math-7B@v2
    parameters:
      weight:
        - filter: mlp
          value: [0.1, 0.5]
        - filter: self_attn.q
          value: 0.7
        - value: 0.3
merge_method: ties
base_model: org/Base-7B
parameters:
  density: 0.25
  normalize: false
  lambda: 0.9
dtype: bfloat16
tokenizer_source: base
"""


def test_ties_with_gradients_and_filters() -> None:
    recipe = load(TIES).recipe.resolved()
    assert recipe["parents"] == {
        "Base-7B": "org/Base-7B",
        "Math-7B": "org/Math-7B",
        "Math-7B-2": "other/Math-7B@v2",
    }
    (step,) = recipe["steps"]
    assert (step["op"], step["base"], step["normalize"], step["scale"]) == (
        "merge.ties",
        "Base-7B",
        "none",
        0.9,
    )
    first = {"0%": 0.2, "50%": 0.8, "100%": 0.4, "embedding": 0.2, "head": 0.2}
    assert step["models"]["Math-7B"] == {"weight": first, "density": 0.5}
    second = step["models"]["Math-7B-2"]
    assert second["density"] == 0.25
    assert [each.get("match") for each in second["weight"]] == ["mlp", r"self_attn\.q", None]
    assert second["weight"][0]["value"] == {"0%": 0.1, "100%": 0.5, "embedding": 0.1, "head": 0.1}
    assert recipe["output"]["format"] == "bf16" and recipe["output"]["tokenizer_from"] == "Base-7B"


def two(method: str, params: str = "", base: str = "base_model: a\n", model_params: str = "") -> str:
    model = f"\n    parameters: {model_params}" if model_params else ""
    return f"merge_method: {method}\n{base}models:\n  - model: a{model}\n  - model: b{model}\n" + (
        f"parameters: {params}\n" if params else ""
    )


@pytest.mark.parametrize(
    ("text", "op", "normalize", "rescale"),
    [
        (two("linear", base="", model_params="{weight: 1}"), "linear", True, None),
        (two("task_arithmetic", model_params="{weight: 1}"), "task_arithmetic", "none", None),
        (two("ties", model_params="{weight: 1}"), "ties", "weights", None),
        (two("dare_linear", model_params="{weight: 1}"), "dare_linear", "none", "l1"),
        (two("dare_ties", "{rescale: false}", model_params="{weight: 1}"), "dare_ties", "none", "none"),
        (two("della", model_params="{weight: 1}"), "della", "weights", "l1"),
        (two("della_linear", model_params="{weight: 1}"), "della_linear", "none", "l1"),
        (two("breadcrumbs_ties", model_params="{weight: 1}"), "breadcrumbs", "none", None),
        (two("slerp", "{t: 0.5}"), "slerp", None, None),
        (two("karcher", base=""), "karcher", None, None),
        (two("nuslerp", base="", model_params="{weight: 1}"), "nuslerp", None, None),
        (two("arcee_fusion"), "arcee_fusion", None, None),
        (two("sce", "{select_topk: 0.4}"), "sce", None, None),
    ],
)  # fmt: skip
def test_defaults_by_method(text: str, op: str, normalize: Any, rescale: Any) -> None:
    (step,) = load(text).recipe.resolved()["steps"]
    assert step["op"] == f"merge.{op}"
    assert step.get("normalize") == normalize and step.get("rescale") == rescale


def test_stacking_has_half_open_ranges() -> None:
    text = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 16]}]
  - sources: [{model: b, layer_range: [8, 24]}]
dtype: float32
"""
    (step,) = load(text).recipe.resolved()["steps"]
    assert step["slices"] == [{"model": "a", "layers": "0-15"}, {"model": "b", "layers": "8-23"}]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (TIES + "chat_template: auto\n", "r.yaml:23:1", "chat_template"),
        (TIES.replace("tokenizer_source: base", "tokenizer_source: union"), "r.yaml:22:19", "union"),
        (TIES.replace("lambda", "lamda"), "r.yaml:20:3", "unknown parameter `lamda`"),
        (TIES.replace("dtype: bfloat16", "out_dtype: float16"), "r.yaml:21:12", "float16"),
        (TIES.replace("method: ties", "method: nearswap"), "r.yaml:15:15", "nearswap"),
        (TIES.replace("org/Math-7B\n", "org/Math-7B+lora\n"), "r.yaml:3:12", "LoRA"),
        (TIES + "modules: {}\n", "r.yaml:23:1", "module by module"),
        (TIES + "mergemethod: x\n", "r.yaml:23:1", "unknown key `mergemethod`"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_by_name(text: str, place: str, message: str) -> None:
    error = refused(text)
    assert message in error.message
    assert error.location == place


def test_convert_writes_a_recipe_that_loads_to_the_same(tmp_path: Path) -> None:
    source, target = tmp_path / "mergekit.yaml", tmp_path / "ours.yaml"
    source.write_text(TIES)
    done = CliRunner().invoke(app, ["convert", str(source), str(target)])
    assert done.exit_code == 0, done.output
    assert load_recipe(target).recipe == load_recipe(source).recipe
