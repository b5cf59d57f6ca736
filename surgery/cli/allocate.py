"""`surgery allocate`: bits for each layer and role under a budget, as a recipe."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli.one_step import domains_of
from surgery.cli.options import (
    DEFAULT_MEMORY,
    CalibrationFiles,
    Device,
    DryRun,
    Dtype,
    Fresh,
    Json,
    Memory,
    Model,
    Overwrite,
    Param,
    Quiet,
    RemoteCode,
    Threads,
    memory_bytes,
)
from surgery.cli.render import Output
from surgery.cli.run import resumable
from surgery.errors import PlanError, UsageError

if TYPE_CHECKING:
    from surgery.recipe.allocate import Allocation


def register(app: typer.Typer) -> None:
    app.command()(allocate)


def allocate(
    model: Model,
    budget: Annotated[
        str,
        typer.Option(
            "--budget", help="Bits per weight of what is quantized (3.2bpw), or bytes of all files (2.5GB)."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The recipe to write.")],
    calibration: CalibrationFiles = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            "--schemes", metavar="A,B,…", help="The candidates (default: int2, 3, 4, 5, 6 and 8 in -g64)."
        ),
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option("--protect", metavar="SELECTOR", help="Matrices that stay as they are. Repeatable."),
    ] = None,
    set_: Param = None,
    dry_run: DryRun = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    memory: Memory = DEFAULT_MEMORY,
    threads: Threads = None,
    trust_remote_code: RemoteCode = False,
    fresh: Fresh = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose the bits of each layer and role under a budget. The same command resumes after a stop."""
    from surgery.operators.protocol import RunContext
    from surgery.recipe.allocate import SCHEMES, estimate
    from surgery.recipe.allocate import allocate as find
    from surgery.recipe.bits import open_task

    output = Output(json=json, quiet=quiet or json)
    if out.exists() and not overwrite:
        raise PlanError(f"{out} is there already", hint="give another name, or replace it with --overwrite")
    if not out.absolute().parent.is_dir():
        raise PlanError(f"there is no folder {out.absolute().parent}", hint="make it first")
    if not calibration:
        raise UsageError("what the bits do is measured on text", hint="give it with --calibration FILE")
    data = {"files": domains_of(calibration)}
    names = tuple(schemes.split(",")) if schemes else SCHEMES
    context = RunContext(
        device=device, dtype=dtype, threads=threads, trust_remote_code=trust_remote_code,
        memory_bytes=memory_bytes(memory),
    )  # fmt: skip
    if dry_run:
        task = open_task(model, data, names, protect or (), set_ or ())
        task.budget(budget)
        _show_plan(output, {**task.ends(), **estimate(task, context)})
        return
    with output.progress() as tell, resumable():
        found = find(
            model, budget, data, schemes=names, protect=protect or (), overrides=set_ or (), out=out,
            context=replace(context, progress=tell), fresh=fresh,
        )  # fmt: skip
    if json:
        output.document({"recipe": str(out), **found.as_dict()})
        return
    _show(output, found, out)


def _show_plan(output: Output, found: dict[str, Any]) -> None:
    from surgery.stream.units import format_bytes as size

    if output.json:
        output.document({"schema": 1, **found})
        return
    output.say(
        f"budget      {found['least_bpw']:.4g}bpw to {found['most_bpw']:.4g}bpw, files of "
        f"{size(found['least_output_bytes'])} to {size(found['most_output_bytes'])}"
    )
    output.say(
        f"walk        {found['matrices']} matrices in {found['units']} units; reads "
        f"{size(found['bytes_read'])}; {found['tokens']:,} tokens in {found['dtype']} on {found['device']}"
    )
    output.say(
        f"            device {size(found['device_bytes'])}, host {size(found['host_bytes'])}, "
        f"disk {size(found['disk_bytes'])}"
    )


def _show(output: Output, found: Allocation, out: Path) -> None:
    """Which scheme how many layers of each role got, and what one scheme for all would do."""
    from surgery.recipe.entries import layers_in_words
    from surgery.stream.units import format_bytes

    for note in found.notes:
        output.note(note)
    told = found.as_dict()
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for unit in told["units"]:
        groups.setdefault((unit["role"], unit["scheme"]), []).append(unit)
    rows = [
        (
            role, scheme, layers_in_words(unit["layer"] for unit in units),
            format_bytes(sum(unit["bytes"] for unit in units)),
            f"{sum(unit['error'] for unit in units) / len(units):.3g}",
        )
        for (role, scheme), units in sorted(groups.items())
    ]  # fmt: skip
    output.table("Bits", ("role", "scheme", "where", "bytes", "error"), rows, right=(3, 4))
    uniform = [
        (name, format_bytes(each["bytes"]), f"{each['error']:.4g}") for name, each in told["uniform"].items()
    ]
    uniform.append(("this recipe", format_bytes(told["bytes"]), f"{told['error']:.4g}"))
    output.table("One scheme for all", ("scheme", "bytes", "sum of errors"), uniform, right=(1, 2))
    output.say(f"{out}: {told['bpw']:.4g} bits per weight, files of {format_bytes(told['output_bytes'])}")
    output.next(f"surgery run {shlex.quote(str(out))} -o OUT")
