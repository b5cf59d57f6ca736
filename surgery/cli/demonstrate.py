"""`surgery demonstrate`: a model's own replies as calibration data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.options import Device, Dtype, Json, Quiet, RemoteCode, Threads
from surgery.cli.render import Output


def register(app: typer.Typer) -> None:
    app.command()(demonstrate)


def demonstrate(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    prompts: Annotated[Path, typer.Option("--prompts", metavar="JSONL", help="A `prompt` on each line.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="JSONL", help="Prompts with replies.")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="The first prompts only.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 512,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    trust_remote_code: RemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a model reply to prompts, greedily: demonstrations for calibration (it must fit in memory)."""
    from surgery.evaluate.demonstrate import demonstrations

    output = Output(json=json, quiet=quiet or json)
    with output.progress() as tell:
        found = demonstrations(
            model, prompts, out, limit=limit, max_new_tokens=max_new_tokens, device=device, dtype=dtype,
            threads=threads, trust_remote_code=trust_remote_code, overwrite=overwrite, progress=tell,
        )  # fmt: skip
    if output.json:
        output.document({"schema": 1, **found.as_dict()})
        return
    if found.cut_off:
        output.note(f"{found.cut_off} replies had not ended at {max_new_tokens} tokens")
    output.say(f"{out}: {found.replies} replies, {found.tokens} tokens")
    model, demos = shlex.quote(model), shlex.quote(str(out))
    output.next(f"surgery prune {model} --calibration {demos} --set keep=0.5 -o OUT")
