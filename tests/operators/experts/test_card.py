"""What the model card says of a model without some of its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from folders import strict_manifest
from walk_models import Families, demos

import surgery


def card_of(folder: Path, out: Path, op: str, **params: Any) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    surgery.run({"parents": {"model": str(folder)}, "steps": [{"op": op, **params}]}, out)
    _, front, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_names_criterion_and_calibration(tiny: Families, tmp_path: Path) -> None:
    """After a walk, and from statistics without one."""
    folder, data = tiny("qwen3_moe"), demos(tmp_path / "d.jsonl")
    walked, read = tmp_path / "walked", tmp_path / "read"
    cards = [
        card_of(folder, walked, "experts.easy_ep", keep=3, calibration={"files": {"law": [str(data)]}}),
        card_of(folder, read, "experts.reap", keep=3, statistics=str(walked / "surgery_experts.json")),
    ]
    decision = strict_manifest(walked)["steps"][0]["decision"]
    calibration = decision["provenance"]["calibration"]
    experts = strict_manifest(walked)["measurements"][-1]["experts"]
    for (front, text), op in zip(cards, ("easy_ep", "reap"), strict=True):
        assert front["tags"] == ["surgery", "pruned", op]
        assert "base_model_relation" not in front
        assert (
            f"- experts.{op}: 3 of {experts} routed experts stay in each layer; calibrated on "
            f"{calibration['sequences']} sequences, {calibration['tokens']:,} tokens, of law "
            f"({calibration['domains']['law']}) (SHA-256 `{calibration['sha256']}`)\n"
        ) in text


@pytest.mark.parametrize("op", ["experts.random", "experts.drop"])
def test_the_card_of_operators_that_measure_nothing(tiny: Families, tmp_path: Path, op: str) -> None:
    folder = tiny("qwen3_moe")
    front, text = card_of(folder, tmp_path / "random", "experts.random", keep=3)
    if op == "experts.drop":
        listed = str(tmp_path / "random" / "surgery_keep.json")
        front, text = card_of(folder, tmp_path / "drop", op, keep_list=listed)
    assert front["tags"][:2] == ["surgery", "pruned"]
    assert f"- {op}: 3 routed experts stay in each layer\n" in text


def test_other_cards_do_not_speak_of_experts(tiny: Families, tmp_path: Path) -> None:
    surgery.open(tiny("qwen3_moe")).save(tmp_path / "copy")
    text = (tmp_path / "copy" / "README.md").read_text(encoding="utf-8")
    assert "stay in each layer" not in text and "pruned" not in text
