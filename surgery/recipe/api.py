"""The Python API: everything the command line does, as functions.

Operators are functions on checkpoints, grouped by family and named as in recipes:

    child = surgery.merge.aoe(
        {"base": base, "reasoner": reasoner},
        base="base", weights={"reasoner": 1.0}, select=["routed_expert"],
    )
    child.save("child")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from surgery.errors import UsageError
from surgery.operators.protocol import PREVIOUS, LayerOperator, RunContext
from surgery.recipe.allocate import SCHEMES, Allocation
from surgery.recipe.allocate import allocate as allocate_bits
from surgery.recipe.grid import POINTS, axes_of, points_of
from surgery.recipe.load import LoadedRecipe, load_recipe, recipe_from_dict
from surgery.recipe.run import Plan, plan_recipe, run_recipe
from surgery.recipe.schema import Recipe
from surgery.recipe.sweep import Keep, Measuring, Said, SweepResult, run_sweep
from surgery.recipe.sweep_plan import plan_sweep
from surgery.recipe.table import OPERATORS, operator_class
from surgery.report.diff import Diff, diff_checkpoints
from surgery.report.inspect import Inspection, inspect_checkpoint
from surgery.stream.checkpoint import Checkpoint
from surgery.stream.save import SaveOptions, SaveResult
from surgery.stream.source import open_checkpoint

RecipeLike = str | Path | Mapping[str, Any]
"""A file, the name of a shipped recipe, or the recipe as plain data."""


def open(model: str | Path, name: str | None = None) -> Checkpoint:
    """A lazy checkpoint of a folder or hub id; see `surgery.stream.source.open_checkpoint`."""
    return open_checkpoint(model, name)


def _load(recipe: RecipeLike, overrides: Sequence[str]) -> LoadedRecipe:
    if isinstance(recipe, Mapping):
        return recipe_from_dict(recipe, overrides)
    return load_recipe(recipe, overrides)


def validate(recipe: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe; RecipeError with file, line and column otherwise."""
    return _load(recipe, overrides).recipe


def plan(
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    memory_bytes: int = SaveOptions.memory_bytes,
    context: RunContext | None = None,
) -> Plan:
    """What a run would read, write and need, from headers (and the calibration data of layer steps)."""
    folder = Path(out) if out is not None else None
    return plan_recipe(_load(recipe, overrides), folder, memory_bytes, context)


def run(
    recipe: RecipeLike,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    context: RunContext | None = None,
    **options: Any,
) -> SaveResult:
    """Build a recipe's model in `out`; options are those of `surgery.stream.save.SaveOptions`, `context` says
    where layer steps walk (its memory, threads and progress are those of the options)."""
    return run_recipe(_load(recipe, overrides), Path(out), replace(SaveOptions(), **options), context)


def sweep(
    recipe: RecipeLike,
    out: str | Path,
    over: Mapping[str, str | Sequence[float | str]],
    *,
    select_over: str | None = None,
    overrides: Sequence[str] = (),
    measuring: Measuring | None = None,
    keep: Keep = "all",
    max_points: int = POINTS,
    said: Said | None = None,
    **options: Any,
) -> SweepResult:
    """Make the children of a recipe over a grid, and measure each.

    over: values of fields by their path, as a list or as text (`0:1:0.1`, both ends included, or `a,b,c`).
    select_over: classes of tensors by name, joined by commas, see `surgery.recipe.grid`.
    measuring: what each child is measured on; nothing by default.
    keep: which children stay once they are measured: all, the best, or none.
    said: hears of every point as it is done; options are those of `surgery.stream.save.SaveOptions`.

    The same call goes on where an earlier one stopped. Raises UsageError for a grid that is none, RecipeError
    for a point that is no valid recipe, and what `run` raises.
    """
    axes = axes_of(
        [
            f"{path}={each if isinstance(each, str) else ','.join(map(str, each))}"
            for path, each in over.items()
        ],
        select_over,
    )
    points = points_of(axes, max_points)
    planned = plan_sweep(lambda more: _load(recipe, [*overrides, *more]), axes, points, Path(out))
    return run_sweep(
        planned, measuring or Measuring(), replace(SaveOptions(), **options), keep=keep, said=said
    )


def allocate(
    model: str | Path,
    budget: str,
    calibration: Any,
    *,
    out: str | Path | None = None,
    schemes: Sequence[str] = SCHEMES,
    **options: Any,
) -> Allocation:
    """Choose bits for each layer and role; `.recipe` of the result is a recipe's text, written to `out` as
    well. See `surgery.recipe.allocate.allocate` for budget and options."""
    return allocate_bits(
        model, budget, calibration, out=None if out is None else Path(out), schemes=schemes, **options
    )


def inspect(model: str | Path | Checkpoint) -> Inspection:
    """Tensors by role and stored form, and what is odd about the model."""
    return inspect_checkpoint(model if isinstance(model, Checkpoint) else open_checkpoint(model))


def diff(a: str | Path | Checkpoint, b: str | Path | Checkpoint, threads: int = 2) -> Diff:
    """Distance, cosine and equal bytes of two models."""
    first, second = (each if isinstance(each, Checkpoint) else open_checkpoint(each) for each in (a, b))
    return diff_checkpoints(first, second, threads)


class Family:
    """The operators of one family as functions: `merge.aoe(checkpoints, **params)`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __dir__(self) -> list[str]:
        return [op.partition(".")[2] for op in OPERATORS if op.startswith(self._name + ".")]

    def __getattr__(self, method: str) -> Any:
        op = f"{self._name}.{method}"
        if op not in OPERATORS:
            raise AttributeError(f"no operator {op}; known: {', '.join(OPERATORS)}")

        def apply(
            checkpoints: Mapping[str, Checkpoint] | Checkpoint,
            *,
            context: RunContext | None = None,
            **params: Any,
        ) -> Checkpoint:
            return apply_operator(op, checkpoints, params, context)

        apply.__name__ = apply.__qualname__ = op
        apply.__doc__ = operator_class(op).__doc__
        return apply


def apply_operator(
    op: str,
    checkpoints: Mapping[str, Checkpoint] | Checkpoint,
    params: Mapping[str, Any],
    context: RunContext | None = None,
) -> Checkpoint:
    """The lazy result of an operator. Checkpoints go by the names that the params use; layer operators walk
    the model here, as `context` says."""
    try:
        operator = operator_class(op).model_validate(dict(params))
    except ValidationError as error:
        raise UsageError(f"{op}: {_first(error)}", hint=f"see help(surgery.{op})") from error
    names = operator.input_names()
    if isinstance(checkpoints, Checkpoint):
        given = {names[0]: checkpoints}
    elif PREVIOUS in names and len(checkpoints) == 1:
        given = {PREVIOUS: next(iter(checkpoints.values()))}
    else:
        given = dict(checkpoints)
    missing = [name for name in operator.input_names() if name not in given]
    if missing:
        raise UsageError(f"{op} needs a checkpoint called {missing[0]}", hint=f"given: {', '.join(given)}")
    labels = [checkpoint.label for checkpoint in given.values()]
    if len(set(labels)) != len(labels):
        raise UsageError(
            "two checkpoints have one label", hint="open them with different names: open(path, name)"
        )
    if isinstance(operator, LayerOperator):
        return operator.finish(given, operator.decide(given, context or RunContext()))
    return operator.apply(given)


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    place = ".".join(str(piece) for piece in found["loc"])
    return f"{place}: {found['msg']}" if place else str(found["msg"])


merge = Family("merge")
experts = Family("experts")
sparsify = Family("sparsify")
quantize = Family("quantize")
