"""The points of a sweep: exact values, names that file systems take, and refusals that say what to write."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from surgery.errors import UsageError
from surgery.recipe.document import Document
from surgery.recipe.grid import CLASSES, axes_of, points_of
from surgery.recipe.overrides import apply_override


def values(over: str) -> list[str]:
    return [shown for shown, _ in axes_of([over], None)[0].values]


@pytest.mark.parametrize(
    ("start", "stop", "step"),
    [("0", "1", "0.1"), ("0.3", "0.7", "0.05"), ("1", "-1", "-0.25"), ("0", "1", "0.3"), ("5", "5", "1")],
)
def test_a_range_is_decimal_and_has_both_ends(start: str, stop: str, step: str) -> None:
    found = values(f"x={start}:{stop}:{step}")
    exact = [Fraction(start)]
    while abs(Fraction(stop) - exact[-1]) >= abs(Fraction(step)):
        exact.append(exact[-1] + Fraction(step))
    if exact[-1] != Fraction(stop):
        exact.append(Fraction(stop))
    assert [Fraction(value) for value in found] == exact
    assert all(len(value) <= 5 and "e" not in value for value in found)


def test_a_tenth_three_times_is_three_tenths() -> None:
    assert values("x=0:0.4:0.1") == ["0", "0.1", "0.2", "0.3", "0.4"]
    assert values("x=1e-3:3e-3:1e-3") == ["0.001", "0.002", "0.003"]


def test_points_are_the_product_and_each_is_the_recipe_with_overrides() -> None:
    axes = axes_of(["steps.1.weights.r1=0,0.5", "steps.1.norm=rms,relative"], "routed,attention+shared")
    points = points_of(axes)
    assert len(points) == 8 and len({point.name for point in points}) == 8
    assert points[5].name == "r1=0.5,norm=rms,select=attention+shared"
    assert points[5].values == (("r1", "0.5"), ("norm", "rms"), ("select", "attention+shared"))
    document = Document("recipe", "", {"steps": [{}, {"weights": {}}]})
    for override in points[5].overrides:
        apply_override(document, override)
    assert not document.problems
    assert document.data["steps"][1] == {
        "weights": {"r1": 0.5}, "norm": "rms", "select": ["attention", "shared_expert"],
    }  # fmt: skip


def test_the_step_of_a_select_is_that_of_the_first_axis_or_as_written() -> None:
    assert axes_of(["steps.2.t=0,1"], "all")[1].path == "steps.2.select"
    assert axes_of([], "all,routed")[0].path == "steps.0.select"
    assert axes_of(["steps.2.t=0,1"], "steps.1.select=all,not:router")[1].path == "steps.1.select"
    assert axes_of(["steps.1.select=all,layers:0-3"], None)[0].values[1] == ("layers:0-3", '["layers:0-3"]')


def test_classes_are_selections() -> None:
    for name, entries in CLASSES.items():
        assert json.loads(axes_of([], name)[0].values[0][1]) == list(entries)


def test_labels_tell_axes_apart_and_names_fit_a_file_system() -> None:
    axes = axes_of(["steps.0.weights.a=0,1", "steps.1.weights.a=0,1", "parents.a=org/x@v1,org:y"], None)
    assert [axis.label for axis in axes] == ["steps.0.weights.a", "steps.1.weights.a", "parents.a"]
    names = [point.name for point in points_of(axes)]
    assert "steps.0.weights.a=0,steps.1.weights.a=0,parents.a=org-x-v1" in names
    assert not any(set(name) & set('/\\:*?"<>|@ ') for name in names)
    long = points_of(axes_of(["x=" + ",".join(f"{'v' * 300}{n}" for n in range(3))], None))
    assert len({point.name for point in long}) == 3
    assert all(len(point.name) < 255 for point in long)
    assert len({point.name for point in points_of(axes_of(["x=a/b,a:b"], None))}) == 2


@pytest.mark.parametrize(
    ("over", "select", "told"),
    [
        (["x"], None, "no axis"),
        (["=1,2"], None, "no axis"),
        (["a..b=1"], None, "no axis"),
        (["x=1,,2"], None, "empty value"),
        (["x=1,2,1"], None, "1 twice"),
        (["x=0:1"], None, "no range of numbers"),
        (["x=a:b:c"], None, "no range of numbers"),
        (["x=0:1:nan"], None, "no range of numbers"),
        (["x=0:1:0"], None, "steps of 0"),
        (["x=0:1:-0.1"], None, "do not lead from 0 to 1"),
        (["x=0:1:1e-9"], None, "values"),
        (["x=0:1:0.001"], None, "1001 points"),
        (["x=1,2", "x=3"], None, "x is swept twice"),
        (["steps.0.select=all"], "routed", "steps.0.select is swept twice"),
        ([], "al", "no role"),
        ([], "all,", "empty name"),
        ([], "steps.0.weights=all", "no select"),
        ([], None, "without an axis"),
    ],
)
def test_what_is_no_grid_is_refused(over: list[str], select: str | None, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        points_of(axes_of(over, select))


def test_more_points_are_allowed_when_asked_for() -> None:
    axes = axes_of(["x=0:1:0.1", "y=0:1:0.1"], None)
    with pytest.raises(UsageError, match="121 points \\(11 × 11\\), more than 100") as refused:
        points_of(axes)
    assert "--max-points 121" in refused.value.hint
    assert len(points_of(axes, 121)) == 121
