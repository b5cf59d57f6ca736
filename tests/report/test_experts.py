"""The section of dropped experts, from the measurements that pruning leaves in a manifest."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import numpy as np
import pytest

from surgery.report.experts import SHADES, expert_map, expert_sections, in_words, load_rows, value_rows
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
    # fullest 6 of mean 3, 9 of mean 6; spreads √5 of mean 3 and 3 of mean 6
    assert first == ("3", "83.3%", "2.00", "1.50", "0.75", "0.50", "1", "0.25")
    assert second == ("4", "83.3%", "2.00", "1.00", "0.75", "0.00", "1", "0.5")
    without = row(walk=None)
    without["layers"] = [each | {"load": None, "load_after": None} for each in without["layers"]]
    assert load_rows(without)[0] == ("3", "–", "–", "–", "–", "–", "–", "–")


def shades_of(drawing: str, layers: int, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Shade and whether a cell is tall [layers, experts], from the places of the cells in the drawing."""
    cells = [
        (float(y) + float(high), float(x), int(shade), float(high))
        for path, shade in re.findall(r'd="([^"]*)"[^>]*data-shade="(\d+)"', drawing)
        for x, y, high in re.findall(r"M([\d.]+) ([\d.]+)h[\d.]+v([\d.]+)h", path)
    ]
    assert len(cells) == layers * count
    rows: dict[int, list[tuple[float, int, float]]] = {}
    bottoms = sorted({round(cell[0], 1) for cell in cells})
    pitch = (bottoms[-1] - bottoms[0]) / max(layers - 1, 1)
    for bottom, x, shade, high in cells:
        rows.setdefault(round((bottom - bottoms[0]) / pitch), []).append((x, shade, high))
    ordered = [sorted(rows[number]) for number in range(layers)]
    tallest = max(cell[3] for cell in cells)
    return (
        np.array([[shade for _, shade, _ in cells] for cells in ordered]),
        np.array([[high > tallest / 2 for _, _, high in cells] for cells in ordered]),
    )


@pytest.mark.parametrize(("layers", "count"), [(58, 256), (7, 32), (2, 3)])
@pytest.mark.parametrize("low", [False, True])
def test_every_cell_stands_where_its_expert_is(layers: int, count: int, low: bool) -> None:
    """Scores close together and above zero, as AIMER's are: shades still spread from worst to best."""
    random = np.random.default_rng()
    scores = 0.79 + 0.01 * random.random((layers, count))
    keep = count // 2
    order = np.argsort(scores if low else -scores, axis=1)[:, :keep]
    found = [
        measured(n, s.tolist(), sorted(k.tolist()), [], [])
        for n, (s, k) in enumerate(zip(scores, order, strict=True))
    ]
    shades, tall = shades_of(str(expert_map(found, count, low=low)), layers, count)
    least, most = scores.min(axis=1, keepdims=True), scores.max(axis=1, keepdims=True)
    share = (scores - least) / (most - least)
    assert np.abs(shades - (1 - share if low else share) * (SHADES - 1)).max() <= 0.5 + 1e-6
    assert [set(np.flatnonzero(line)) for line in tall] == [set(line) for line in order]


def test_low_scores_are_the_good_ones_where_the_step_says_so() -> None:
    other = {"op": "experts.easy_ep", "important": "high", "decision": {"layers": {"3": [0, 1], "4": [0, 1]}}}
    step = {"op": "experts.easy_ep", "important": "low", "decision": {"layers": {"3": [1, 3], "4": [0, 1]}}}
    (high,) = expert_sections({"measurements": [row()], "steps": [other]})
    (low,) = expert_sections({"measurements": [row()], "steps": [other, step]})
    assert not high["low"] and low["low"]
    assert low["figure"] == expert_map(row()["layers"], 4, low=True) != high["figure"]
    page = render_report({"measurements": [row()], "steps": [other, step]})
    assert "low scores are the good ones" in page
    assert "low scores are the good ones" not in render_report({"measurements": [row()], "steps": [other]})


def test_the_calibration_of_statistics_that_were_read() -> None:
    """A run that reads statistics walks nothing; the decision says what they were taken on."""
    calibration = {"sequences": 3, "tokens": 99, "domains": {"law": 3}}
    step = {"decision": {"provenance": {"calibration": calibration}}}
    assert in_words(row(walk=None), step)[-1] == "Calibrated on 3 sequences of law (3): 99 tokens."
    assert "Calibrated" not in " ".join(in_words(row(walk=None), {}))


def test_no_table_of_loads_that_nobody_took() -> None:
    assert "Load by layer" in render_report({"measurements": [row()]})
    without = row(walk=None)
    without["layers"] = [each | {"load": None, "load_after": None} for each in without["layers"]]
    assert "Load by layer" not in render_report({"measurements": [without]})


def test_one_expert_that_was_never_chosen() -> None:
    found = row()
    found["layers"][0]["load"][0] = 1
    assert "1 expert was never chosen" in " ".join(in_words(found))


def test_scores_are_written_out() -> None:
    assert value_rows(row()["layers"]) == [
        ("3", "1: 4, 3: 2", "0: 0, 2: 1"),
        ("4", "0: 3, 1: 3", "2: 0, 3: 1"),
    ]
    page = unescape(render_report({"measurements": [row()]}))
    assert "<td>1: 4, 3: 2</td><td>0: 0, 2: 1</td>" in page


@pytest.mark.parametrize(
    ("inputs", "title"),
    [
        ({"model": {"model": "/models/big-moe/"}}, "big-moe, 2 of 4 experts"),
        ({"model": {"model": "org/big-moe@main"}}, "big-moe, 2 of 4 experts"),
        ({"model": {}}, "model, 2 of 4 experts"),
        ({"org/a": {}, "org/b": {}}, "a + b, 2 of 4 experts"),
    ],
)
def test_the_title_says_what_is_left(inputs: dict[str, Any], title: str) -> None:
    page = render_report({"inputs": inputs, "measurements": [row()]})
    assert f"<h1>{title}</h1>" in page and f"<title>{title} · surgery report</title>" in page


def test_the_page_has_the_section_and_escapes_names() -> None:
    page = render_report({"measurements": [row()]})
    assert 'id="experts"' in page and "75.0%" in page
    assert "&lt;b&gt;" in page and "<b> (4)" not in page
    assert 'id="experts"' not in render_report({"measurements": []})


@pytest.mark.parametrize("broken", [{"layers": []}, {"kind": "other"}])
def test_rows_without_experts_leave_it_out(broken: dict[str, Any]) -> None:
    assert expert_sections({"measurements": [row(**broken)]}) == []
