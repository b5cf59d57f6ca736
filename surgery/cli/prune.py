"""`surgery prune`: drop experts in one step; `surgery demonstrate`: a model's own replies as calibration."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.options import (
    DEFAULT_MEMORY,
    Device,
    Dtype,
    Json,
    Memory,
    Quiet,
    RemoteCode,
    Threads,
    memory_bytes,
)
from surgery.cli.render import Output
from surgery.cli.run import resumable, run_and_show, show_plan
from surgery.errors import UsageError


def register(app: typer.Typer) -> None:
    app.command()(prune)
    app.command()(demonstrate)


def prune(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The output folder.")],
    op: Annotated[str, typer.Option("--op", help="The operator.")] = "experts.easy_ep",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A param of the operator: keep=0.5. Repeatable."),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Demonstrations, or DOMAIN=FILE. Repeatable.",
        ),
    ] = None,
    output_format: Annotated[
        str, typer.Option("--format", help="source (as stored), bf16, fp8-block, compressed-tensors, gptq, …")
    ] = "source",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    memory: Memory = DEFAULT_MEMORY,
    threads: Threads = None,
    trust_remote_code: RemoteCode = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Restart instead of resuming.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Treat every note as an error (exit code 7).")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Drop the routed experts that a domain does not need. The same command resumes after a stop."""
    from surgery.operators.protocol import RunContext
    from surgery.recipe.load import one_step
    from surgery.recipe.run import plan_recipe
    from surgery.stream.save import SaveOptions, check_output, cores

    output = Output(json=json, quiet=quiet or json)
    params: dict[str, Any] = {}
    if calibration:
        params["calibration"] = {"files": domains_of(calibration)}
    loaded = one_step(op, model, params, {"format": output_format}, set_ or ())
    context = RunContext(device=device, dtype=dtype, threads=threads, trust_remote_code=trust_remote_code)
    if dry_run:
        check_output(out, overwrite)
        show_plan(output, plan_recipe(loaded, out, memory_bytes(memory), context, refuse=False))
        return
    with output.progress() as tell, resumable():
        options = SaveOptions(
            memory_bytes=memory_bytes(memory), threads=threads or cores(), overwrite=overwrite, fresh=fresh,
            strict=strict, progress=tell,
        )  # fmt: skip
        run_and_show(output, loaded, out, options, context)


def domains_of(given: list[str]) -> dict[str, list[str]]:
    """Files by domain, from FILE and DOMAIN=FILE."""
    found: dict[str, list[str]] = {}
    for each in given:
        domain, equals, file = each.partition("=")
        if not equals or "/" in domain:
            domain, file = "all", each
        if not domain or not file:
            raise UsageError(f"--calibration {each} names no domain, or no file", hint="write DOMAIN=FILE")
        found.setdefault(domain, []).append(file)
    if "all" in found and len(found) > 1:
        raise UsageError("some files have a domain and some have none", hint="write DOMAIN=FILE for each")
    return found


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
