"""Plan and run a recipe: the one place that knows the order of things."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import RecipeError
from surgery.recipe.build import build
from surgery.recipe.load import LoadedRecipe
from surgery.report.html import render_report
from surgery.stream.checkpoint import Checkpoint
from surgery.stream.formats import apply_format
from surgery.stream.save import (
    SaveOptions,
    SaveResult,
    check_apart,
    check_output,
    check_readable,
    refuse_events,
    save,
)
from surgery.stream.source import collector_paused
from surgery.stream.survey import Survey, check_disk, check_memory, free_bytes, survey

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

    @property
    def shortage_bytes(self) -> int:
        """Bytes by which the disk is too small; 0 where it suffices."""
        return max(0, self.survey.disk_bytes - self.free_bytes)

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
                    "local": source.readable, "files": len(source.files),
                    "bytes": stored[source.label], "bytes_read": plan.reads.get(source.label, 0),
                }
                for source in checkpoint.inputs
            ],
            "architecture": checkpoint.architecture.name,
            "model_type": checkpoint.config.get("model_type"),
            "passes": [{
                "steps": [str(step["op"]) for step in checkpoint.history],
                "bytes_read": dict(plan.reads), "bytes_written": plan.output_bytes,
            }],
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
                "needed": plan.disk_bytes, "free": self.free_bytes, "shortage": self.shortage_bytes,
                "folder": str(self.out or Path.cwd()),
            },
            "memory": {"budget": self.memory_bytes, "largest_job": plan.peak_bytes},
            "events": [event.as_dict() for event in checkpoint.events],
        }  # fmt: skip


def plan_recipe(loaded: LoadedRecipe, out: Path | None = None, memory_bytes: int = 1 << 30) -> Plan:
    """What a run would do. With `out` it refuses what `run` would refuse (PlanError); without, a
    shortage of disk is only reported."""
    recipe = loaded.recipe
    with collector_paused():
        checkpoint = apply_format(_built(loaded), recipe.output.format)
        estimate = survey(checkpoint, recipe.output.shard_bytes)
    if out is not None:
        check_output(out, overwrite=False)
        check_apart(out, checkpoint)
        check_readable(checkpoint)
        check_disk(estimate.disk_bytes, out)
        check_memory(estimate, memory_bytes)
    return Plan(checkpoint, estimate, recipe.output.format, out, free_bytes(out or Path.cwd()), memory_bytes)


def run_recipe(loaded: LoadedRecipe, out: Path, options: SaveOptions) -> SaveResult:
    """Build and write the recipe's result. Of `options` the recipe's output settings are replaced."""
    recipe = loaded.recipe
    with collector_paused():
        checkpoint = _built(loaded)
    refuse_events(checkpoint.events, options.strict)
    resolved = recipe.resolved()
    return save(
        checkpoint,
        out,
        replace(
            options,
            format=recipe.output.format,
            shard_bytes=recipe.output.shard_bytes,
            allow_nonfinite=recipe.output.allow_nonfinite,
            recipe=resolved,
            extras=lambda manifest: _extras(checkpoint, resolved, manifest),
        ),
    )


def _built(loaded: LoadedRecipe) -> Checkpoint:
    try:
        return build(loaded.recipe, Path(loaded.filename).parent if loaded.text else None)
    except RecipeError as error:
        raise loaded.attach(error) from error


def _extras(
    checkpoint: Checkpoint, resolved: Mapping[str, Any], manifest: Mapping[str, Any]
) -> Mapping[str, str]:
    """The recipe that makes this output again (inputs pinned), and the report."""
    pinned = {
        source.label: f"{source.model.partition('@')[0]}@{source.revision}" if source.revision
        else os.path.abspath(source.model)
        for source in checkpoint.inputs
    }  # fmt: skip
    recipe = {**resolved, "parents": {**resolved["parents"], **pinned}}
    return {
        RECIPE: yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        REPORT: render_report(manifest),
    }
