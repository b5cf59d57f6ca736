"""Evaluations in the report, as `surgery eval` writes them."""

from __future__ import annotations

import json
import re
from math import inf
from typing import Any

import pytest

from surgery.evaluate.divergence import Divergence, WindowDivergence
from surgery.evaluate.intervals import Mean, Share
from surgery.evaluate.perplexity import Perplexity
from surgery.evaluate.table import Evaluation, ModelScore, Settings
from surgery.evaluate.tasks import TaskScore
from surgery.report.comparison import read_evaluation
from surgery.report.html import render_report

PARENTS = {"org/base-model": {"model": "/models/base"}, "org/donor": {"model": "/models/donor"}}


def model_score(name: str, model: str, right: int, tokens: float, tagged: int, **other: Any) -> ModelScore:
    tasks = TaskScore(
        Share.of(right, 200),
        {"add": Share.of(right // 2, 100), "sort": Share.of(right - right // 2, 100)},
        Mean(tokens, tokens - 5, tokens + 5, 200),
        "<think>",
        Share.of(tagged, 200),
        Share.of(other.pop("cut_off", 0), 200),
        (),
    )
    row = ModelScore(name, model, name == "org/base-model", 10, (), True, tasks, None, None, 1.5)
    return ModelScore(**{**{field: getattr(row, field) for field in row.__dataclass_fields__}, **other})


def evaluation(*rows: ModelScore, **other: Any) -> dict[str, Any]:
    settings = Settings("p.jsonl", None, None, 512, None, "<think>", None, None, None, 32, "cpu", "float32")
    found = Evaluation(rows, other.get("parent"), settings, {}, other.get("notes", ()))
    document = found.as_dict()
    assert json.loads(json.dumps(document)) == document
    return document


def three(**child: Any) -> dict[str, Any]:
    return evaluation(
        model_score("org/base-model", "/models/base", 83, 21, 0),
        model_score("reasoner", "/models/donor", 178, 1610, 200),
        model_score("child", "/out/child", 172, 152.6, 190, **child),
    )


def test_figures_counts_and_intervals_are_those_of_the_evaluation() -> None:
    found = read_evaluation(three(), PARENTS)
    assert list(found.columns) == ["accuracy", "mean reply tokens", "replies with <think>"]
    child = found.rows[2]
    low, high = Share.of(172, 200).low, Share.of(172, 200).high
    assert child.cells[0].value == "86.0%"
    assert list(child.cells[0].details) == ["172 of 200", f"{low:.1%} to {high:.1%}"]
    assert (child.cells[1].value, list(child.cells[1].details)) == ("153", ["148 to 158"])
    assert child.cells[2].value == "95.0%"
    assert found.rows[1].cells[1].value == "1,610"
    assert found.by_task is not None and list(found.by_task[0]) == ["add", "sort"]
    assert found.by_task[1][0].cells[1].details[0] == "42 of 100"
    assert "200 problems" in found.caption and "512 tokens" in found.caption and "95%" in found.caption


def test_what_is_no_parent_by_name_or_path_is_the_child() -> None:
    found = read_evaluation(three(), PARENTS)
    assert [row.is_child for row in found.rows] == [False, False, True]
    strangers = read_evaluation(three(), {})
    assert not any(row.is_child for row in strangers.rows)


def test_cut_off_replies_get_a_column_when_there_are_some() -> None:
    found = read_evaluation(three(cut_off=7), PARENTS)
    assert found.columns[3] == "cut off"
    assert [row.cells[3].value for row in found.rows] == ["0.0%", "0.0%", "3.5%"]


def test_perplexity_and_divergence() -> None:
    windows = [WindowDivergence(3.0, 40, 50), WindowDivergence(4.0, 45, 50)]
    document = evaluation(
        model_score("a", "a", 1, 9, 0, tasks=None, perplexity=Perplexity.of([50.0, 60.0], [50, 50], 51)),
        model_score(
            "b", "b", 1, 9, 0, tasks=None, perplexity=Perplexity.of([90.0], [50], 51),
            divergence=Divergence.of("a", windows),
        ),
        parent="a", notes=("b: 3 tensors are not run",),
    )  # fmt: skip
    found = read_evaluation(document, {})
    assert list(found.columns) == ["perplexity", "KL from a", "same token as a"]
    assert [[cell.value for cell in row.cells] for row in found.rows] == [
        ["3.004", "–", "–"],
        ["6.050", "0.0700", "85.0%"],
    ]
    assert list(found.rows[1].cells[0].details) == []  # one window has no interval
    assert "Perplexity over 100 tokens in windows of 51." in found.caption
    assert list(found.notes) == ["b: 3 tensors are not run"]
    assert found.by_task is None


def test_a_perplexity_that_is_infinite_is_written_and_not_drawn() -> None:
    document = three()
    for row in document["models"]:
        row["tasks"] = None
        row["perplexity"] = {"value": inf, "low": None, "high": None, "tokens": 5, "context": 5}
    found = read_evaluation(document, PARENTS)
    assert found.rows[0].cells[0].value == "inf" and found.panels[0].measures == [None] * 3
    assert "not measured" in render_report({}, document)


def test_bars_end_at_their_values(copied_manifest: dict[str, Any]) -> None:
    page = render_report({**copied_manifest, "inputs": PARENTS}, three())
    bars = re.findall(
        r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="18" class="(parent|child)" rx="1.5">'
        r"<title>([^\n]+)\n(accuracy|mean reply tokens)",
        page,
    )
    assert [(name, kind) for _, _, kind, name, _ in bars] == 2 * [
        ("org/base-model", "parent"), ("reasoner", "parent"), ("child", "child"),
    ]  # fmt: skip
    widths = [float(width) for _, width, _, _, _ in bars]
    accuracy, tokens = widths[:3], widths[3:]
    assert accuracy[2] / accuracy[0] == pytest.approx(172 / 83, abs=0.001)
    assert tokens[0] / tokens[1] == pytest.approx(21 / 1610, abs=0.001)


@pytest.mark.parametrize("document", [{}, {"models": []}, {"models": [{"name": "a"}]}])
def test_an_evaluation_without_figures_is_none(
    document: dict[str, Any], copied_manifest: dict[str, Any]
) -> None:
    assert "Not measured yet" in render_report(copied_manifest, document)


def test_escapes_what_an_evaluation_brings(copied_manifest: dict[str, Any]) -> None:
    hostile = "<script>alert(1)</script>\"'"
    document = json.loads(json.dumps(three()).replace("reasoner", json.dumps(hostile)[1:-1]))
    document["settings"]["tag"] = document["parent"] = hostile
    document["notes"] = [hostile]
    for row in document["models"]:
        row["tasks"]["by_task"] = {hostile: row["tasks"]["accuracy"], "other": row["tasks"]["accuracy"]}
    page = render_report(copied_manifest, document)
    assert "<script" not in page and page.count("&lt;script&gt;") >= 5
