"""`surgery prune`, `surgery sparsify`, `surgery quantize`: recipes of one step on one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

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
    Op,
    Out,
    OutputFormat,
    Overwrite,
    Param,
    Quiet,
    RemoteCode,
    Strict,
    Threads,
    memory_bytes,
)
from surgery.cli.render import Output
from surgery.cli.run import resumable, run_and_show, show_plan
from surgery.errors import UsageError

STEPS = {
    "prune": ("experts.easy_ep", "Drop the routed experts that a domain does not need."),
    "sparsify": ("sparsify.sparsegpt", "Set weights to zero, and make up for them in the others."),
    "quantize": ("quantize.gptq", "Store weights in few bits."),
}
"""The operator and the help of each command."""


def register(app: typer.Typer) -> None:
    for name, (default, about) in STEPS.items():
        app.command(name)(_command(default, about))


def _command(default: str, about: str) -> Callable[..., None]:
    def command(
        model: Model,
        out: Out,
        op: Op = default,
        set_: Param = None,
        calibration: CalibrationFiles = None,
        output_format: OutputFormat = "source",
        dry_run: DryRun = False,
        device: Device = "cpu",
        dtype: Dtype = None,
        memory: Memory = DEFAULT_MEMORY,
        threads: Threads = None,
        trust_remote_code: RemoteCode = False,
        fresh: Fresh = False,
        overwrite: Overwrite = False,
        strict: Strict = False,
        json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        _one_step(**locals())

    command.__doc__ = f"{about} The same command resumes after a stop."
    return command


def _one_step(
    *,
    model: str,
    out: Path,
    op: str,
    set_: list[str] | None,
    calibration: list[str] | None,
    output_format: str,
    dry_run: bool,
    device: str,
    dtype: str | None,
    memory: str,
    threads: int | None,
    trust_remote_code: bool,
    fresh: bool,
    overwrite: bool,
    strict: bool,
    json: bool,
    quiet: bool,
) -> None:
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
            device=device, strict=strict, progress=tell,
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
