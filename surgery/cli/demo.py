"""`surgery demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.evaluate import show_evaluation
from surgery.cli.options import Json, Quiet, Threads
from surgery.cli.render import Output


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The output folder.")] = Path(
        "surgery-demo"
    ),
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Problems per task (default: all).")
    ] = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="A second child as well, pruned and in 4 bits, in one pass.")
    ] = False,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build a Chimera of two small shipped parents, verify it, and measure it against them."""
    from surgery.cli.run import coverage_table
    from surgery.recipe.demo import run_demo
    from surgery.stream.save import SaveOptions, cores
    from surgery.stream.units import format_bytes

    output = Output(json=json, quiet=quiet or json)
    output.step("building a Chimera: routed experts of `deliberate`, everything else of `terse`")
    with output.progress() as tell:
        found = run_demo(
            out, options=SaveOptions(threads=threads or cores()), limit=limit, compress=compress,
            progress=tell,
        )  # fmt: skip
    if json:
        output.document(found.as_dict())
        return
    coverage_table(output, "Where the tensors come from", found.manifest["coverage"])
    for check in found.verification.checks:
        output.mark(check.state, f"{check.name:<11} {check.detail}")
    output.say("")
    show_evaluation(output, found.evaluation.as_dict())
    if compress:
        output.say(
            "size    " + ", ".join(f"{name} {format_bytes(size)}" for name, size in found.sizes.items())
        )
    output.say(f"child   {found.folder}")
    output.say(f"report  {found.report}")
    output.next(f"surgery diff {found.folder} FOLDER, or: surgery plan chimera")
