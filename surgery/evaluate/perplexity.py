"""Perplexity of a text: exp of the mean negative log-likelihood per token.

The text is cut into windows of `context` tokens that do not overlap. The first token of a window has nothing
before it and is not scored, so a window of n tokens gives n - 1 predictions; the last window may be shorter.
Longer contexts and overlapping windows give lower figures for the same model, so figures compare only at
equal context, tokenizer and convention. Log-likelihoods are summed in float64; the interval is over windows.

A .jsonl file holds one document per line under `text`, joined as <start>text<end>; any other file is one
running text, <start>text, without an end. Start and end tokens are put in where the tokenizer has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibrate.lines import read_lines, read_object
from surgery.errors import CheckpointError, UsageError
from surgery.evaluate.intervals import Mean

if TYPE_CHECKING:
    import torch

    from surgery.calibrate.tokenizer import Tokenizer
    from surgery.evaluate.load import LoadedModel

CONTEXT = 512
"""Tokens in a window unless the caller or the model says otherwise."""
_CHUNK = 64
"""Positions whose float64 log-probabilities are held at once: 66 MB at the 129,280 tokens of DeepSeek-V3."""


@dataclass(frozen=True)
class Document:
    """`ended`: whether the text comes to an end, or merely stops."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Perplexity:
    """`nll` is in nats per token over `tokens` predictions; `low` and `high` are None for a single window."""

    value: float
    low: float | None
    high: float | None
    nll: Mean
    tokens: int
    windows: int
    context: int

    @classmethod
    def of(cls, sums: Sequence[float], sizes: Sequence[int], context: int) -> Perplexity:
        """From the summed negative log-likelihood and the number of predictions of each window."""
        nll = Mean.of(sums, sizes)
        low, high = (None if end is None else _exp(end) for end in (nll.low, nll.high))
        return cls(_exp(nll.value), low, high, nll, sum(sizes), len(sizes), context)

    def as_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "nll": self.nll.as_dict(),
            "tokens": self.tokens,
            "windows": self.windows,
            "context": self.context,
        }


def read_documents(path: Path) -> tuple[Document, ...]:
    """The documents of a text file. Raises UsageError naming file and line."""
    lines = read_lines(path)
    if path.suffix != ".jsonl":
        text = "\n".join(lines)
        documents = [Document(text, ended=False)] if text.strip() else []
    else:
        documents = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                found = read_object(line, f"{path}:{number}").get("text")
                if not isinstance(found, str):
                    raise UsageError(f"{path}:{number}: `text` must be a text")
                documents.append(Document(found, ended=True))
    if not documents:
        raise UsageError(f"{path} holds no text")
    return tuple(documents)


def windows(
    documents: Sequence[Document], tokenizer: Tokenizer, context: int, limit: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Ids of each window of 2 to `context` tokens; the first `limit` of them where that is given."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.document(document.text, ended=document.ended)
        if limit is not None and len(ids) >= limit * context:
            break
    cut = [tuple(ids[start : start + context]) for start in range(0, len(ids), context)]
    found = tuple(window for window in cut if len(window) > 1)[:limit]
    if not found:
        raise UsageError("the text has fewer than two tokens", hint="give a longer text")
    return found


def logits_of(loaded: LoadedModel, window: Sequence[int]) -> torch.Tensor:
    """Logits of the predictions inside a window, [len(window) - 1, vocabulary], in the compute dtype."""
    import torch

    with torch.no_grad():
        out: Any = loaded.model(input_ids=torch.tensor([list(window)], device=loaded.device), use_cache=False)
    logits: torch.Tensor = out.logits[0, :-1]
    return logits


def window_nll(logits: torch.Tensor, window: Sequence[int]) -> float:
    """Summed negative log-likelihood in nats, float64, of window[1:] under `logits` [len(window) - 1, V].

    Raises CheckpointError where it is no number: the model overflows or holds NaN.
    """
    import torch

    targets = torch.tensor(list(window[1:]), device=logits.device)
    total = 0.0
    for start in range(0, len(targets), _CHUNK):
        log_probabilities = logits[start : start + _CHUNK].double().log_softmax(dim=-1)
        picked = log_probabilities.gather(1, targets[start : start + _CHUNK, None])
        total -= float(picked.sum())
    if not total < float("inf"):
        raise CheckpointError(
            f"the log-likelihood of a window is {-total}: the model gives NaN or infinity",
            hint="compute in float32, and look for NaN in the weights: surgery verify",
        )
    return total


def _exp(nll: float) -> float:
    # 700 nats per token is beyond any model; capped to stay a finite number, which JSON needs.
    return exp(min(nll, 700.0))
