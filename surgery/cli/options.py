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
Fresh = Annotated[bool, typer.Option("--fresh", help="Restart instead of resuming.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")]
Strict = Annotated[bool, typer.Option("--strict", help="Treat every note as an error (exit code 7).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")]
Model = Annotated[str, typer.Argument(help="A model folder or hub id.")]
Op = Annotated[str, typer.Option("--op", help="The operator.")]
Param = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A param of the operator. Repeatable."),
]
CalibrationFiles = Annotated[
    list[str] | None,
    typer.Option("--calibration", metavar="FILE", help="Texts or conversations, or DOMAIN=FILE. Repeatable."),
]
OutputFormat = Annotated[
    str,
    typer.Option("--format", help="source (as the step stores it), bf16, compressed-tensors, gptq, awq, …"),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Worker threads (default: all cores).")]


def memory_bytes(text: str) -> int:
    """The bytes of --memory; UsageError for what is no size."""
    from surgery.stream.units import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from error
