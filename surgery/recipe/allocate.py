"""Bits for each layer and role of a model under a budget, written down as a recipe.

Everything that headers tell is settled first: which matrices take part, what each scheme would take of them,
and whether the budget lies between the least and the most. Then one walk over the model as it is measures
what each scheme does to the outputs (`operators.layerwise.sensitivity`), the least sum of errors is found
(`operators.quantize.allocate`), and the choice becomes the `schemes` of a step that a person can read, edit
and run. All matrices of one role in one layer share a scheme, as vLLM asks of a layer's experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.operators.protocol import Operator, RunContext
from surgery.recipe.bits import Task, Unit, open_task
from surgery.recipe.budget import Budget
from surgery.recipe.entries import UnitScheme, layers_in_words, recipe_text
from surgery.recipe.load import parse_recipe
from surgery.recipe.run import check_device, check_walks
from surgery.recipe.walks import walk_place
from surgery.stream.units import format_bytes

if TYPE_CHECKING:
    from surgery.operators.layerwise.problem import Matrix

SCHEMES = ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64")
"""Candidates where none are named."""


@dataclass(frozen=True)
class Measured:
    """The errors of each unit with each scheme, what they depend on, and what users should hear of."""

    errors: Sequence[Sequence[float]]
    walk: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Allocation:
    """What was chosen: of each unit the number of its scheme."""

    task: Task = field(repr=False)
    budget: Budget
    measured: Measured = field(repr=False)
    chosen: tuple[int, ...]

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.task.units

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(self.task.schemes)

    @property
    def errors(self) -> Sequence[Sequence[float]]:
        """Of each unit with each of `schemes`."""
        return self.measured.errors

    @property
    def notes(self) -> tuple[str, ...]:
        """What users should hear of."""
        most = self.task.most
        if self.budget.nbytes <= most:
            return self.measured.notes
        reached = self.task.bpw(most + self.task.fixed_bytes)
        return (*self.measured.notes, f"more than {reached:.4g}bpw buys nothing with these schemes")

    @property
    def nbytes(self) -> int:
        """Stored bytes of all quantized matrices."""
        sizes = (unit.sizes[index] for unit, index in zip(self.units, self.chosen, strict=True))
        return sum(sizes) + self.task.fixed_bytes

    @property
    def error(self) -> float:
        """The sum of the units' errors."""
        return sum(errors[index] for errors, index in zip(self.errors, self.chosen, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `surgery allocate --json`."""
        task = self.task
        return {
            "schema": 1, "model": task.model, "op": task.op, "budget": self.budget.text,
            "bytes": self.nbytes, "bpw": task.bpw(self.nbytes), "error": self.error,
            "output_bytes": self.nbytes - task.fixed_bytes + task.beside_bytes,
            "least_bytes": task.least + task.fixed_bytes, "most_bytes": task.most + task.fixed_bytes,
            "uniform": {
                scheme: {
                    "bytes": sum(unit.sizes[index] for unit in self.units) + task.fixed_bytes,
                    "error": sum(errors[index] for errors in self.errors),
                }
                for index, scheme in enumerate(self.schemes)
            },
            "units": [
                {
                    "layer": unit.layer, "role": unit.role, "matrices": len(unit.names),
                    "weights": unit.weights, "scheme": self.schemes[index], "bytes": unit.sizes[index],
                    "error": errors[index], "errors": dict(zip(self.schemes, errors, strict=True)),
                    "sizes": dict(zip(self.schemes, unit.sizes, strict=True)),
                }
                for unit, errors, index in zip(self.units, self.errors, self.chosen, strict=True)
            ],
            "walk": dict(self.measured.walk), "notes": list(self.notes),
        }  # fmt: skip

    @cached_property
    def recipe(self) -> str:
        """The recipe of the choice: valid, and in the words of a person."""
        task = self.task
        errors = [each[index] for each, index in zip(self.errors, self.chosen, strict=True)]
        entries = task.entries(self.chosen, errors)
        notes = {entry: _told(units) for entry, units in entries.items()}
        head = [
            f"Bits by layer and role, chosen by `surgery allocate` under a budget of {self.budget.text}:",
            f"{task.bpw(self.nbytes):.4g} bits per weight, {format_bytes(self.nbytes)} in all.",
            "Behind each entry: where it holds, and the relative squared error of the outputs there,",
            f"rounded to nearest. They sum to {self.error:.4g}.",
        ]
        text = recipe_text(task.document(entries), notes, head)
        _check(parse_recipe(text, "the recipe").recipe.steps[0].operator, self)
        return text


def allocate(
    model: str | Path,
    budget: str,
    calibration: Any,
    *,
    schemes: Sequence[str] = SCHEMES,
    protect: Sequence[str] = (),
    overrides: Sequence[str] = (),
    out: Path | None = None,
    context: RunContext | None = None,
    fresh: bool = False,
) -> Allocation:
    """Choose the bits of each layer and role, and write the recipe to `out`.

    budget: bits per weight of the quantized matrices (`3.2bpw`), or bytes of all weight files (`2.5GB`).
    calibration: as in a recipe. protect: selectors of matrices that stay as they are; overrides: params of
    the step, such as `schemes.attention=int8-g64` for some that are settled.

    Beside `out` the walk keeps what it needs to go on after a stop. Raises PlanError for budgets that cannot
    be met and whatever makes a walk impossible, UsageError and RecipeError for params that are none.
    """
    context = context or RunContext()
    task = open_task(model, calibration, schemes, protect, overrides)
    asked = task.budget(budget)
    needs = estimate(task, context)
    check_walks([needs])
    check_device([needs], context)
    with _place(out, task, fresh) as folder:
        found = choose(task, asked, measure(task, replace(context, folder=folder)))
        if out is not None:
            out.write_text(found.recipe, encoding="utf-8")
    return found


def estimate(task: Task, context: RunContext) -> dict[str, Any]:
    """What the walk needs."""
    from surgery.operators.layerwise.operator import estimate_waves

    found = estimate_waves(
        task.walking.calibration, task.checkpoint, context, _plan(task, context), gram=True
    )
    return {"op": "allocate", **found}


def measure(task: Task, context: RunContext) -> Measured:
    """Walk, and measure every unit with every scheme."""
    from surgery.operators.layerwise.operator import solver_room
    from surgery.operators.layerwise.sensitivity import Rounder, Sensing
    from surgery.operators.together import data_events, find_route

    walking = task.walking
    rounders = [Rounder(each, walking.grid, walking.scale_dtype) for each in task.schemes.values()]
    route = find_route(task.checkpoint, walking.calibration, "original", context)
    taker = Sensing(_plan(task, context), rounders, route.device, solver_room(context))
    asked = {"op": "allocate", "params": walking.summary(), "schemes": list(task.schemes)}
    fingerprint = route.fingerprint([asked])
    route.walk(taker.steps, walking.experts_share, fingerprint)
    sums = [taker.sums[unit.layer, unit.role] for unit in task.units]
    notes = [event.message for event in data_events(route.data.found)]
    unseen = [f"layer {unit.layer}" for unit, each in zip(task.units, sums, strict=True) if not each.outputs]
    if unseen:
        notes.append(f"no token came to {', '.join(unseen)}: judged by their weights alone")
    return Measured([each.errors for each in sums], fingerprint, tuple(notes))


def choose(task: Task, budget: Budget, measured: Measured) -> Allocation:
    """The least sum of errors for the budget."""
    from surgery.operators.quantize.allocate import allocate_bits

    chosen = allocate_bits(measured.errors, [unit.sizes for unit in task.units], budget.nbytes)
    return Allocation(task, budget, measured, tuple(chosen))


def _plan(task: Task, context: RunContext) -> dict[int, list[list[Matrix]]]:
    from surgery.operators.layerwise.operator import sums_room
    from surgery.operators.layerwise.select import waves

    room = sums_room(context)
    return {
        layer: waves(matrices, room, gram=True, sequential=False) for layer, matrices in task.matrices.items()
    }


def _check(operator: Operator, found: Allocation) -> None:
    """Make sure that the entries say what was chosen."""
    from surgery.operators.quantize.precision import Precision

    if not isinstance(operator, Precision):
        raise TypeError(f"{operator.op} has no schemes")
    names = found.schemes
    for unit, index in zip(found.units, found.chosen, strict=True):
        for name in unit.names:
            scheme = operator.scheme_of(found.task.checkpoint.tensors[name])
            if str(scheme) != names[index]:
                raise TypeError(f"{name} would become {scheme}, not {names[index]}")


def _told(units: Sequence[UnitScheme]) -> str:
    """Where an entry holds, and the errors there."""
    low, high = min(unit.error for unit in units), max(unit.error for unit in units)
    figures = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"
    return f"{layers_in_words(unit.layer for unit in units)}: {figures}"


@contextmanager
def _place(out: Path | None, task: Task, fresh: bool) -> Iterator[Path | None]:
    """The folder that the walk goes on from after a stop."""
    if out is None:
        yield None
        return
    asked = {"model": task.model, "params": task.walking.summary(), "schemes": list(task.schemes)}
    with walk_place(out, [asked], fresh=fresh) as folder:
        yield folder
