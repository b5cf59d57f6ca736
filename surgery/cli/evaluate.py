"""`surgery eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.options import DEFAULT_MEMORY, Json, Memory, Quiet, Threads, memory_bytes
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
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Begin with the start token (default: as the model says)."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Compute dtype (default: float32 on cpu, bfloat16 on cuda).")
    ] = None,
    threads: Threads = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model ships.")
    ] = False,
    streamed: Annotated[
        bool, typer.Option("--streamed", help="Measure --text layer by layer, in the memory of one layer.")
    ] = False,
    memory: Memory = DEFAULT_MEMORY,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure models beside each other: accuracy, reply length, perplexity, KL to a parent."""
    from surgery.evaluate.run import evaluate as measure

    output = Output(json=json, quiet=quiet or json)
    with output.progress() as tell:
        found = measure(
            models, tasks=tasks, text=text, parent=parent, limit=limit, max_new_tokens=max_new_tokens,
            context=context, answer=answer, tag=tag, add_bos=bos, device=device, dtype=dtype, threads=threads,
            trust_remote_code=trust_remote_code, streamed=streamed, memory_bytes=memory_bytes(memory),
            progress=tell,
        )  # fmt: skip
    if json:
        output.document(found.as_dict())
    show_evaluation(output, found.as_dict())


def show_evaluation(output: Output, found: dict[str, Any]) -> None:
    """One row per model; figures with the ends of their 95 % intervals."""
    for note in found["notes"]:
        output.note(note)
    replied = [model for model in found["models"] if model["tasks"]]
    if replied:
        tag = replied[0]["tasks"]["tag"]
        columns = ("model", "problems", "accuracy", "reply tokens", f"with {tag}", "cut off")
        rows = [_reply_row(model["name"], model["tasks"]) for model in replied]
        output.table("Replies (95 % intervals)", columns, rows, right=(1, 2, 3, 4, 5))
        tasks = list(replied[0]["tasks"]["by_task"])
        if len(tasks) > 1:
            shares = [_task_row(model["name"], model["tasks"], tasks) for model in replied]
            output.table("Accuracy by task", ("model", *tasks), shares, right=range(1, len(tasks) + 1))
    read = [model for model in found["models"] if model["perplexity"]]
    if read:
        kl = f"KL from {found['parent']}" if found["parent"] else "KL"
        title = f"Text in windows of {found['settings']['context']} tokens"
        output.table(
            title,
            ("model", "tokens", "perplexity", kl, "same top token"),
            [_text_row(model) for model in read],
            right=(1, 2, 3, 4),
        )


def _reply_row(name: str, score: dict[str, Any]) -> tuple[object, ...]:
    return (
        name,
        score["problems"],
        interval(score["accuracy"], "{:.2f}"),
        interval(score["reply_tokens"], "{:.0f}"),
        interval(score["tagged"], "{:.2f}"),
        score["cut_off"]["count"],
    )


def _task_row(name: str, score: dict[str, Any], tasks: list[str]) -> tuple[object, ...]:
    found = (score["by_task"].get(task) for task in tasks)
    return (name, *(f"{share['value']:.2f}" if share else "–" for share in found))


def _text_row(model: dict[str, Any]) -> tuple[object, ...]:
    text, gap = model["perplexity"], model["divergence"]
    kl = interval(gap["kl"], "{:.4f}") if gap else "–"
    agreement = f"{gap['agreement']['value']:.3f}" if gap else "–"
    return (model["name"], text["tokens"], interval(text, "{:.3f}"), kl, agreement)


def interval(figure: dict[str, Any], form: str) -> str:
    """A figure with its interval, where it has one."""
    value = form.format(figure["value"])
    if figure["low"] is None or figure["high"] is None:
        return value
    return f"{value} ({form.format(figure['low'])}–{form.format(figure['high'])})"
