"""A model's own replies to prompts, as calibration data: what EASY-EP (arXiv 2504.06792) calibrates on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.calibrate.lines import read_lines, read_object
from surgery.calibrate.state import Progress
from surgery.calibrate.threads import torch_threads
from surgery.calibrate.tokenizer import load_tokenizer
from surgery.errors import PlanError, UsageError
from surgery.evaluate.greedy import replies
from surgery.evaluate.load import load_model
from surgery.stream.source import open_checkpoint
from surgery.stream.writer import disk_error


@dataclass(frozen=True)
class Demonstrations:
    """How many replies were written, their tokens, and how many had not ended at the limit."""

    file: str
    replies: int
    tokens: int
    cut_off: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """The `prompt` of each line; UsageError naming file and line."""
    found: list[str] = []
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip() and (limit is None or len(found) < limit):
            prompt = read_object(line, f"{path}:{number}").get("prompt")
            if not isinstance(prompt, str) or not prompt:
                raise UsageError(f"{path}:{number}: `prompt` must be a text that is not empty")
            found.append(prompt)
    if not found:
        raise UsageError(f"{path} holds no prompts", hint='one per line: {"prompt": "…"}')
    return found


def demonstrations(
    model: str,
    prompts: Path,
    out: Path,
    *,
    limit: int | None = None,
    max_new_tokens: int = 512,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Demonstrations:
    """Write {"prompt", "reply"} lines to `out`, greedy replies through the model's chat template."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        what = "is a folder" if out.is_dir() else "is in a folder that does not exist"
        raise PlanError(f"{out} {what}", hint="give a file that can be written")
    if out.exists() and not overwrite:
        raise PlanError(f"{out} exists", hint="choose another file, or replace it with --overwrite")
    texts = read_prompts(prompts, limit)
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    weights = sum(ref.numel for ref in checkpoint.tensors.values())
    with torch_threads(threads, weights):
        loaded = load_model(
            checkpoint, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress
        )
        said = replies(
            loaded,
            [tokenizer.prompt(text) for text in texts],
            ends=tokenizer.ends,
            pad=tokenizer.pad,
            max_new_tokens=max_new_tokens,
            finished=(lambda done: progress("replies", done, len(texts))) if progress else None,
        )
    lines = []
    tokens = cut_off = 0
    for prompt, ids in zip(texts, said, strict=True):
        ended = ids[-1] in tokenizer.ends
        cut_off += not ended
        tokens += len(ids)
        reply = tokenizer.text(ids[:-1] if ended else ids)
        lines.append(json.dumps({"prompt": prompt, "reply": reply}, ensure_ascii=False) + "\n")
    temporary = out.with_name(out.name + ".tmp")
    try:
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise disk_error(error, out) from error
    return Demonstrations(str(out), len(lines), tokens, cut_off)
