"""`surgery sweep`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli.evaluate import interval
from surgery.cli.options import (
    DEFAULT_MEMORY,
    Device,
    Dtype,
    Json,
    Memory,
    Out,
    Quiet,
    Recipe,
    RemoteCode,
    Set,
    Threads,
    memory_bytes,
)
from surgery.cli.render import Output
from surgery.cli.run import resumable
from surgery.errors import PlanError, SurgeryError, UsageError

if TYPE_CHECKING:
    from surgery.recipe.sweep_plan import SweepPlan

Over = Annotated[
    list[str] | None,
    typer.Option(
        "--over", metavar="PATH=VALUES", help="Values of a field: START:STOP:STEP or A,B,C. Repeatable."
    ),
]
SelectOver = Annotated[
    str | None,
    typer.Option(
        "--select-over", metavar="CLASSES",
        help="Tensors that the step takes: all, routed, attention, shared, others (not routed), or any "
        "selector, joined by commas.",
    ),
]  # fmt: skip


def register(app: typer.Typer) -> None:
    app.command()(sweep)


def sweep(
    recipe: Recipe,
    out: Out,
    over: Over = None,
    select_over: SelectOver = None,
    tasks: Annotated[
        Path | None, typer.Option("--tasks", metavar="JSONL", help="Problems: prompt, answer, task.")
    ] = None,
    text: Annotated[Path | None, typer.Option("--text", metavar="FILE", help="Text for perplexity.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Problems per task.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 512,
    answer: Annotated[
        str | None,
        typer.Option(
            "--answer", metavar="REGEX", help="Group 1 is the answer (default: after the last `Answer:`)."
        ),
    ] = None,
    tag: Annotated[str, typer.Option("--tag", help="Tag whose share of replies is counted.")] = "<think>",
    keep: Annotated[
        str, typer.Option("--keep", help="Children to keep once measured: all, best or none.")
    ] = "all",
    max_points: Annotated[int, typer.Option("--max-points", min=1, help="Refuse a larger grid.")] = 100,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would make and need.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Restart instead of resuming.")] = False,
    set_: Set = None,
    memory: Memory = DEFAULT_MEMORY,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: RemoteCode = False,
    no_hash: Annotated[bool, typer.Option("--no-hash", help="Do not hash files while writing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make and measure a recipe's children over a grid of values. The same command resumes."""
    from surgery.recipe.grid import axes_of, points_of
    from surgery.recipe.load import load_recipe
    from surgery.recipe.sweep import KEEPS, Measuring, run_sweep
    from surgery.recipe.sweep_plan import plan_sweep
    from surgery.stream.save import SaveOptions, cores

    output = Output(json=json, quiet=quiet or json)
    if keep not in KEEPS:
        raise UsageError(f"--keep {keep}: keep all, best or none of the children")
    axes = axes_of(over or (), select_over)
    points = points_of(axes, max_points)
    measuring = Measuring(
        tasks=tasks, text=text, limit=limit, max_new_tokens=max_new_tokens, answer=answer, tag=tag,
        device=device, dtype=dtype, threads=threads, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    measuring.check()
    planned = plan_sweep(lambda more: load_recipe(recipe, [*(set_ or ()), *more]), axes, points, out)
    output.events([event.as_dict() for event in planned.events])
    if dry_run:
        _show_plan(output, planned)
        return
    with output.progress() as tell, resumable():
        options = SaveOptions(
            hash=not no_hash, memory_bytes=memory_bytes(memory), threads=threads or cores(),
            device=device, fresh=fresh, progress=tell,
        )  # fmt: skip
        found = run_sweep(planned, measuring, options, keep=keep, said=lambda row: output.step(_told(row)))
    if json:
        output.document({"folder": str(found.folder), **found.document})
    else:
        show_sweep(output, found.document)
        kept = sum(bool(row["folder"]) for row in found.document["points"])
        output.say(f"children  {kept} in {found.folder}")
        if measuring.wanted:
            output.say(f"figure    {found.folder / 'sweep.html'}")
    if found.failed:
        raise SurgeryError(
            f"{len(found.failed)} of {len(found.document['points'])} points could not be measured, first "
            f"{found.failed[0]['name']}: {found.failed[0]['error']}",
            hint="the same command tries them again",
        )


def show_sweep(output: Output, document: Mapping[str, Any]) -> None:
    """One row per point; figures with the ends of their 95 % intervals."""
    labels = [axis["label"] for axis in document["axes"]]
    rows = document["points"]
    columns = [*labels]
    tagged = next((row["figures"]["tasks"]["tag"] for row in rows if _has(row, "tasks")), None)
    if tagged:
        columns += ["problems", "accuracy", "reply tokens", f"with {tagged}"]
    texts = any(_has(row, "perplexity") for row in rows)
    if texts:
        columns.append("perplexity")
    cells = [_cells(row, labels, tasks=bool(tagged), text=texts) for row in rows]
    output.table("Children", columns, cells, right=range(len(labels), len(columns)))


def _has(row: Mapping[str, Any], key: str) -> bool:
    return bool(row["figures"] and row["figures"][key])


def _cells(row: Mapping[str, Any], labels: Sequence[str], *, tasks: bool, text: bool) -> list[str]:
    cells = [row["values"].get(label, "") for label in labels]
    if tasks:
        score = row["figures"]["tasks"] if _has(row, "tasks") else None
        cells += [
            str(score["problems"]), interval(score["accuracy"], "{:.2f}"),
            interval(score["reply_tokens"], "{:.0f}"), interval(score["tagged"], "{:.2f}"),
        ] if score else ["failed", "–", "–", "–"]  # fmt: skip
    if text:
        cells.append(interval(row["figures"]["perplexity"], "{:.3f}") if _has(row, "perplexity") else "–")
    return cells


def _told(row: Mapping[str, Any]) -> str:
    """A point in one line, as soon as it is measured."""
    if row["error"]:
        return f"{row['name']}  failed: {row['error']}"
    told = [row["name"]]
    if _has(row, "tasks"):
        score = row["figures"]["tasks"]
        told.append(
            f"accuracy {score['accuracy']['value']:.2f}, {score['reply_tokens']['value']:.0f} tokens, "
            f"{score['tagged']['value']:.0%} with {score['tag']}"
        )
    if _has(row, "perplexity"):
        told.append(f"perplexity {row['figures']['perplexity']['value']:.3f}")
    if row["same_as"]:
        told.append(f"the same child as {row['same_as']}")
    return "  ".join(told)


def _show_plan(output: Output, planned: SweepPlan) -> None:
    """What a sweep would make; refused where the disk is too small."""
    from surgery.stream.units import format_bytes as size

    found = planned.as_dict()
    disk = found["disk"]
    if output.json:
        output.document(found)
    else:
        labels = [axis["label"] for axis in found["axes"]]
        rows = [[point["name"], *(point["values"][label] for label in labels)] for point in found["points"]]
        output.table("Points", ("child", *labels), rows)
        if found["bytes_read"] is not None:
            told = ", ".join(f"{size(count)} of {name}" for name, count in found["bytes_read"].items())
            output.say(f"reads       {told}, once for all children")
        else:
            output.say("reads       the parents once for each child: they differ in more than their values")
        output.say(
            f"writes      {size(disk['needed'])}; {size(found['bytes_if_separate'])} if each were made alone"
        )
        verdict = f"{size(disk['shortage'])} too little" if disk["shortage"] else "enough"
        output.say(
            f"disk        {size(disk['needed'])} needed, {size(disk['free'])} free in {found['folder']}: "
            f"{verdict}"
        )
    if disk["shortage"]:
        raise PlanError(
            f"the children need {size(disk['needed'])}, {size(disk['shortage'])} more than is free",
            hint="sweep fewer points, or let go of children once they are measured: --keep best",
        )
