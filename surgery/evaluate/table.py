"""The result of an evaluation: one row per model, and what the figures depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surgery.evaluate.divergence import Divergence
from surgery.evaluate.intervals import CONFIDENCE
from surgery.evaluate.perplexity import Perplexity
from surgery.evaluate.tasks import TaskScore


@dataclass(frozen=True)
class Settings:
    """What the figures depend on, and what they were computed with."""

    tasks: str | None
    text: str | None
    limit: int | None
    max_new_tokens: int
    answer: str | None
    tag: str
    context: int | None
    max_windows: int | None
    add_bos: bool | None
    batch_size: int
    device: str
    dtype: str
    confidence: float = CONFIDENCE
    threads: int | None = None
    streamed: bool = False


@dataclass(frozen=True)
class ModelScore:
    """One row. What was not asked for is None; `left_out` names tensors that transformers does not run."""

    name: str
    model: str
    is_parent: bool
    parameters: int
    left_out: tuple[str, ...]
    starts_with_bos: bool
    tasks: TaskScore | None
    perplexity: Perplexity | None
    divergence: Divergence | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.model,
            "is_parent": self.is_parent,
            "parameters": self.parameters,
            "left_out": list(self.left_out),
            "starts_with_bos": self.starts_with_bos,
            "tasks": self.tasks.as_dict() if self.tasks else None,
            "perplexity": self.perplexity.as_dict() if self.perplexity else None,
            "divergence": self.divergence.as_dict() if self.divergence else None,
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True)
class Evaluation:
    """The table; rows in the order of the models, an extra parent first."""

    rows: tuple[ModelScore, ...]
    parent: str | None
    settings: Settings
    versions: Mapping[str, str]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `surgery eval --json`, without the replies themselves."""
        return {
            "schema": 1,
            "models": [row.as_dict() for row in self.rows],
            "parent": self.parent,
            "settings": asdict(self.settings),
            "versions": dict(self.versions),
            "notes": list(self.notes),
        }
