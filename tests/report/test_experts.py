"""The section of dropped experts, from the measurements that pruning leaves in a manifest."""

from __future__ import annotations

import re
from typing import Any

import pytest

from surgery.report.experts import SHADES, expert_map, expert_sections, in_words, load_rows
from surgery.report.html import render_report


def measured(
    layer: int, scores: list[float], kept: list[int], load: list[int], after: list[int]
) -> dict[str, Any]:
    return {"layer": layer, "scores": scores, "kept": kept, "load": load, "load_after": after}


def row(**changes: Any) -> dict[str, Any]:
    layers = [
        measured(3, [0.0, 4.0, 1.0, 2.0], [1, 3], [0, 6, 2, 4], [9, 3]),
        measured(4, [3.0, 3.0, 0.0, 1.0], [0, 1], [6, 4, 0, 2], [6, 6]),
    ]
    found = {
        "kind": "experts", "op": "experts.easy_ep", "domains": ["a", "b"], "experts": 4, "kept": 2,
        "groups": "ungrouped", "overlap": [{"domains": ["a", "b"], "share": 0.75}], "layers": layers,
        "walk": {
            "calibration": {"sequences": 8, "tokens": 4096, "domains": {"a": 4, "<b>": 4}},
            "layers": [{"layer": 3, "rms": 1.0, "change": 0.25}, {"layer": 4, "rms": 1.0, "change": 0.5}],
        },
    }  # fmt: skip
    return found | changes


def test_words_count_what_was_kept() -> None:
    words = " ".join(in_words(row()))
    assert "2 of 4 experts stay in each of 2 layers, groups: ungrouped" in words
    assert "83.3%" in words  # (6 + 4 + 6 + 4) of 24 choices
    assert "2 experts were never chosen" in words
    assert "8 sequences of a (4), <b> (4): 4,096 tokens" in words


def test_the_map_has_every_expert_once_in_its_shade() -> None:
    drawing = str(expert_map(row()["layers"], 4))
    shades = {
        int(shade): len(re.findall("M", path))
        for path, shade in re.findall(r'd="([^"]*)"[^>]*data-shade="(\d+)"', drawing)
    }
    assert sum(shades.values()) == 8
    top = SHADES - 1
    assert shades[top] == 3 and shades[0] == 2  # best of the layer: 4.0, 3.0, 3.0; none: 0.0, 0.0
    assert shades[round(top / 2)] == 1  # 2 of 4
    heights = [float(each) for each in re.findall(r"h[\d.]+v([\d.]+)h", drawing)]
    assert len({round(height, 1) for height in heights}) == 2 and heights.count(max(heights)) == 4


def test_loads_by_layer() -> None:
    first, second = load_rows(row())
    assert first == ("3", "83.3%", "2.00", "1.50", "0.250")  # fullest 6 of mean 3; 9 of mean 6
    assert second == ("4", "83.3%", "2.00", "1.00", "0.500")
    without = row(walk=None)
    without["layers"] = [each | {"load": None, "load_after": None} for each in without["layers"]]
    assert load_rows(without)[0] == ("3", "–", "–", "–", "–")


def test_the_page_has_the_section_and_escapes_names() -> None:
    page = render_report({"measurements": [row()]})
    assert 'id="experts"' in page and "75.0%" in page
    assert "&lt;b&gt;" in page and "<b> (4)" not in page
    assert 'id="experts"' not in render_report({"measurements": []})


@pytest.mark.parametrize("broken", [{"layers": []}, {"kind": "other"}])
def test_rows_without_experts_leave_it_out(broken: dict[str, Any]) -> None:
    assert expert_sections({"measurements": [row(**broken)]}) == []
