"""Recipes over packed parents: every output format, made again tensor by tensor by `verify`."""

from __future__ import annotations

from pathlib import Path

import compressed
import factories
import pytest

import surgery
from surgery.recipe.verify import verify
from surgery.stream.quantization_configs import contradictions

TOLD = compressed.config("pack-quantized", (["Linear"], compressed.weights(3, 32)), version="0.17.1")
STEPS = {
    "merge": {"op": "merge.aoe", "base": "a", "weights": {"b": 0.4}, "select": ["routed_expert"]},
    "drop": {"op": "experts.random", "keep": 4, "seed": 1},
}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("packed")
    for seed, name in enumerate("ab"):
        factories.qwen3_moe(folder / name, seed)
        old = compressed.integers(3, 32, padded=True)
        compressed.compress(folder / name, TOLD, lambda module: old)  # noqa: B023 (called at once)
    return {name: str(folder / name) for name in "ab"}


@pytest.mark.parametrize("form", ["source", "bf16", "fp8-block", "compressed-tensors"])
@pytest.mark.parametrize("step", STEPS)
def test_outputs_verify_down_to_their_lineage(
    parents: dict[str, str], step: str, form: str, tmp_path: Path
) -> None:
    used = parents if step == "merge" else {"a": parents["a"]}
    recipe = {"parents": used, "steps": [STEPS[step]], "output": {"format": form}}
    surgery.run(recipe, tmp_path / "out")
    checked = verify(tmp_path / "out", recompute=None)
    states = {check.name: check.state for check in checked.checks}
    assert states["lineage"] == "passed"
    assert states["config"] == "passed"
    assert "failed" not in states.values()
    out = surgery.open(tmp_path / "out")
    assert contradictions(out.quantization, out.tensors) == []
    names = {ref.codec.name for ref in out.tensors.values() if ref.info.role == "routed_expert"}
    expected = {"bf16": "bf16", "fp8-block": "fp8-block"}.get(form, "packed-int3-g32")
    assert names == {expected}
    assert compressed.read_config(tmp_path / "out").get("quantization_config", {}).get("version") == (
        {"source": "0.17.1", "compressed-tensors": "0.18.0"}.get(form)
    )
