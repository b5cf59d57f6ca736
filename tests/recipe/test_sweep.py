"""A sweep on tiny models: its children, its table, what resumes and what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import file_hashes
from tiny_models import build_model

import surgery
from surgery.errors import CheckpointError, PlanError, RecipeError, UsageError
from surgery.recipe import sweep as sweep_module
from surgery.recipe.sweep import Measuring, best_row
from surgery.stream.together import Family

PATH = "steps.0.weights.b"
OVER = {PATH: "0:1:0.5"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for seed, name in enumerate("ab"):
        build_model(folder / name, "qwen3_moe", seed, num_hidden_layers=1)
    problems = [{"task": "t", "prompt": f"say {number}", "answer": str(number)} for number in range(3)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(each) + "\n" for each in problems))
    recipe = {
        "parents": {"a": "a", "b": "b"},
        "steps": [{"op": "merge.aoe", "base": "a", "weights": {"b": 0.5}, "select": ["all"]}],
        "output": {"shard_size": "100kB"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def measuring(place: Path) -> Measuring:
    return Measuring(tasks=place / "problems.jsonl", max_new_tokens=6, threads=1)


def lasting(folder: Path) -> dict[str, str]:
    """File hashes, without what tells how long the run took."""
    timed = ("surgery_report.html", "SHA256SUMS")
    return {name: digest for name, digest in file_hashes(folder).items() if name not in timed}


def rows(found: Any) -> dict[str, Any]:
    return {row["name"]: row for row in found.document["points"]}


def test_children_are_those_of_separate_runs_and_the_table_is_that_of_eval(
    place: Path, tmp_path: Path, measuring: Measuring
) -> None:
    heard: list[str] = []
    found = surgery.sweep(
        place / "recipe.yaml", tmp_path / "out", OVER, select_over="all,routed", measuring=measuring,
        said=lambda row: heard.append(row["name"]), threads=1,
    )  # fmt: skip
    names = [f"b={weight},select={kind}" for weight in ("0", "0.5", "1") for kind in ("all", "routed")]
    assert [row["name"] for row in found.document["points"]] == heard == names
    for row in found.document["points"]:
        alone = surgery.run(place / "recipe.yaml", tmp_path / row["name"], overrides=row["overrides"])
        one, other = (surgery.open(folder) for folder in (tmp_path / "out" / row["folder"], alone.folder))
        difference = surgery.diff(one, other)
        assert all(each["equal_bytes"] == each["tensors"] for each in difference.as_dict()["roles"])
        assert surgery.verify(tmp_path / "out" / row["folder"], recompute=None, load=False).ok
    direct = surgery.evaluate(
        {name: tmp_path / "out" / name for name in names}, tasks=measuring.tasks, max_new_tokens=6, threads=1
    )
    for score in direct.rows:
        assert rows(found)[score.name]["figures"]["tasks"] == json.loads(json.dumps(score.as_dict()["tasks"]))
    assert rows(found)["b=0,select=routed"]["same_as"] == "b=0,select=all"
    with open(tmp_path / "out" / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["point"] for line in table] == names
    assert [float(line["reply_tokens"]) for line in table] == [
        row["figures"]["tasks"]["reply_tokens"]["value"] for row in found.document["points"]
    ]
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "<svg" in page and all(name in page for name in names)
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == json.loads(json.dumps(found.document))
    assert not (tmp_path / "out" / "surgery-lock").exists()


def test_children_of_one_recipe_over_all_tensors_are_equal_to_runs_file_by_file(
    place: Path, tmp_path: Path
) -> None:
    found = surgery.sweep(place / "recipe.yaml", tmp_path / "out", OVER, threads=1)
    for row in found.document["points"]:
        surgery.run(place / "recipe.yaml", tmp_path / row["name"], overrides=row["overrides"])
        assert lasting(tmp_path / row["name"]) == lasting(tmp_path / "out" / row["name"])


def test_a_second_call_measures_only_what_is_new(
    place: Path, tmp_path: Path, measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = surgery.sweep(place / "recipe.yaml", tmp_path / "out", OVER, threads=1)
    assert all(row["figures"] is None for row in made.document["points"])
    measured: list[str] = []
    real = sweep_module.evaluate

    def counting(models: Any, **told: Any) -> Any:
        measured.extend(models)
        return real(models, **told)

    monkeypatch.setattr(sweep_module, "evaluate", counting)
    stamp = (tmp_path / "out" / "b=0.5" / "surgery_manifest.json").stat().st_mtime_ns
    surgery.sweep(place / "recipe.yaml", tmp_path / "out", {PATH: "0.5,1"}, measuring=measuring, threads=1)
    assert measured == ["b=0.5", "b=1"]
    found = surgery.sweep(
        place / "recipe.yaml", tmp_path / "out", {PATH: "0:1:0.25"}, measuring=measuring, threads=1
    )
    assert measured == ["b=0.5", "b=1", "b=0", "b=0.25", "b=0.75"]
    assert (tmp_path / "out" / "b=0.5" / "surgery_manifest.json").stat().st_mtime_ns == stamp
    assert list(rows(found)) == ["b=0", "b=0.25", "b=0.5", "b=0.75", "b=1"]
    # Points of earlier calls stay in the table, behind those that were asked for.
    again = surgery.sweep(
        place / "recipe.yaml", tmp_path / "out", {PATH: "1,0.75"}, measuring=measuring, threads=1
    )
    assert list(rows(again))[:2] == ["b=1", "b=0.75"] and len(rows(again)) == 5
    assert len(measured) == 5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"overrides": ["steps.0.threshold=0.5"]}, "recipe.steps.0.threshold was 0.0, is 0.5"),
        ({"measuring": {"limit": 2}}, "measuring.limit was null, is 2"),
        ({"over": {"steps.0.threshold": "0,1"}}, "axes.0 was"),
        ({"overrides": ["parents.b=c"]}, "recipe.parents.b was"),
    ],
)
def test_another_sweep_is_refused_with_the_difference(
    place: Path, tmp_path: Path, measuring: Measuring, changes: dict[str, Any], told: str
) -> None:
    build_model(tmp_path / "c", "qwen3_moe", 5, num_hidden_layers=1)
    changes = dict(changes)
    if changes.get("overrides") == ["parents.b=c"]:
        changes["overrides"] = [f"parents.b={tmp_path / 'c'}"]
    first = {"over": {PATH: "0.5"}, "measuring": measuring}
    surgery.sweep(place / "recipe.yaml", tmp_path / "out", threads=1, **first)  # type: ignore[arg-type]
    if "measuring" in changes:
        changes["measuring"] = replace(measuring, **changes["measuring"])
    with pytest.raises(PlanError, match="another sweep") as refused:
        surgery.sweep(place / "recipe.yaml", tmp_path / "out", threads=1, **{**first, **changes})
    assert told in refused.value.message
    surgery.sweep(place / "recipe.yaml", tmp_path / "out", threads=1, fresh=True, **{**first, **changes})


def test_a_folder_of_something_else_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(PlanError, match="holds no sweep"):
            surgery.sweep(place / "recipe.yaml", tmp_path / "out", OVER, fresh=fresh)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    with pytest.raises(PlanError, match="are not apart"):
        surgery.sweep(place / "recipe.yaml", place / "a" / "out", OVER)


@pytest.mark.parametrize("keep", ["best", "none"])
def test_children_that_are_not_kept_go_once_measured(
    place: Path, tmp_path: Path, measuring: Measuring, monkeypatch: pytest.MonkeyPatch, keep: Any
) -> None:
    """Also where the disk has room for one child at a time."""
    size = sum(path.stat().st_size for path in (place / "a").iterdir())
    monkeypatch.setattr(sweep_module, "free_bytes", lambda folder: int(1.5 * size))
    over = {PATH: "0,0.3,1"}
    out = tmp_path / "out"
    most: list[int] = []
    found = surgery.sweep(
        place / "recipe.yaml", out, over, measuring=measuring, keep=keep, threads=1,
        said=lambda row: most.append(sum(path.is_dir() for path in out.iterdir())),
    )  # fmt: skip
    left = sorted(path.name for path in out.iterdir() if path.is_dir())
    best = best_row(found.document["points"])
    assert best is not None and all(row["figures"] for row in found.document["points"])
    assert left == ([best["name"]] if keep == "best" else [])
    assert [row["name"] for row in found.document["points"] if row["folder"]] == left
    assert max(most) <= 1
    whole = surgery.sweep(place / "recipe.yaml", out, over, measuring=measuring, threads=1)
    assert all((out / row["folder"]).is_dir() for row in whole.document["points"])


def test_the_best_is_right_most_often_and_then_short() -> None:
    def row(accuracy: float, tokens: float) -> dict[str, Any]:
        tasks = {"accuracy": {"value": accuracy}, "reply_tokens": {"value": tokens}}
        return {"figures": {"tasks": tasks, "perplexity": None}}

    table = [row(0.5, 3), row(0.9, 120), row(0.9, 80), {"figures": None}]
    assert best_row(table) is table[2]
    texts = [{"figures": {"tasks": None, "perplexity": {"value": value}}} for value in (3.0, 2.0, 4.0)]
    assert best_row(texts) is texts[1]
    assert best_row([{"figures": None}]) is None


def test_a_child_that_cannot_be_measured_does_not_stop_the_others(
    place: Path, tmp_path: Path, measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sweep_module.evaluate

    def failing(models: Any, **told: Any) -> Any:
        if "b=0.5" in models:
            raise CheckpointError("this child does not load")
        return real(models, **told)

    monkeypatch.setattr(sweep_module, "evaluate", failing)
    found = surgery.sweep(place / "recipe.yaml", tmp_path / "out", OVER, measuring=measuring, threads=1)
    assert [row["name"] for row in found.failed] == ["b=0.5"]
    assert rows(found)["b=0.5"]["error"] == "this child does not load"
    assert rows(found)["b=1"]["figures"]
    assert "this child does not load" in (tmp_path / "out" / "sweep.html").read_text()
    monkeypatch.setattr(sweep_module, "evaluate", real)
    again = surgery.sweep(place / "recipe.yaml", tmp_path / "out", OVER, measuring=measuring, threads=1)
    assert not again.failed and rows(again)["b=0.5"]["figures"]


@pytest.mark.parametrize(
    ("over", "error", "told"),
    [
        ({"steps.0.weights.b": "0:1.5:0.5"}, RecipeError, "--set steps.0.weights.b=1.5"),
        ({"steps.0.weights.c": "0,1"}, RecipeError, "c"),
        ({"steps.3.weights.b": "0,1"}, RecipeError, "no item 3"),
        ({"steps.0.threshold": "low,high"}, RecipeError, "--set steps.0.threshold=low"),
        ({"steps.0.weights.b": "0:1:0"}, UsageError, "steps of 0"),
    ],
)
def test_a_point_that_is_no_recipe_is_refused_at_its_place(
    place: Path, tmp_path: Path, over: dict[str, str], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        surgery.sweep(place / "recipe.yaml", tmp_path / "out", over)
    assert not (tmp_path / "out").exists()


def test_bad_measures_are_refused_before_anything_is_made(place: Path, tmp_path: Path) -> None:
    for measuring, told in (
        (Measuring(tasks=place / "none.jsonl"), "none.jsonl"),
        (Measuring(text=place / "none.txt"), "none.txt"),
        (Measuring(tasks=place / "problems.jsonl", answer="("), "regular expression"),
    ):
        with pytest.raises(UsageError, match=told):
            surgery.sweep(place / "recipe.yaml", tmp_path / "out", OVER, measuring=measuring)
    with pytest.raises(UsageError, match="without a measure"):
        surgery.sweep(place / "recipe.yaml", tmp_path / "out", OVER, keep="none")
    assert not (tmp_path / "out").exists()


def test_children_in_other_formats_are_made_one_after_another(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Family, "output_bytes", property(lambda self: 1 / 0))
    over = {"output.format": ["source", "bf16"]}
    surgery.sweep(place / "recipe.yaml", tmp_path / "out", over, threads=1)
    for form in over["output.format"]:
        surgery.run(place / "recipe.yaml", tmp_path / form, overrides=[f"output.format={form}"])
        assert lasting(tmp_path / "out" / f"format={form}") == lasting(tmp_path / form)


KILLED = """
import sys
from pathlib import Path
import surgery
from surgery.recipe.sweep import Measuring
place, out = map(Path, sys.argv[1:3])
measuring = Measuring(tasks=place / "problems.jsonl", max_new_tokens=6, threads=1)
over = {"steps.0.weights.b": "0:1:0.25"}
surgery.sweep(place / "recipe.yaml", out, over, measuring=measuring, threads=1,
              said=lambda row: print(row["name"], flush=True) or sys.stdin.readline())
"""


def test_a_killed_sweep_goes_on(
    place: Path, tmp_path: Path, measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL after the second point; the rest of the points are measured, the first two are not."""
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(surgery.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(place), str(out)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "b=0\n"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "b=0.25\n"
    with pytest.raises(PlanError, match="another process"):
        surgery.sweep(place / "recipe.yaml", out, {PATH: "0:1:0.25"}, measuring=measuring, threads=1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    before = time.time_ns()
    heard: list[str] = []
    found = surgery.sweep(
        place / "recipe.yaml", out, {PATH: "0:1:0.25"}, measuring=measuring, threads=1,
        said=lambda row: heard.append(row["name"]),
    )  # fmt: skip
    assert heard == ["b=0.5", "b=0.75", "b=1"]
    assert all(row["figures"] for row in found.document["points"])
    for row in found.document["points"]:
        assert (out / row["name"] / "surgery_manifest.json").stat().st_mtime_ns < before
