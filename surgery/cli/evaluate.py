"""`surgery eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.options import Json, Quiet
from surgery.cli.render import Output


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub ids.")],
    tasks: Annotated[
        Path | None, typer.Option("--tasks", metavar="JSONL", help="Problems: prompt, answer, task.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Text for perplexity and KL.")
    ] = None,
    parent: Annotated[
        str | None, typer.Option("--parent", help="Model to measure the KL divergence from.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Problems per task.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 512,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Tokens per window of text.")
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            "--answer", metavar="REGEX", help="Group 1 is the answer (default: after the last `Answer:`)."
        ),
    ] = None,
    tag: Annotated[str, typer.Option("--tag", help="Tag whose share of replies is counted.")] = "<think>",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model ships.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure models beside each other: accuracy, reply length, perplexity, KL to a parent."""
    from surgery.evaluate.run import evaluate as measure

    output = Output(json=json, quiet=quiet or json)
    with output.progress() as tell:
        found = measure(
            models, tasks=tasks, text=text, parent=parent, limit=limit, max_new_tokens=max_new_tokens,
            context=context, answer=answer, tag=tag, device=device, trust_remote_code=trust_remote_code,
            progress=tell,
        )  # fmt: skip
    if json:
        output.document(found.as_dict())
    show_evaluation(output, found.as_dict())


def show_evaluation(output: Output, found: dict[str, Any]) -> None:
    """The table of an evaluation."""
