"""`surgery inspect`, `surgery diff`, `surgery verify`, `surgery report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.options import Json, Quiet, Threads
from surgery.cli.render import Output
from surgery.errors import UsageError, VerificationError

Model = Annotated[str, typer.Argument(help="A model folder or hub id.")]


def register(app: typer.Typer) -> None:
    app.command()(inspect)
    app.command()(diff)
    app.command()(verify)
    app.command()(report)


def inspect(model: Model, json: Json = False) -> None:
    """Show a model's tensors by role and stored form, and what is odd about it."""
    from surgery.report.inspect import inspect_checkpoint
    from surgery.stream.source import open_checkpoint
    from surgery.stream.units import format_bytes

    output = Output(json=json)
    found = inspect_checkpoint(open_checkpoint(model))
    if json:
        output.document(found.as_dict())
        return
    output.say(
        f"{found.label}: {found.model_type}, {found.layers} layers, "
        f"{found.parameters / 1e6:,.5g} M parameters, "
        f"{format_bytes(found.nbytes)} in {found.shards} files"
    )
    rows = [
        (
            row.role + (" (MTP)" if row.mtp else ""),
            row.form,
            row.tensors,
            f"{row.parameters:,}",
            format_bytes(row.nbytes),
        )
        for row in found.rows
    ]
    output.table("", ("role", "stored as", "tensors", "parameters", "bytes"), rows, right=(2, 3, 4))
    for oddity in found.oddities:
        output.note(oddity)


def diff(
    a: Model,
    b: Model,
    by: Annotated[str, typer.Option("--by", help="role, layer (layer and role) or tensor.")] = "role",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two models: distance, cosine and equal bytes, by role, layer or tensor."""
    from surgery.report.diff import diff_checkpoints
    from surgery.stream.save import cores
    from surgery.stream.source import open_checkpoint

    if by not in ("role", "layer", "tensor"):
        raise UsageError(f"--by {by} is unknown", hint="use role, layer or tensor")
    output = Output(json=json, quiet=quiet or json)
    with output.progress() as tell:
        found = diff_checkpoints(open_checkpoint(a), open_checkpoint(b), threads or cores(), tell)
    if json:
        output.document({"a": a, "b": b, **found.as_dict(by_tensor=by == "tensor")})
        return
    rows = found.by_tensor() if by == "tensor" else found.rows if by == "layer" else found.by_role()
    cells = []
    for row in rows:
        figures = (row.rms, row.relative, row.cosine)
        shown = ("–" if value is None else f"{value:.5g}" for value in figures)
        cells.append((row.what, row.role, row.tensors, row.equal_bytes, *shown))
    columns = ("what", "role", "tensors", "equal bytes", "rms", "relative", "cosine")
    output.table(f"{a} against {b}", columns, cells, right=(2, 3, 4, 5, 6))
    for names, where in (
        (found.only_in_a, f"only in {a}"),
        (found.only_in_b, f"only in {b}"),
        (found.other_shape, "of other shapes"),
    ):
        if names:
            output.say(f"{len(names)} tensors {where}, first {names[0]}")
    output.say("identical byte for byte" if found.identical else "not identical")


def verify(
    out: Annotated[Path, typer.Argument(help="A folder that surgery wrote.")],
    recompute: Annotated[
        str,
        typer.Option(
            "--recompute", metavar="N", help="Tensors to make again from the parents: a number, or all."
        ),
    ] = "32",
    no_load: Annotated[
        bool, typer.Option("--no-load", help="Do not ask transformers to place the tensors.")
    ] = False,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check an output: hashes, headers, config, finite values, loading, lineage. Exit code 6 if it fails."""
    from surgery.recipe.verify import verify as check
    from surgery.stream.save import cores

    if recompute != "all" and not recompute.isdigit():
        raise UsageError(f"--recompute {recompute} is no number", hint="give a number, or all")
    output = Output(json=json, quiet=quiet or json)
    with output.progress() as tell:
        found = check(
            out, recompute=None if recompute == "all" else int(recompute), load=not no_load,
            threads=threads or cores(), progress=tell,
        )  # fmt: skip
    if json:
        output.document(found.as_dict())
    for each in found.checks:
        output.mark(each.state, f"{each.name:<11} {each.detail}")
    if not found.ok:
        failed = [each.name for each in found.checks if each.state == "failed"]
        error = VerificationError(
            f"{out} failed {len(failed)} checks: {', '.join(failed)}",
            hint="build it again: surgery run … --overwrite",
        )
        if json:
            raise typer.Exit(error.exit_code)
        raise error


def report(
    out: Annotated[Path, typer.Argument(help="A folder that surgery wrote.")],
    evaluation: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="What `surgery eval --json` printed.")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="The HTML file (default: OUT/surgery_report.html)."),
    ] = None,
) -> None:
    """Write the HTML report of an output, with the figures of an evaluation."""
    from surgery.recipe.run import REPORT
    from surgery.report.html import render_report
    from surgery.stream.manifest import read_manifest
    from surgery.stream.source import read_json

    figures: dict[str, Any] | None = read_json(evaluation) if evaluation else None
    path = to or out / REPORT
    path.write_text(render_report(read_manifest(out), figures), encoding="utf-8")
    Output().say(str(path))
