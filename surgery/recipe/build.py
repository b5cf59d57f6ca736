"""From a recipe to a lazy checkpoint: open the parents, apply the steps, choose the tokenizer.

Reads headers and small files only. What cannot work is refused here, with the place in the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from surgery.errors import RecipeError
from surgery.operators.protocol import PREVIOUS, LayerOperator, Operator, RunContext
from surgery.recipe.schema import Recipe
from surgery.stream.checkpoint import Checkpoint, Event
from surgery.stream.glance import Glance, glance
from surgery.stream.hub import Hub
from surgery.stream.source import open_checkpoint

_TOKENIZER_STEMS = (
    "tokenizer", "tokenization_", "special_tokens_map", "added_tokens", "vocab", "merges.txt", "spiece",
    "chat_template", "additional_chat_templates/", "generation_config",
)  # fmt: skip


Apply = Callable[[int, Operator, Mapping[str, Checkpoint]], Checkpoint]
"""Makes the result of a step, given its number."""


def outline(index: int, operator: Operator, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
    """A step's result as far as headers tell."""
    return (
        operator.outline(inputs, RunContext())
        if isinstance(operator, LayerOperator)
        else operator.apply(inputs)
    )


class Parents:
    """Opens the parents of recipes, each model once under each name."""

    def __init__(self) -> None:
        self._hub = Hub()
        self._opened: dict[tuple[str, str], Checkpoint] = {}

    def of(self, recipe: Recipe, folder: Path | None) -> dict[str, Checkpoint]:
        """Every parent, by its name in the recipe."""
        found = {}
        for name, model in parent_places(recipe, folder):
            key = (name, str(model))
            if key not in self._opened:
                self._opened[key] = open_checkpoint(model, name, self._hub)
            found[name] = self._opened[key]
        return found


def build(
    recipe: Recipe, folder: Path | None = None, apply: Apply = outline, parents_of: Parents | None = None
) -> Checkpoint:
    """The recipe's result, unread. Raises RecipeError (located by path) and CheckpointError.

    `folder` is the recipe's own: a relative parent is looked up there if it is not in the current one.
    `apply` makes each step's result. `parents_of` has the parents that other recipes opened.
    """
    known = (parents_of or Parents()).of(recipe, folder)
    parents = dict(known)
    result = next(iter(known.values()))
    for index, step in enumerate(recipe.steps):
        inputs = {name: result if name == PREVIOUS else known[name] for name in step.operator.input_names()}
        try:
            result = apply(index, step.operator, inputs)
        except RecipeError as error:
            error.path = ("steps", index, *error.path)
            raise
        if step.name:
            known[step.name] = result
    donor = recipe.output.tokenizer_from
    if donor is not None:
        result = result.replace(side_files=with_tokenizer(result.side_files, known[donor].side_files))
    return result.replace(events=(*result.events, *tokenizer_events(parents)))


def glance_at_parents(recipe: Recipe, folder: Path | None) -> list[Glance]:
    """A first look at every parent, which reads no headers."""
    hub = Hub()
    return [glance(model, name, hub) for name, model in parent_places(recipe, folder)]


def parent_places(recipe: Recipe, folder: Path | None) -> Iterator[tuple[str, str | Path]]:
    """Names of parents and where they are."""
    for name, model in recipe.parents.items():
        beside = folder / model if folder and not Path(model).expanduser().exists() else None
        yield name, beside if beside and beside.is_dir() else model


def is_tokenizer_file(name: str) -> bool:
    """Tokenizer, chat template or generation config."""
    return name.startswith(_TOKENIZER_STEMS) or name.endswith(".tiktoken")


def with_tokenizer(files: Mapping[str, Path], donor: Mapping[str, Path]) -> dict[str, Path]:
    """Side files with the donor's tokenizer, chat template and generation config."""
    kept = {name: path for name, path in files.items() if not is_tokenizer_file(name)}
    return kept | {name: path for name, path in donor.items() if is_tokenizer_file(name)}


def tokenizer_events(parents: Mapping[str, Checkpoint]) -> tuple[Event, ...]:
    """An event for each kind of tokenizer file in which parents differ."""
    events = []
    for what, find in (
        ("tokenizer", _vocabulary), ("chat template", _template), ("generation config", _generation),
    ):  # fmt: skip
        found = {name: find(parent.side_files) for name, parent in parents.items()}
        if len(set(found.values())) > 1:
            kinds: dict[str | None, list[str]] = {}
            for name, value in found.items():
                kinds.setdefault(value, []).append(name)
            told = " / ".join(", ".join(names) for names in kinds.values())
            events.append(Event("tokenizer", f"the parents differ in their {what}: {told}"))
    return tuple(events)


def _vocabulary(files: Mapping[str, Path]) -> str | None:
    for name in ("tokenizer.json", "tokenizer.model"):
        if name in files:
            return sha256(files[name].read_bytes()).hexdigest()
    return None


def _template(files: Mapping[str, Path]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].read_text()
    template = _json(files, "tokenizer_config.json").get("chat_template")
    return None if template is None else json.dumps(template, sort_keys=True)


def _generation(files: Mapping[str, Path]) -> str | None:
    config = _json(files, "generation_config.json")
    config.pop("transformers_version", None)
    return json.dumps(config, sort_keys=True) if config else None


def _json(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name].read_bytes())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
