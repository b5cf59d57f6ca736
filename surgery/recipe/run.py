"""Plan and run a recipe: the one place that knows the order of things."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from surgery.calibrate.data import find_file
from surgery.calibrate.ranks import joined_ranks
from surgery.calibrate.skeleton import placement
from surgery.errors import PlanError, RecipeError
from surgery.operators.protocol import LayerOperator, RunContext
from surgery.recipe.build import Apply, Parents, build, glance_at_parents, outline
from surgery.recipe.load import LoadedRecipe
from surgery.recipe.walks import Planner, Walker, walk_folder, walk_place
from surgery.report.html import render_report
from surgery.stream.checkpoint import Checkpoint
from surgery.stream.formats import apply_format
from surgery.stream.hub import pinned
from surgery.stream.save import (
    SaveOptions,
    SaveResult,
    bytes_in,
    check_apart,
    check_output,
    refuse_events,
    save,
    work_folder,
)
from surgery.stream.source import collector_paused
from surgery.stream.survey import Survey, check_disk, check_memory, free_bytes, survey
from surgery.stream.units import format_bytes

RECIPE = "surgery_recipe.yaml"
REPORT = "surgery_report.html"


@dataclass(frozen=True)
class Plan:
    """What a recipe will read, write and need, from headers alone."""

    checkpoint: Checkpoint
    survey: Survey
    format: str
    out: Path | None
    free_bytes: int
    memory_bytes: int
    walks: tuple[Mapping[str, Any], ...] = ()
    """What the layer steps need, in order."""

    @property
    def disk_bytes(self) -> int:
        """The output, what walks solved before it is written, and the largest of the walks beside that."""
        spools: int = sum(walk.get("spool_bytes", 0) for walk in self.walks)
        passing: int = max((walk.get("disk_bytes", 0) for walk in self.walks), default=0)
        return self.survey.disk_bytes + spools + passing

    @property
    def shortage_bytes(self) -> int:
        """Bytes by which the disk is too small; 0 where it suffices."""
        return max(0, self.disk_bytes - self.free_bytes)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `surgery plan --json`."""
        checkpoint, plan = self.checkpoint, self.survey
        stored = {source.label: sum(file.size for file in source.files) for source in checkpoint.inputs}
        mtp = [each for each in plan.coverage if each.mtp]
        return {
            "schema": 1,
            "parents": [
                {
                    "name": source.label, "model": source.model, "revision": source.revision,
                    "local": source.local, "files": len(source.files),
                    "bytes": stored[source.label], "bytes_read": plan.reads.get(source.label, 0),
                }
                for source in checkpoint.inputs
            ],
            "architecture": checkpoint.architecture.name,
            "model_type": checkpoint.config.get("model_type"),
            "passes": [
                *({"walk": True, "steps": [walk["op"]], **walk, "bytes_written": 0} for walk in self.walks),
                {
                    "walk": False, "steps": [str(step["op"]) for step in checkpoint.history],
                    "bytes_read": sum(plan.reads.values()), "bytes_written": plan.output_bytes,
                },
            ],
            "coverage": [each.as_dict() for each in plan.coverage],
            "mtp": {
                "tensors": sum(each.tensors for each in mtp), "bytes": sum(each.nbytes for each in mtp),
            },
            "dropped": dict(checkpoint.dropped),
            "output": {
                "format": self.format, "tensors": len(checkpoint.tensors), "shards": len(plan.shards),
                "bytes": plan.output_bytes,
            },
            "disk": {
                "needed": self.disk_bytes, "free": self.free_bytes, "shortage": self.shortage_bytes,
                "folder": str(self.out or Path.cwd()),
            },
            "memory": {"budget": self.memory_bytes, "largest_job": plan.peak_bytes},
            "events": [event.as_dict() for event in checkpoint.events],
        }  # fmt: skip


def plan_recipe(
    loaded: LoadedRecipe,
    out: Path | None = None,
    memory_bytes: int = 1 << 30,
    context: RunContext | None = None,
    *,
    refuse: bool = True,
) -> Plan:
    """What a run would do. With `out` it refuses what `run` would refuse (PlanError); without, or unless
    `refuse`, a shortage of disk is only reported. `context` says where layer steps would walk."""
    recipe = loaded.recipe
    planner = Planner(_beside(loaded, replace(context or RunContext(), memory_bytes=memory_bytes)))
    with collector_paused():
        checkpoint = apply_format(built(loaded, planner.apply), recipe.output.format)
        estimate = survey(checkpoint, recipe.output.shard_bytes)
    free = free_bytes(out or Path.cwd())
    plan = Plan(
        checkpoint, estimate, recipe.output.format, out, free, memory_bytes, tuple(planner.walks)
    )  # fmt: skip
    if out is not None and refuse:
        check_output(out, overwrite=False)
        check_apart(out, checkpoint)
        check_disk(plan.disk_bytes, out)
        check_memory(estimate, memory_bytes)
        check_walks(plan.walks)
    return plan


def glance_recipe(loaded: LoadedRecipe) -> dict[str, Any]:
    """The JSON document of `surgery plan --index-only --json`: the parents by their indexes alone."""
    found = glance_at_parents(loaded.recipe, _folder_of(loaded))
    return {"schema": 1, "index_only": True, "parents": [each.as_dict() for each in found]}


def check_walks(walks: Sequence[Mapping[str, Any]]) -> None:
    """Refuse walks on a CPU that need more memory than the machine has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for walk in walks:
        need = walk.get("host_bytes", 0)
        if need > total:
            raise PlanError(
                f"the walk of {walk['op']} needs {format_bytes(need)} of memory, this machine has "
                f"{format_bytes(total)}",
                hint="walk with fewer or shorter demonstrations, or on a GPU (--device cuda)",
            )


def check_device(walks: Sequence[Mapping[str, Any]], context: RunContext) -> None:
    """Refuse walks for which the device is not there, or too small."""
    device, _ = placement(context.device, context.dtype)
    if device.type != "cuda":
        return
    import torch

    _, total = torch.cuda.mem_get_info(device)
    for walk in walks:
        need = walk.get("device_bytes", 0) - walk.get("parts", {}).get("experts_kept", 0)
        if need > total:
            raise PlanError(
                f"the walk of {walk['op']} needs {format_bytes(need)} on the GPU, which has "
                f"{format_bytes(total)}",
                hint="walk with shorter demonstrations, or on the CPU",
            )


def run_recipe(
    loaded: LoadedRecipe, out: Path, options: SaveOptions, context: RunContext | None = None
) -> SaveResult:
    """Build and write the recipe's result. Of `options` the recipe's output settings are replaced; `context`
    says where layer steps walk, with the memory, threads and progress of `options`. Of several processes
    (torchrun) the first runs this, the others `follow_recipe`."""
    recipe = loaded.recipe
    if not any(isinstance(step.operator, LayerOperator) for step in recipe.steps):
        with collector_paused():
            checkpoint = built(loaded)
        return _save(loaded, checkpoint, out, options)
    context = _walking(loaded, options, context)
    out = Path(os.path.realpath(out))
    check_output(out, options.overwrite)
    planned = plan_recipe(loaded, None, options.memory_bytes, context)
    check_apart(out, planned.checkpoint)
    there = 0 if options.fresh else sum(map(bytes_in, (work_folder(out), walk_folder(out))))
    check_disk(planned.disk_bytes - there, out)
    check_memory(planned.survey, options.memory_bytes)
    check_walks(planned.walks)
    if planned.walks:
        check_device(planned.walks, context)
    steps = [step.resolved() for step in recipe.steps]
    with walk_place(out, steps, fresh=options.fresh) as folder:
        with joined_ranks() as ranks:
            operators = [step.operator for step in recipe.steps]
            walker = Walker(replace(context, ranks=ranks), folder, operators, options.fresh)
            checkpoint = built(loaded, walker.apply)
        return _save(loaded, checkpoint, out, options)


def follow_recipe(
    loaded: LoadedRecipe, out: Path, options: SaveOptions, context: RunContext | None = None
) -> None:
    """Take part in the walks of a `run_recipe` that another process leads; write nothing."""
    folder = walk_folder(Path(os.path.realpath(out)))
    context = _walking(loaded, options, context)
    with joined_ranks() as ranks:
        operators = [step.operator for step in loaded.recipe.steps]
        built(loaded, Walker(replace(context, ranks=ranks), folder, operators, options.fresh).apply)


def _walking(loaded: LoadedRecipe, options: SaveOptions, context: RunContext | None) -> RunContext:
    """The context of this run; without one of its own it takes the threads of `options`."""
    context = context or RunContext(threads=options.threads)
    return replace(_beside(loaded, context), memory_bytes=options.memory_bytes, progress=options.progress)


def _save(loaded: LoadedRecipe, checkpoint: Checkpoint, out: Path, options: SaveOptions) -> SaveResult:
    refuse_events(checkpoint.events, options.strict)
    return save(checkpoint, out, output_options(loaded, checkpoint, options))


def output_options(loaded: LoadedRecipe, checkpoint: Checkpoint, options: SaveOptions) -> SaveOptions:
    """`options` with the output settings of the recipe, and what the output says of it."""
    recipe = loaded.recipe
    resolved = recipe.resolved()
    return replace(
        options,
        format=recipe.output.format,
        shard_bytes=recipe.output.shard_bytes,
        allow_nonfinite=recipe.output.allow_nonfinite,
        recipe=resolved,
        extras=lambda manifest: _extras(loaded, checkpoint, resolved, manifest),
    )


def _beside(loaded: LoadedRecipe, context: RunContext) -> RunContext:
    """The context with the recipe's own folder to look up data in."""
    return replace(context, beside=(Path(loaded.filename).parent,)) if loaded.text else context


def built(loaded: LoadedRecipe, apply: Apply = outline, parents_of: Parents | None = None) -> Checkpoint:
    """The recipe's result as `build` makes it, complaints located."""
    try:
        return build(loaded.recipe, _folder_of(loaded), apply, parents_of)
    except RecipeError as error:
        raise loaded.attach(error) from error


def _folder_of(loaded: LoadedRecipe) -> Path | None:
    return Path(loaded.filename).parent if loaded.text else None


def _with_places(value: Any, places: Mapping[str, str]) -> Any:
    """Params with data files by their absolute paths."""
    if isinstance(value, Mapping):
        return {key: _with_places(each, places) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_places(each, places) for each in value]
    return places.get(value, value) if isinstance(value, str) else value


def _extras(
    loaded: LoadedRecipe, checkpoint: Checkpoint, resolved: Mapping[str, Any], manifest: Mapping[str, Any]
) -> Mapping[str, str]:
    """The recipe that makes this output again (inputs pinned, data files by absolute paths), and the
    report."""
    context = _beside(loaded, RunContext())
    steps = []
    for step, params in zip(loaded.recipe.steps, resolved["steps"], strict=True):
        operator = step.operator
        names = operator.data_hashes(context) if isinstance(operator, LayerOperator) else {}
        places = {name: os.path.abspath(find_file(name, context.beside)) for name in names}
        steps.append(_with_places(params, places))
    parents = {
        source.label: pinned(source.model, source.revision) if source.revision
        else os.path.abspath(source.model)
        for source in checkpoint.inputs
    }  # fmt: skip
    recipe = {**resolved, "parents": {**resolved["parents"], **parents}, "steps": steps}
    return {
        RECIPE: yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        REPORT: render_report(manifest),
    }
