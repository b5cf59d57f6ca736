"""`evaluate`: several models measured on the same problems and the same text, in one table.

Models are loaded one after another. With a parent and a text, the parent is measured first and stays in
memory for the KL divergence of the others. Whatever can fail without weights (files, settings, tokenizers
that differ) fails before the first weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING

from surgery.calibrate.skeleton import placement
from surgery.calibrate.state import Progress
from surgery.calibrate.threads import torch_threads
from surgery.errors import UsageError
from surgery.evaluate.candidates import Candidate, check_comparable, prepare, shared_context, with_windows
from surgery.evaluate.divergence import Divergence, window_divergence
from surgery.evaluate.greedy import BATCH_SIZE, replies
from surgery.evaluate.load import LoadedModel, load_model
from surgery.evaluate.perplexity import Perplexity, logits_of, read_documents, window_nll
from surgery.evaluate.streamed import StreamedModel, stream_model
from surgery.evaluate.table import Evaluation, ModelScore, Settings
from surgery.evaluate.tasks import Problem, Reply, compile_pattern, judge, read_problems, score

if TYPE_CHECKING:
    import torch

    from surgery.evaluate.candidates import Model


def evaluate(
    models: Sequence[Model] | Mapping[str, Model],
    *,
    tasks: str | Path | None = None,
    text: str | Path | None = None,
    parent: Model | None = None,
    limit: int | None = None,
    max_new_tokens: int = 512,
    answer: str | None = None,
    tag: str = "<think>",
    context: int | None = None,
    max_windows: int | None = None,
    add_bos: bool | None = None,
    batch_size: int = BATCH_SIZE,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    streamed: bool = False,
    memory_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure models beside each other.

    models: folders, hub ids or checkpoints, in a mapping under the names that the table gives them.
    tasks: JSONL file of problems (`tasks.py`), replied to greedily in at most `max_new_tokens` tokens;
        `limit` takes the first problems of each task, `answer` is a pattern whose group 1 is the answer,
        `tag` is looked for in the replies.
    text: file for perplexity (`perplexity.py`) in windows of `context` tokens (default 512, or the shortest
        context of the models), the first `max_windows` of them.
    parent: a model, or the name of one of `models`; it is a row of the table, and with a text the others get
        their KL divergence from it.
    add_bos: whether prompts and documents begin with the start token (default: see `tokenizer.py`).
    device, dtype: cpu in float32 by default, cuda in bfloat16. threads: of torch (default: see `threads.py`).
    streamed: measure the text by walking each model layer by layer, in the memory of one layer; hidden states
        and experts that are kept fit `memory_bytes`.

    Raises UsageError for settings and input files, CheckpointError for models.
    """
    if tasks is None and text is None:
        raise UsageError("nothing to measure", hint="give problems (tasks), a text, or both")
    _check_positive(
        limit=limit,
        max_new_tokens=max_new_tokens,
        max_windows=max_windows,
        batch_size=batch_size,
        threads=threads,
    )
    if streamed and tasks is not None:
        raise UsageError(
            "replies need the whole model in memory", hint="leave out the tasks, or the streaming"
        )
    pattern = compile_pattern(answer)
    place, compute = placement(device, dtype)
    problems = read_problems(Path(tasks), limit) if tasks is not None else ()
    documents = read_documents(Path(text)) if text is not None else ()

    candidates, parent_name = prepare(models, parent, add_bos=add_bos, trust_remote_code=trust_remote_code)
    if documents:
        context = shared_context(candidates, context)
        candidates = with_windows(candidates, documents, context, max_windows)
        if parent_name is not None:
            check_comparable(candidates, parent_name)

    settings = Settings(
        tasks=str(tasks) if tasks is not None else None,
        text=str(text) if text is not None else None,
        limit=limit,
        max_new_tokens=max_new_tokens,
        answer=answer,
        tag=tag,
        context=context if documents else None,
        max_windows=max_windows,
        add_bos=add_bos,
        batch_size=batch_size,
        device=str(place),
        dtype=str(compute).removeprefix("torch."),
        threads=threads,
        streamed=streamed,
    )
    rows: dict[str, ModelScore] = {}
    kept: Readable | None = None
    with TemporaryDirectory(prefix="surgery-walk-") as scratch:
        run = _Run(pattern, trust_remote_code, memory_bytes, Path(scratch), progress or _silent)
        for candidate in sorted(candidates, key=lambda each: each.name != parent_name):
            weights = sum(ref.numel for ref in candidate.checkpoint.tensors.values())
            with torch_threads(threads, weights):
                loaded = _made_ready(candidate, settings, run)
                row = _measure(candidate, loaded, kept, parent_name, problems, settings, run)
            rows[candidate.name] = row
            if row.is_parent and documents:
                kept = loaded
            # Otherwise this model would stay in memory while the next one loads.
            del loaded
    return Evaluation(
        rows=tuple(rows[candidate.name] for candidate in candidates),
        parent=parent_name,
        settings=settings,
        versions=_versions(),
        notes=_notes(candidates, rows, parent_name, measured_kl=bool(documents)),
    )


@dataclass(frozen=True)
class _Run:
    """What all models of an evaluation share beside the settings that are part of the result."""

    pattern: re.Pattern[str] | None
    trust_remote_code: bool
    memory_bytes: int
    scratch: Path
    tell: Progress


Readable = LoadedModel | StreamedModel
"""A model whose logits on the windows can be read: in memory, or at the end of a walk."""


def _made_ready(candidate: Candidate, settings: Settings, run: _Run) -> Readable:
    if not settings.streamed:
        return load_model(
            candidate.checkpoint,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=run.trust_remote_code,
            progress=run.tell,
            stage=f"{candidate.name}: load",
        )
    device, dtype = placement(settings.device, settings.dtype)
    folder = run.scratch / str(len(list(run.scratch.iterdir())))
    folder.mkdir()
    return stream_model(
        candidate.checkpoint,
        candidate.windows,
        device=device,
        dtype=dtype,
        memory_bytes=run.memory_bytes,
        folder=folder,
        trust_remote_code=run.trust_remote_code,
        progress=run.tell,
        stage=f"{candidate.name}: walk",
    )


def _measure(
    candidate: Candidate,
    model: Readable,
    parent: Readable | None,
    parent_name: str | None,
    problems: Sequence[Problem],
    settings: Settings,
    run: _Run,
) -> ModelScore:
    """Fill the row of one model."""
    begun = perf_counter()
    answers: list[Reply] = []
    if isinstance(model, LoadedModel):
        answers = _answers(model, candidate, problems, settings, run)
    perplexity, divergence = _on_text(model, candidate, parent, parent_name, settings, run)
    return ModelScore(
        name=candidate.name,
        model=candidate.checkpoint.label,
        is_parent=candidate.name == parent_name,
        parameters=model.parameters,
        left_out=model.left_out,
        starts_with_bos=bool(candidate.tokenizer.start),
        tasks=score(answers, settings.tag) if answers else None,
        perplexity=perplexity,
        divergence=divergence,
        seconds=perf_counter() - begun,
    )


def _check_positive(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")


def _answers(
    loaded: LoadedModel,
    candidate: Candidate,
    problems: Sequence[Problem],
    settings: Settings,
    run: _Run,
) -> list[Reply]:
    tokenizer = candidate.tokenizer
    said = replies(
        loaded,
        [tokenizer.prompt(problem.prompt) for problem in problems],
        ends=tokenizer.ends,
        pad=tokenizer.pad,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        finished=lambda done: run.tell(f"{candidate.name}: replies", done, len(problems)),
    )
    answers = []
    for problem, ids in zip(problems, said, strict=True):
        cut_off = ids[-1] not in tokenizer.ends
        shown = ids if cut_off else ids[:-1]
        answers.append(
            judge(problem, tokenizer.text(shown), len(shown), cut_off=cut_off, pattern=run.pattern)
        )
    return answers


def _on_text(
    model: Readable,
    candidate: Candidate,
    parent: Readable | None,
    parent_name: str | None,
    settings: Settings,
    run: _Run,
) -> tuple[Perplexity | None, Divergence | None]:
    """One pass over the windows for both figures."""
    if settings.context is None:
        return None, None
    sums, divergences = [], []
    read = _logits(model, candidate)
    theirs = _logits(parent, candidate) if parent is not None else None
    for done, (window, logits) in enumerate(zip(candidate.windows, read, strict=True), start=1):
        sums.append(window_nll(logits, window))
        if theirs is not None:
            divergences.append(window_divergence(next(theirs), logits))
        run.tell(f"{candidate.name}: text", done, len(candidate.windows))
    sizes = [len(window) - 1 for window in candidate.windows]
    perplexity = Perplexity.of(sums, sizes, settings.context)
    return perplexity, Divergence.of(parent_name or "", divergences) if divergences else None


def _logits(model: Readable, candidate: Candidate) -> Iterator[torch.Tensor]:
    """Logits of each window in turn."""
    if isinstance(model, LoadedModel):
        return (logits_of(model, window) for window in candidate.windows)
    return model.logits()


def _notes(
    candidates: Sequence[Candidate], rows: Mapping[str, ModelScore], parent: str | None, *, measured_kl: bool
) -> tuple[str, ...]:
    notes = []
    for name, row in rows.items():
        if row.left_out:
            notes.append(
                f"{name}: transformers does not run {len(row.left_out)} tensors (multi-token prediction and "
                f"the like), first {row.left_out[0]}"
            )
    for each in candidates:
        if not each.tokenizer.as_shipped:
            notes.append(
                f"{each.name}: transformers' {type(each.tokenizer.plain).__name__} does not cut text as "
                "tokenizer.json says; the figures are those that transformers gives"
            )
    if parent is not None and not measured_kl:
        notes.append(f"no KL divergence from {parent}: it is measured on a text, and none was given")
    if len({each.windows for each in candidates}) > 1:
        notes.append("perplexities do not compare: the models cut the text into different tokens")
    return tuple(notes)


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""
