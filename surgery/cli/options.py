"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Recipe = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a shipped one (see: surgery recipes ls).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. parents.base=PATH. Repeatable."),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The output folder.")]
DEFAULT_MEMORY = "1GiB"
Memory = Annotated[
    str, typer.Option("--memory", metavar="SIZE", help="Budget of the buffers in flight, at least 256MB.")
]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu or cuda.")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="Compute dtype (default: float32 on cpu, bfloat16 on cuda).")
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model ships.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Worker threads (default: all cores).")]


def memory_bytes(text: str) -> int:
    """The bytes of --memory; UsageError for what is no size."""
    from surgery.stream.units import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from error
