"""The models of an evaluation before their weights are read: names, tokenizers, and whether they compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibrate.tokenizer import Tokenizer, load_tokenizer
from surgery.errors import UsageError
from surgery.evaluate.perplexity import CONTEXT, Document, windows
from surgery.stream.source import open_checkpoint

if TYPE_CHECKING:
    from surgery.stream.checkpoint import Checkpoint

    Model = str | Path | Checkpoint
    """A folder, a hub id, or a checkpoint that may be lazy."""


@dataclass(frozen=True)
class Candidate:
    """A model before its weights are read."""

    name: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    windows: tuple[tuple[int, ...], ...] = ()


def prepare(
    models: Sequence[Model] | Mapping[str, Model],
    parent: Model | None,
    *,
    add_bos: bool | None = None,
    trust_remote_code: bool = False,
) -> tuple[list[Candidate], str | None]:
    """The models opened, with names and tokenizers, an extra parent first; and the parent's name.

    Raises UsageError for names, CheckpointError for models.
    """
    named, parent_name = name_models(models, parent)
    candidates = []
    for name, model in named.items():
        checkpoint = open_checkpoint(model) if isinstance(model, str | Path) else model
        tokenizer = load_tokenizer(checkpoint, add_bos=add_bos, trust_remote_code=trust_remote_code)
        candidates.append(Candidate(name, checkpoint, tokenizer))
    return candidates, parent_name


def name_models(
    models: Sequence[Model] | Mapping[str, Model], parent: Model | None
) -> tuple[dict[str, Model], str | None]:
    """Models under the names of their rows, an extra parent first, and the parent's name."""
    if isinstance(models, Mapping):
        named = dict(models)
    else:
        labels = [label_of(model) for model in models]
        short = [label.rstrip("/").rpartition("/")[2] for label in labels]
        names = [s if short.count(s) == 1 else label for s, label in zip(short, labels, strict=True)]
        named = dict(zip(names, models, strict=True))
        if len(named) < len(labels):
            raise UsageError("a model is given twice", hint="give each once, or name them in a mapping")
    if not named:
        raise UsageError("no models to evaluate")
    if parent is None:
        return named, None
    if isinstance(parent, str) and parent in named:
        return named, parent
    for name, model in named.items():
        if model is parent or identity(model) == identity(parent):
            return named, name
    name = label_of(parent).rstrip("/").rpartition("/")[2]
    if name in named:
        name = f"{name} (parent)"
    return {name: parent, **named}, name


def label_of(model: Model) -> str:
    return str(model) if isinstance(model, str | Path) else model.label


def identity(model: Model) -> object:
    """Equal for two ways of writing the same folder; a lazy checkpoint is equal to itself alone."""
    if not isinstance(model, str | Path):
        return id(model)
    path = Path(model).expanduser()
    return path.resolve() if path.is_dir() else str(model)


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return {**checkpoint.config, **(checkpoint.config.get("text_config") or {})}


def shared_context(candidates: Sequence[Candidate], asked: int | None) -> int:
    """Tokens in a window, the same for all: as asked, else 512 or the shortest context of the models.

    Raises UsageError where a model does not take the context that was asked for.
    """
    longest = {each.name: text_config(each.checkpoint).get("max_position_embeddings") for each in candidates}
    known = {name: value for name, value in longest.items() if isinstance(value, int) and value > 0}
    if asked is None:
        return min(CONTEXT, *known.values()) if known else CONTEXT
    if asked < 2:
        raise UsageError(f"a context of {asked} tokens has nothing to predict", hint="use 2 or more")
    for name, value in known.items():
        if asked > value:
            raise UsageError(f"the context of {asked} tokens is longer than the {value} that {name} takes")
    return asked


def with_windows(
    candidates: Sequence[Candidate], documents: Sequence[Document], context: int, limit: int | None
) -> list[Candidate]:
    """The candidates with the text cut into windows, by each one's own tokenizer."""
    return [replace(each, windows=windows(documents, each.tokenizer, context, limit)) for each in candidates]


def check_comparable(candidates: Sequence[Candidate], parent_name: str) -> None:
    """Raise UsageError unless all predict the same tokens after the same tokens, as KL needs."""
    parent = next(each for each in candidates if each.name == parent_name)
    for each in candidates:
        sizes = [text_config(one.checkpoint).get("vocab_size") for one in (parent, each)]
        if each.windows != parent.windows or sizes[0] != sizes[1]:
            raise UsageError(
                f"{each.name} has no KL divergence from {parent_name}: tokenizers or vocabularies differ",
                hint="leave out the parent, or that model",
            )
