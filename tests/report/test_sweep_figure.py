"""The figure, the table and the page of a sweep."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from io import StringIO
from typing import Any

import numpy as np
import pytest

from surgery.report.sweep import pareto, render_sweep, sweep_csv, sweep_svg

SVG = "{http://www.w3.org/2000/svg}"


def share(value: float) -> dict[str, Any]:
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}


def document(points: list[tuple[dict[str, str], float | None, float]], **changes: Any) -> dict[str, Any]:
    rows = []
    for values, accuracy, tokens in points:
        tasks = {
            "problems": 10, "accuracy": share(accuracy or 0.0), "tagged": share(0.5),
            "reply_tokens": {"value": tokens, "low": tokens - 1, "high": tokens + 1},
        }  # fmt: skip
        failed = accuracy is None
        rows.append({
            "name": ",".join(f"{key}={value}" for key, value in values.items()), "values": values,
            "figures": None if failed else {"tasks": tasks, "perplexity": None}, "folder": None,
            "error": "<it> failed" if failed else None, "same_as": None,
        })  # fmt: skip
    labels = list(points[0][0])

    def seen(label: str) -> list[str]:
        return list(dict.fromkeys(values[label] for values, *_ in points))

    axes = [
        {
            "label": label,
            "path": f"steps.0.{label}",
            "values": list(dict.fromkeys(p[0][label] for p in points)),
        }
        for label in labels
    ]
    return {
        "schema": 1, "axes": axes, "points": rows, "settings": {"tag": "<think>"},
        "sweep": {
            "recipe": {"steps": [{"op": "merge.aoe"}]},
            "measuring": {"tasks": {"file": "p.jsonl"}, "limit": 3},
        },
        **changes,
    }  # fmt: skip


POINTS: list[tuple[dict[str, str], float | None, float]] = [
    ({"w": w, "select": s}, a, t)
    for w, s, a, t in (
        ("0", "all", 0.4, 20), ("0.5", "all", 0.5, 30), ("1", "all", 0.9, 160),
        ("0", "a&b", 0.4, 20), ("0.5", "a&b", None, 0), ("1", "a&b", 0.3, 90),
    )
]  # fmt: skip


def test_a_mark_for_every_point_in_every_panel_at_its_place() -> None:
    root = ET.fromstring(sweep_svg(document(POINTS)))
    panels = [each for each in root if each.tag == f"{SVG}g"]
    titles = [next(each for each in panel if each.get("class") == "ink strong").text for panel in panels]
    assert titles == [
        "accuracy", "mean reply tokens", "replies with <think>", "accuracy against mean reply tokens",
    ]  # fmt: skip
    for panel in panels:
        assert len(panel.findall(f"{SVG}circle")) == 5
    marks = panels[0].findall(f"{SVG}circle")
    found = {str(mark[0].text): (float(mark.get("cx", 0)), float(mark.get("cy", 0))) for mark in marks}
    assert found["w=0,select=all: 0.4"] == pytest.approx((0.0, 120.0))
    assert found["w=1,select=all: 0.9"] == pytest.approx((390.0, 20.0))
    assert found["w=0.5,select=all: 0.5"] == pytest.approx((195.0, 100.0))
    # A line through the points of a series, in the order of the axis, over what failed.
    lines = [each.get("points") for each in panels[0].findall(f"{SVG}polyline")]
    assert lines == ["0,120 195,100 390,20", "0,120 390,140"]
    assert [each.text for each in root.findall(f"{SVG}text")] == ["all", "a&b"]


def test_a_sweep_without_numbers_and_one_without_replies() -> None:
    names = document([({"kind": kind}, 0.5, 10) for kind in ("x", "y", "z")])
    root = ET.fromstring(sweep_svg(names))
    assert not root.findall(f".//{SVG}polyline[@stroke]")
    assert len(root.findall(f".//{SVG}circle")) == 4 * 3
    text = document(POINTS[:3])
    for number, row in enumerate(text["points"]):
        row["figures"] = {"tasks": None, "perplexity": {"value": 3.0 + number, "low": None, "high": None}}
    panels = [each for each in ET.fromstring(sweep_svg(text)) if each.tag == f"{SVG}g"]
    assert len(panels) == 1 and len(panels[0].findall(f"{SVG}circle")) == 3
    assert "3.000" not in sweep_csv(text) and "perplexity" in sweep_csv(text)


def test_a_sweep_of_which_nothing_could_be_measured_still_has_a_page() -> None:
    failed = document([({"w": "0"}, None, 0), ({"w": "1"}, None, 0)])
    ET.fromstring(sweep_svg(failed))
    page = render_sweep(failed)
    assert page.count("&lt;it&gt; failed") == 2 and "<it>" not in page


def test_the_page_and_the_table_have_every_point() -> None:
    page = render_sweep(document(POINTS))
    assert page.count("<tr>") == 1 + len(POINTS)
    assert "0.90 (0.80–1.00)" in page and "a&amp;b" in page and "limit 3" in page and "p.jsonl" in page
    table = list(csv.DictReader(StringIO(sweep_csv(document(POINTS)))))
    assert [line["w"] for line in table] == [values["w"] for values, *_ in POINTS]
    assert table[2]["accuracy"] == "0.9" and table[2]["reply_tokens_high"] == "161"
    assert table[4]["accuracy"] == "" and table[4]["error"] == "<it> failed"


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_other_point_dominates(seed: int) -> None:
    rng = np.random.default_rng([seed, int(np.random.default_rng().integers(1 << 30))])
    points = [(float(x), float(y)) for x, y in rng.integers(0, 8, (20, 2))]
    front = {points[index] for index in pareto(points)}
    dominated = {
        (x, y) for x, y in points if any((a <= x and b >= y) and (a, b) != (x, y) for a, b in points)
    }
    assert front == set(points) - dominated
    assert [points[index][0] for index in pareto(points)] == sorted(
        points[index][0] for index in pareto(points)
    )
