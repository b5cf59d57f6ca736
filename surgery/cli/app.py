"""The `surgery` command: the map of its subcommands, and what an error becomes.

Exit codes: 0 done, 1 unexpected, 2 usage, 3 recipe invalid, 4 input checkpoint unusable, 5 refused
before starting (disk, memory, output folder), 6 verification failed, 7 fallbacks under --strict,
130 interrupted (the same command resumes).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

import typer

from surgery.cli import (
    allocate,
    convert,
    demo,
    demonstrate,
    doctor,
    evaluate,
    kernels,
    look,
    one_step,
    publish,
    recipes,
    run,
    sweep,
)
from surgery.cli.render import Output
from surgery.errors import InterruptedRun, SurgeryError

app = typer.Typer(
    name="surgery",
    help="Model surgery and compression: merge, prune, verify and compare checkpoints, tensor by tensor.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run.register(app)
one_step.register(app)
allocate.register(app)
demonstrate.register(app)
sweep.register(app)
look.register(app)
evaluate.register(app)
demo.register(app)
publish.register(app)
recipes.register(app)
convert.register(app)
doctor.register(app)
kernels.register(app)


def _show_version(value: bool) -> None:
    if value:
        from surgery.stream.manifest import tool_version

        typer.echo(f"surgery {tool_version()}")
        raise typer.Exit()


@app.callback()
def options(
    ctx: typer.Context,
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    ctx.obj = Output(debug=debug)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    output = Output(json="--json" in given, debug="--debug" in given)
    try:
        code = app(args=given, standalone_mode=False)
        return int(code) if isinstance(code, int) else 0
    except SurgeryError as error:
        if output.debug:
            output.err.print_exception()
        output.error(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        output.error(InterruptedRun("stopped by the user"))
        return InterruptedRun.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:  # noqa: BLE001  (the last resort of the command line: one clear line)
        return _click_error(error, output)


def _click_error(error: Exception, output: Output) -> int:
    """Usage errors of the command line itself; anything else is ours and unexpected."""
    code = getattr(error, "exit_code", None)
    show = getattr(error, "show", None)
    if callable(show) and isinstance(code, int):
        show()
        return code
    output.error(
        SurgeryError(
            f"unexpected {type(error).__name__}: {error}",
            hint="run again with --debug before the command and report the traceback",
        )
    )
    if output.debug:
        output.err.print_exception()
    return SurgeryError.exit_code


def entry() -> None:
    """The console script."""
    code = main()
    gc.freeze()  # half a second would go by in looking for cycles among torch's modules
    sys.exit(code)
