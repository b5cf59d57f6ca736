"""A sweep: children of one recipe over a grid of values, made in one reading of the parents, and measured.

A point is the recipe with one override per axis and becomes a child in the folder of its name. Children of
weight operators are saved together (`surgery.stream.together`); where steps walk the model, or where children
are stored differently, they are made one after another. Each is then measured by `evaluate`, and `sweep.json`
is written after every point: the same call goes on where an earlier one stopped.

A fault while making children ends the sweep, as it ends a run. A child that cannot be measured is noted with
the reason and the others go on; the next call tries it again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, Literal, get_args

from surgery.errors import InterruptedRun, SurgeryError, UsageError
from surgery.evaluate.run import evaluate
from surgery.evaluate.tasks import compile_pattern, read_problems
from surgery.operators.protocol import RunContext
from surgery.recipe.grid import Point
from surgery.recipe.ledger import Ledger, Row, read_sweep, sweep_folder, write_text
from surgery.recipe.run import output_options, run_recipe
from surgery.recipe.sweep_plan import SweepPlan, axes_as_dicts
from surgery.report.sweep import render_sweep, sweep_csv, sweep_svg
from surgery.stream.files import file_hash
from surgery.stream.manifest import NAME as MANIFEST
from surgery.stream.save import SaveOptions, clear_leftovers
from surgery.stream.survey import free_bytes
from surgery.stream.together import Family, begun_otherwise, save_together

Keep = Literal["all", "best", "none"]
KEEPS: tuple[Keep, ...] = get_args(Keep)
Said = Callable[[Row], None]
PAGE, TABLE, FIGURE = "sweep.html", "sweep.csv", "sweep.svg"


@dataclass(frozen=True)
class Measuring:
    """What each child is measured on, as `evaluate` takes it; nothing without `tasks` and `text`."""

    tasks: str | Path | None = None
    text: str | Path | None = None
    limit: int | None = None
    max_new_tokens: int = 512
    answer: str | None = None
    tag: str = "<think>"
    context: int | None = None
    add_bos: bool | None = None
    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    trust_remote_code: bool = False

    @property
    def wanted(self) -> bool:
        return self.tasks is not None or self.text is not None

    def check(self) -> None:
        """Refuse what would fail for every child. Raises UsageError."""
        compile_pattern(self.answer)
        if self.tasks is not None:
            read_problems(Path(self.tasks), self.limit)
        if self.text is not None and not Path(self.text).is_file():
            raise UsageError(f"there is no file {self.text}")

    def identity(self) -> dict[str, Any]:
        """What figures depend on; files by their content."""
        told = {key: value for key, value in asdict(self).items() if key != "threads" and value is not None}
        for name in ("tasks", "text"):
            if name in told:
                path = Path(told[name])
                told[name] = {"file": path.name, "sha256": file_hash(path)}
        return told


@dataclass(frozen=True)
class SweepResult:
    folder: Path
    document: Mapping[str, Any]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.document["points"] if row["error"]]


def run_sweep(
    planned: SweepPlan,
    measuring: Measuring,
    options: SaveOptions,
    *,
    keep: Keep = "all",
    said: Said | None = None,
) -> SweepResult:
    """Make and measure what is missing, and write table, page and figure. `said` hears of every point."""
    measuring.check()
    if keep != "all" and not measuring.wanted:
        raise UsageError(f"--keep {keep} without a measure", hint="give --tasks or --text, or keep all")
    with sweep_folder(planned.out, fresh=options.fresh):
        ledger = Ledger(planned.out, _identity(planned, measuring))
        ledger.facts["axes"] = _all_axes(planned, read_sweep(planned.out))
        ledger.write(list(ledger.rows))
        sweep = _Sweep(planned, measuring, options, keep, ledger, said or (lambda row: None))
        sweep.run()
        document = ledger.write([point.name for point in planned.points])
        if measuring.wanted:
            write_text(planned.out / TABLE, sweep_csv(document))
            write_text(planned.out / PAGE, render_sweep(document))
            write_text(planned.out / FIGURE, sweep_svg(document))
    return SweepResult(planned.out, document)


def _identity(planned: SweepPlan, measuring: Measuring) -> dict[str, Any]:
    resolved = planned.recipes[0].recipe.resolved()
    for axis in planned.axes:
        _drop(resolved, axis.path.split("."))
    swept = [axis.path for axis in planned.axes]
    inputs = {
        source.label: source.identity()
        for each in planned.checkpoints
        for source in each.inputs
        if f"parents.{source.label}" not in swept
    }
    return {
        "axes": swept,
        "recipe": resolved,
        "inputs": inputs,
        "measuring": measuring.identity(),
    }


def _drop(value: Any, path: Sequence[str]) -> None:
    """Take a swept field out of a recipe's plain data, where it stands there under its path."""
    for step in path[:-1]:
        value = value[int(step)] if isinstance(value, list) else value.get(step)
        if not isinstance(value, list | dict):
            return
    if isinstance(value, dict):
        value.pop(path[-1], None)
    else:
        value[int(path[-1])] = None


def _all_axes(planned: SweepPlan, earlier: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The axes with the values of this call and then those of earlier ones."""
    axes = axes_as_dicts(planned.axes)
    for axis, old in zip(axes, (earlier or {}).get("axes") or (), strict=False):
        axis["values"] = list(dict.fromkeys([*axis["values"], *old["values"]]))
    return axes


@dataclass
class _Sweep:
    """One call at work."""

    planned: SweepPlan
    measuring: Measuring
    options: SaveOptions
    keep: Keep
    ledger: Ledger
    said: Said
    done: int = 0

    def run(self) -> None:
        lacking = [index for index in range(len(self.planned.points)) if self._lacks(index)]
        self.done = len(self.planned.points) - len(lacking)
        while lacking:
            batch, lacking = self._batch(lacking)
            self._make([index for index in batch if not self._made(index)])
            for index in batch:
                self._measure(index)

    def _folder(self, index: int) -> Path:
        return self.planned.out / self.planned.points[index].name

    def _made(self, index: int) -> bool:
        return (self._folder(index) / MANIFEST).is_file()

    def _lacks(self, index: int) -> bool:
        measured = self._measured(self.planned.points[index]) is not None
        return not measured or (self.keep == "all" and not self._made(index))

    def _measured(self, point: Point) -> Row | None:
        """The row of a point that needs no further measure."""
        row = self.ledger.rows.get(point.name)
        if row is None or row["error"] or (self.measuring.wanted and not row["figures"]):
            return None
        return row

    def _batch(self, lacking: Sequence[int]) -> tuple[list[int], list[int]]:
        """The children to be made at once: all, or as many as the disk has room for where they go again."""
        if self.keep == "all":
            return list(lacking), []
        room = free_bytes(self.planned.out)
        size = max(self.planned.checkpoints[index].nbytes for index in lacking)
        count = max(1, int(room / max(1.05 * size, 1)))
        return list(lacking[:count]), list(lacking[count:])

    def _make(self, missing: Sequence[int]) -> None:
        if not missing:
            return
        begun = monotonic()
        family, points = self.planned.family, self.planned.points
        if family is not None:
            wanted: list[Path | None] = [None] * len(points)
            options = [self.options] * len(points)
            for index in missing:
                wanted[index] = self._folder(index)
                options[index] = self._options(index, family)
            save_together(family, wanted, options)
        else:
            for index in missing:
                context = RunContext(
                    device=self.measuring.device, dtype=self.measuring.dtype, threads=self.measuring.threads,
                    trust_remote_code=self.measuring.trust_remote_code,
                )  # fmt: skip
                options_here = replace(self.options, fresh=False, overwrite=False, begun=monotonic())
                run_recipe(self.planned.recipes[index], self._folder(index), options_here, context)
        made = self.ledger.facts.setdefault("making", {"children": 0, "seconds": 0.0})
        made["children"] += len(missing)
        made["seconds"] = round(made["seconds"] + monotonic() - begun, 3)

    def _options(self, index: int, family: Family) -> SaveOptions:
        loaded, checkpoint = self.planned.recipes[index], self.planned.checkpoints[index]
        options = output_options(loaded, checkpoint, replace(self.options, fresh=False, overwrite=False))
        return replace(options, fresh=begun_otherwise(family, index, self._folder(index), options))

    def _measure(self, index: int) -> None:
        point = self.planned.points[index]
        row: dict[str, Any] = {
            "name": point.name, "values": dict(point.values), "overrides": list(point.overrides),
            "folder": point.name, "figures": None, "same_as": None, "error": None,
        }  # fmt: skip
        clear_leftovers(self._folder(index))
        earlier = self._measured(point)
        twin = self._twin(index)
        if earlier is not None:
            row = {**earlier, "folder": point.name}
        elif twin is not None:
            row |= {"figures": twin["figures"], "same_as": twin["name"]}
        elif self.measuring.wanted:
            row |= self._figures(point)
        self.ledger.record(row)
        self._tidy(point.name)
        self.done += 1
        self.options.progress("points", self.done, len(self.planned.points))
        self.said(row)

    def _twin(self, index: int) -> Row | None:
        """The row of a child with the same bytes that was measured before."""
        if self.planned.family is None:
            return None
        twin = self.planned.family.twin(index)
        row = self.ledger.rows.get(self.planned.points[twin].name) if twin != index else None
        return row if row is not None and row["figures"] else None

    def _figures(self, point: Point) -> dict[str, Any]:
        def tell(stage: str, done: int, total: int) -> None:
            self.options.progress(stage.rpartition(": ")[2], done, total)

        try:
            found = evaluate(
                {point.name: self.planned.out / point.name}, **asdict(self.measuring), progress=tell
            )
        except (InterruptedRun, UsageError):
            raise
        except SurgeryError as error:
            return {"error": str(error)}
        except (RuntimeError, ValueError) as error:  # what torch and transformers raise
            return {"error": f"{type(error).__name__}: {error}"}
        self.ledger.facts["settings"] = found.as_dict()["settings"]
        self.ledger.facts["versions"] = dict(found.versions)
        figures = found.rows[0].as_dict()
        return {"figures": {key: figures[key] for key in ("tasks", "perplexity", "parameters", "seconds")}}

    def _tidy(self, name: str) -> None:
        """Remove the children that are not to be kept."""
        if self.keep == "all":
            return
        best = best_row(list(self.ledger.rows.values())) if self.keep == "best" else None
        for row in list(self.ledger.rows.values()):
            if row["folder"] and not row["error"] and row is not best:
                shutil.rmtree(self.planned.out / row["name"], ignore_errors=True)
                self.ledger.record({**row, "folder": None})


def best_row(rows: Sequence[Row]) -> Row | None:
    """The highest accuracy, of equal ones the shortest replies; without replies the lowest perplexity."""
    measured = [row for row in rows if row["figures"]]
    if not measured:
        return None

    def rank(row: Row) -> tuple[float, float]:
        tasks, text = row["figures"]["tasks"], row["figures"]["perplexity"]
        if tasks:
            return (-tasks["accuracy"]["value"], tasks["reply_tokens"]["value"])
        return (text["value"], 0.0)

    return min(measured, key=rank)
