"""Problems with a known answer: accuracy, length of replies, share of replies with a tag.

A file has one JSON object per line: `prompt`, `answer`, and optionally `task`, by which accuracy is also
given; other keys are ignored. A reply is right when the text after its last `Answer:` equals the answer, both
stripped; a pattern of the user's replaces that by group 1 of its last match.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.calibrate.lines import read_lines, read_object
from surgery.errors import UsageError
from surgery.evaluate.intervals import Mean, Share

MARK = "Answer:"


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str
    task: str


@dataclass(frozen=True)
class Reply:
    """What a model said to a problem, the end token left out. `cut_off`: it had not ended at the limit."""

    problem: Problem
    text: str
    tokens: int
    cut_off: bool
    right: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "task": self.problem.task,
            "prompt": self.problem.prompt,
            "answer": self.problem.answer,
            "reply": self.text,
            "tokens": self.tokens,
            "cut_off": self.cut_off,
            "right": self.right,
        }


@dataclass(frozen=True)
class TaskScore:
    """Figures over all replies. `reply_tokens` does not count the end token."""

    accuracy: Share
    by_task: dict[str, Share]
    reply_tokens: Mean
    tag: str
    tagged: Share
    cut_off: Share
    replies: tuple[Reply, ...]

    def as_dict(self) -> dict[str, Any]:
        """Without the replies themselves."""
        return {
            "problems": self.accuracy.total,
            "accuracy": self.accuracy.as_dict(),
            "by_task": {task: share.as_dict() for task, share in self.by_task.items()},
            "reply_tokens": self.reply_tokens.as_dict(),
            "tag": self.tag,
            "tagged": self.tagged.as_dict(),
            "cut_off": self.cut_off.as_dict(),
        }


def read_problems(path: Path, limit: int | None = None) -> tuple[Problem, ...]:
    """All problems of a file, or the first `limit` of each task. Raises UsageError naming file and line."""
    problems: list[Problem] = []
    taken: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        problem = _problem(line, f"{path}:{number}")
        taken[problem.task] = taken.get(problem.task, 0) + 1
        if limit is None or taken[problem.task] <= limit:
            problems.append(problem)
    if not problems:
        raise UsageError(f"{path} holds no problems", hint='one per line: {"prompt": "…", "answer": "…"}')
    return tuple(problems)


def _problem(line: str, where: str) -> Problem:
    found = read_object(line, where)
    prompt, answer, task = found.get("prompt"), found.get("answer"), found.get("task", "")
    if not isinstance(prompt, str) or not prompt:
        raise UsageError(f"{where}: `prompt` must be a text that is not empty")
    if isinstance(answer, bool) or not isinstance(answer, str | int):
        raise UsageError(f"{where}: `answer` must be a text or a whole number")
    if not isinstance(task, str):
        raise UsageError(f"{where}: `task` must be a text")
    return Problem(prompt, str(answer), task)


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """The user's pattern; UsageError where it is none or has no group 1."""
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"the answer pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups < 1:
        raise UsageError(
            f"the answer pattern {pattern!r} has no group",
            hint=r"put the answer in brackets: 'Answer: (\d+)'",
        )
    return compiled


def extract_answer(text: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """The answer in a reply, stripped; None where there is none."""
    if pattern is None:
        _, mark, after = text.rpartition(MARK)
        return after.strip() if mark else None
    matches = list(pattern.finditer(text))
    group = matches[-1].group(1) if matches else None
    return group.strip() if group is not None else None


def judge(
    problem: Problem, text: str, tokens: int, *, cut_off: bool, pattern: re.Pattern[str] | None = None
) -> Reply:
    right = extract_answer(text, pattern) == problem.answer.strip()
    return Reply(problem, text, tokens, cut_off, right)


def score(replies: Sequence[Reply], tag: str) -> TaskScore:
    """Counts over at least one reply. Tasks in the order of their first problem."""
    tasks = dict.fromkeys(reply.problem.task for reply in replies)
    return TaskScore(
        accuracy=_share(reply.right for reply in replies),
        by_task={
            task: _share(reply.right for reply in replies if reply.problem.task == task)
            for task in tasks
            if task
        },
        reply_tokens=Mean.of([reply.tokens for reply in replies]),
        tag=tag,
        tagged=_share(tag in reply.text for reply in replies),
        cut_off=_share(reply.cut_off for reply in replies),
        replies=tuple(replies),
    )


def _share(hits: Iterable[bool]) -> Share:
    found = list(hits)
    return Share.of(sum(found), len(found))
