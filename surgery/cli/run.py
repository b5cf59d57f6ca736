"""`surgery run`, `surgery plan`, `surgery validate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli.options import (
    DEFAULT_MEMORY,
    Device,
    Dtype,
    Fresh,
    Json,
    Memory,
    Out,
    Overwrite,
    Quiet,
    Recipe,
    RemoteCode,
    Set,
    Strict,
    Threads,
    memory_bytes,
)
from surgery.cli.render import Output
from surgery.errors import InterruptedRun

if TYPE_CHECKING:
    from surgery.operators.protocol import RunContext
    from surgery.recipe.load import LoadedRecipe
    from surgery.recipe.run import Plan
    from surgery.stream.save import SaveOptions


def register(app: typer.Typer) -> None:
    app.command()(run)
    app.command()(plan)
    app.command()(validate)


def run(
    recipe: Recipe,
    out: Out,
    set_: Set = None,
    memory: Memory = DEFAULT_MEMORY,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: RemoteCode = False,
    no_hash: Annotated[bool, typer.Option("--no-hash", help="Do not hash files while writing.")] = False,
    fresh: Fresh = False,
    overwrite: Overwrite = False,
    strict: Strict = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build a recipe's model. The same command resumes after a stop."""
    from surgery.operators.protocol import RunContext
    from surgery.recipe.load import load_recipe
    from surgery.stream.save import SaveOptions, cores

    output = Output(json=json, quiet=quiet or json)
    loaded = load_recipe(recipe, set_ or ())
    context = RunContext(device=device, dtype=dtype, threads=threads, trust_remote_code=trust_remote_code)
    with output.progress() as tell, resumable():
        options = SaveOptions(
            hash=not no_hash, memory_bytes=memory_bytes(memory), threads=threads or cores(), device=device,
            overwrite=overwrite, fresh=fresh, strict=strict, progress=tell,
        )  # fmt: skip
        run_and_show(output, loaded, out, options, context)


def run_and_show(
    output: Output, loaded: LoadedRecipe, out: Path, options: SaveOptions, context: RunContext
) -> None:
    """Run a recipe and show what came of it; of several processes (torchrun), the first one speaks."""
    from surgery.calibrate.ranks import started_ranks
    from surgery.recipe.run import follow_recipe, run_recipe

    if started_ranks().leads:
        result = run_recipe(loaded, out, options, context)
        show_result(output, result.folder, result.manifest)
    else:
        follow_recipe(loaded, out, options, context)


@contextmanager
def resumable() -> Iterator[None]:
    """Tell users who stop a run how it goes on."""
    try:
        yield
    except (InterruptedRun, KeyboardInterrupt):
        command = shlex.join(["surgery", *sys.argv[1:]])
        raise InterruptedRun(
            "stopped by the user", hint=f"what is finished is kept; resume with: {command}"
        ) from None


def show_result(output: Output, folder: Path, manifest: Any) -> None:
    """What was written, where every tensor came from, and how far the parents are apart."""
    from surgery.report.by_role import cosines_in_words, distance_rows, norm_rows
    from surgery.report.matrices import in_words, matrix_tables
    from surgery.report.ratios import ratio_tables, ratios_in_words
    from surgery.stream.units import format_bytes

    norms = norm_rows(manifest)
    if output.json:
        keys = ("schema", "output", "coverage", "dropped", "events", "inputs", "run")
        kept = {key: manifest[key] for key in keys}
        measured = {"distances": distance_rows(manifest), "task_vectors": norms}
        output.document({"folder": str(folder), **kept, **measured})
        return
    output.events(manifest["events"])
    if manifest["run"].get("gpu_passes") == 0 and manifest["run"]["kernels"]:
        kernels = manifest["run"]["kernels"]
        reason = kernels.get("gpu_reason") or kernels.get("reason")
        reason = reason or "too small, or by a method without GPU kernels"
        output.say(f"device  every tile was made on the CPU: {reason}")
    coverage_table(output, "Where the tensors come from", manifest["coverage"])
    distances = [
        (row["parent"], row["role"], _figure(row["rms"]), _range(row["relative"]), row["measured"])
        for row in distance_rows(manifest)
    ]
    if distances:
        columns = ("parent", "role", "rms", "relative", "measured")
        output.table("Distance of the parents from the base", columns, distances, right=(2, 3))
    if norms:
        columns = ("source", "role", "norm", "rms", "cosine")
        lengths = [
            (row["source"], row["role"], _figure(row["norm"]), _figure(row["rms"]), cosines_in_words(row))
            for row in norms
        ]
        output.table("Task vectors, the sources less the base", columns, lengths, right=(2, 3))
    for row in manifest["measurements"]:
        if row.get("kind") == "experts":
            output.say(f"{row['op']}: {row['kept']} of {row['experts']} experts stay in each layer")
    for found in ratio_tables(manifest):
        output.say(ratios_in_words(found))
    for op, rows in matrix_tables(manifest):
        for sentence in in_words(op, rows):
            output.say(sentence)
    if manifest["dropped"]:
        output.say(f"{len(manifest['dropped'])} tensors were dropped; the manifest names each and says why")
    ran = manifest["run"]
    output.say(
        f"{folder}: {manifest['output']['tensors']} tensors, {format_bytes(manifest['output']['bytes'])}, "
        f"{ran['seconds']:.1f} s, peak memory {format_bytes(ran['peak_rss_bytes'])}"
    )
    output.next(f"surgery verify {shlex.quote(str(folder))}")


def coverage_table(output: Output, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Tensors by role and by what happens to them."""
    from surgery.stream.units import format_bytes

    cells = []
    for row in rows:
        role = row["role"] + (" (MTP)" if row["mtp"] else "")
        cells.append((role, row["action"], row["tensors"], format_bytes(row["bytes"])))
    output.table(title, ("role", "origin", "tensors", "bytes"), cells, right=(2, 3))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _range(ends: list[float] | None) -> str:
    if ends is None:
        return "–"
    low, high = (f"{end:.2g}" for end in ends)
    return low if low == high else f"{low} … {high}"


def plan(
    recipe: Recipe,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Refuse what `run` would.")
    ] = None,
    set_: Set = None,
    memory: Memory = DEFAULT_MEMORY,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: RemoteCode = False,
    index_only: Annotated[
        bool,
        typer.Option("--index-only", help="Only a first look at the parents: a few requests each."),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a recipe reads, writes and needs, from headers alone."""
    from surgery.operators.protocol import RunContext
    from surgery.recipe.load import load_recipe
    from surgery.recipe.run import glance_recipe, plan_recipe

    output = Output(json=json, quiet=quiet or json)
    loaded = load_recipe(recipe, set_ or ())
    if index_only:
        seen = glance_recipe(loaded)
        if json:
            output.document(seen)
        else:
            _show_glance(output, seen)
        return
    context = RunContext(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    show_plan(output, plan_recipe(loaded, out, memory_bytes(memory), context))


def _show_glance(output: Output, found: dict[str, Any]) -> None:
    from surgery.stream.units import format_bytes as size

    output.table(
        "Parents",
        ("name", "model", "commit", "type", "shards", "here", "size"),
        [
            (
                parent["name"], parent["model"], (parent["revision"] or "")[:12], parent["model_type"],
                parent["shards"], parent["local_shards"],
                "?" if parent["bytes"] is None else size(parent["bytes"]),
            )
            for parent in found["parents"]
        ],
        right=(4, 5, 6),
    )  # fmt: skip
    output.table(
        "Tensors",
        ("name", "role", "tensors"),
        [
            (parent["name"], row["role"] + (" (MTP)" if row["mtp"] else ""), row["tensors"])
            for parent in found["parents"]
            for row in parent["roles"]
        ],
        right=(2,),
    )
    output.say("from the indexes alone; leave out --index-only for bytes, disk and memory")


def show_plan(output: Output, planned: Plan) -> None:
    """A plan as tables, or as the one document of --json."""
    from surgery.stream.units import format_bytes as size

    found = planned.as_dict()
    if output.json:
        output.document(found)
        return
    output.events(found["events"])
    output.table(
        "Parents",
        ("name", "model", "shards", "size", "to read"),
        [
            (
                parent["name"],
                parent["model"] + ("" if parent["local"] else " (remote)"),
                parent["files"],
                size(parent["bytes"]),
                size(parent["bytes_read"]),
            )
            for parent in found["parents"]
        ],
        right=(2, 3, 4),
    )
    coverage_table(output, "Tensors", found["coverage"])
    made, disk, memory, mtp = found["output"], found["disk"], found["memory"], found["mtp"]
    if mtp["tensors"]:
        output.say(f"MTP layer   {mtp['tensors']} tensors, {size(mtp['bytes'])}, in the table above")
    output.say(
        f"output      {made['tensors']} tensors, {size(made['bytes'])} in {made['shards']} shards, "
        f"format {made['format']}"
    )
    verdict = f"{size(disk['shortage'])} too little" if disk["shortage"] else "enough"
    output.say(
        f"disk        {size(disk['needed'])} needed, {size(disk['free'])} free in {disk['folder']}: {verdict}"
    )
    output.say(
        f"memory      {size(memory['budget'])} budget for buffers, largest job {size(memory['largest_job'])}"
    )
    for number, each in enumerate(found["passes"], 1):
        steps = " → ".join(each["steps"])
        if not each["walk"]:
            read, written = size(each["bytes_read"]), size(each["bytes_written"])
            output.say(f"pass {number}      {steps}: reads {read}, writes {written}")
        elif "tokens" in each:
            output.say(
                f"pass {number}      walk for {steps}{_finds(each)}: reads {size(each['bytes_read'])}; "
                f"{each['tokens']:,} tokens in {each['dtype']} on {each['device']}"
            )
            if each["reads_of_the_model"] > 2:
                output.note(
                    f"experts that do not fit are read again for every batch: {each['reads_of_the_model']:g} "
                    "times the model in all; a larger --memory keeps them"
                )
            output.say(
                f"            device {size(each['device_bytes'])}, host {size(each['host_bytes'])}, "
                f"disk {size(each['disk_bytes'])}"
            )
        else:
            output.say(f"pass {number}      weights for {steps}: reads {size(each['bytes_read'])}")
    if found["dropped"]:
        output.say(f"dropped     {len(found['dropped'])} tensors")


def _finds(found: Mapping[str, Any]) -> str:
    """What a walk is for that changes nothing."""
    return f" to find {found['finds']}" if "finds" in found else ""


def validate(recipe: Recipe, set_: Set = None, json: Json = False) -> None:
    """Check a recipe's form: keys, values, names. Opens no model."""
    from surgery.recipe.load import load_recipe

    output = Output(json=json)
    loaded = load_recipe(recipe, set_ or ())
    if json:
        output.document({"schema": 1, "valid": True, "recipe": loaded.recipe.resolved()})
    else:
        output.say(f"{loaded.filename} is valid")
