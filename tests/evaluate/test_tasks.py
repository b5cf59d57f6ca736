"""Reading problems, finding answers, counting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgery.errors import UsageError
from surgery.evaluate.tasks import Problem, compile_pattern, extract_answer, judge, read_problems, score


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 42", "42"),
        ("<think>Answer: 1</think>\n\nAnswer: 42\n", "42"),
        ("Answer:42", "42"),
        ("so 42", None),
        ("", None),
        ("answer: 42", None),
        ("Answer:", ""),
        ("Answer: 4, 2 and more", "4, 2 and more"),
        ("Answer: 42\nor 43", "42\nor 43"),
    ],
)
def test_the_text_after_the_last_mark_is_the_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"#### (\S+)", "#### 1 then #### 2", "2"),
        (r"\\boxed\{(.*?)\}", r"so \boxed{ 7 }.", "7"),
        (r"(a)|b", "a b", None),
        (r"x=(\d+)", "none", None),
    ],
)
def test_a_pattern_gives_group_one_of_its_last_match(pattern: str, text: str, answer: str | None) -> None:
    assert extract_answer(text, compile_pattern(pattern)) == answer


@pytest.mark.parametrize("pattern", ["(", r"Answer: \d+"])
def test_bad_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="answer pattern"):
        compile_pattern(pattern)


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_problems_are_read_and_limited_by_task(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"task": "a", "prompt": "1", "answer": "x", "terse": "ignored"},
        "",
        {"task": "b", "prompt": "2", "answer": 5},
        {"task": "a", "prompt": "3", "answer": "y\u2028"},
        {"prompt": "4", "answer": ""},
    )
    assert read_problems(path) == (
        Problem("1", "x", "a"),
        Problem("2", "5", "b"),
        Problem("3", "y\u2028", "a"),
        Problem("4", "", ""),
    )
    assert [problem.prompt for problem in read_problems(path, limit=1)] == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "no valid JSON"),
        ("[1]", "list, not a JSON object"),
        ({"answer": "1"}, "`prompt`"),
        ({"prompt": "", "answer": "1"}, "`prompt`"),
        ({"prompt": "p"}, "`answer`"),
        ({"prompt": "p", "answer": True}, "`answer`"),
        ({"prompt": "p", "answer": "1", "task": 3}, "`task`"),
    ],
)
def test_malformed_lines_are_named_with_their_number(tmp_path: Path, line: object, complaint: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "p", "answer": "1"}, line)
    with pytest.raises(UsageError) as caught:
        read_problems(path)
    assert f"{path}:2: " in caught.value.message
    assert complaint in caught.value.message


def test_files_that_are_missing_empty_or_binary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("absent", "empty", "binary"):
        with pytest.raises(UsageError, match=name):
            read_problems(tmp_path / name)


def test_the_score_counts_by_task_and_over_all() -> None:
    problems = [Problem("p", "1", "a"), Problem("p", "2", "a"), Problem("p", "3", "b"), Problem("p", "4", "")]
    texts = ["<think>x</think>Answer: 1", "Answer: 1", "Answer: 3", "…"]
    replies = [
        judge(problem, text, tokens, cut_off=text == "…")
        for problem, text, tokens in zip(problems, texts, (10, 20, 30, 40), strict=True)
    ]
    found = score(replies, "<think>")
    assert (found.accuracy.count, found.accuracy.total) == (2, 4)
    assert {task: (share.count, share.total) for task, share in found.by_task.items()} == {
        "a": (1, 2),
        "b": (1, 1),
    }
    assert found.reply_tokens.value == 25
    assert (found.tagged.count, found.cut_off.count) == (1, 1)
    assert json.loads(json.dumps(found.as_dict()))["problems"] == 4
