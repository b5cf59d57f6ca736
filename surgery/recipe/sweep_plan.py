"""What a sweep will make, from headers alone: every point's recipe and child, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.operators.protocol import LayerOperator
from surgery.recipe.build import Parents
from surgery.recipe.grid import Axis, Point
from surgery.recipe.load import LoadedRecipe
from surgery.recipe.run import built
from surgery.stream.checkpoint import Checkpoint, Event
from surgery.stream.save import check_apart
from surgery.stream.survey import free_bytes, survey
from surgery.stream.together import Family, family_of


@dataclass(frozen=True)
class SweepPlan:
    """The children of a sweep from headers alone; `family` is None where they are made one after another."""

    axes: tuple[Axis, ...]
    points: tuple[Point, ...]
    recipes: tuple[LoadedRecipe, ...]
    checkpoints: tuple[Checkpoint, ...]
    family: Family | None
    out: Path

    @property
    def events(self) -> list[Event]:
        """What users must hear of, each once."""
        return list(dict.fromkeys(event for each in self.checkpoints for event in each.events))

    @property
    def disk_bytes(self) -> int:
        """What all children take; a walk's own need is not in it."""
        if self.family is not None:
            return self.family.output_bytes
        surveys = (
            survey(each, loaded.recipe.output.shard_bytes)
            for each, loaded in zip(self.checkpoints, self.recipes, strict=True)
        )
        return sum(each.disk_bytes for each in surveys)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `surgery sweep --dry-run --json`."""
        need, free = self.disk_bytes, free_bytes(self.out)
        return {
            "schema": 1,
            "folder": str(self.out),
            "axes": axes_as_dicts(self.axes),
            "points": [
                {"name": each.name, "values": dict(each.values), "overrides": list(each.overrides)}
                for each in self.points
            ],
            "together": self.family is not None,
            "bytes_read": dict(self.family.reads) if self.family else None,
            "bytes_if_separate": self.family.whole_bytes if self.family else need,
            "disk": {"needed": need, "free": free, "shortage": max(0, need - free)},
        }


def axes_as_dicts(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    return [
        {"path": each.path, "label": each.label, "values": [shown for shown, _ in each.values]}
        for each in axes
    ]


def plan_sweep(
    load: Callable[[Sequence[str]], LoadedRecipe], axes: Sequence[Axis], points: Sequence[Point], out: Path
) -> SweepPlan:
    """Open the parents once and build every child's outline; `load` gives the recipe with overrides.

    Raises RecipeError (located at the override) and what building a recipe raises.
    """
    recipes = [load(point.overrides) for point in points]
    parents = Parents()
    checkpoints = [built(loaded, parents_of=parents) for loaded in recipes]
    for checkpoint in checkpoints:
        check_apart(out, checkpoint)
    outputs = {
        (each.recipe.output.format, each.recipe.output.shard_bytes, each.recipe.output.allow_nonfinite)
        for each in recipes
    }
    walks = any(isinstance(step.operator, LayerOperator) for each in recipes for step in each.recipe.steps)
    family = None
    if not walks and len(outputs) == 1:
        output = recipes[0].recipe.output
        family = family_of(checkpoints, output.format, output.shard_bytes)
    return SweepPlan(tuple(axes), tuple(points), tuple(recipes), tuple(checkpoints), family, out)
