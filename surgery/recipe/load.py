"""Load a recipe: from a file, by the name of a shipped one, from text, or from plain data. A file of
mergekit's is read as the recipe that does the same.

Whatever is wrong is told at once, as file:line:column with a suggestion (RecipeError, exit code 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import RecipeError
from surgery.recipe.document import MAX_CHARS, Document, line_and_column, parse_document
from surgery.recipe.faults import check_recipe
from surgery.recipe.mergekit import from_mergekit, is_mergekit
from surgery.recipe.overrides import apply_override
from surgery.recipe.problems import DocPath, Places, Position, Problem, suggest
from surgery.recipe.schema import Recipe
from surgery.resources import recipe_folder


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe with the text it comes from and the places of everything in it."""

    recipe: Recipe
    filename: str = "recipe"
    text: str = ""
    positions: Mapping[DocPath, Position] = field(default_factory=dict)

    def locate(self, path: Sequence[str | int], *, at_key: bool = False) -> str:
        """file:line:column (1-based) of the value at `path`, or of its key; of the nearest ancestor where
        `path` is not in the text; the `--set` that put it there; the path itself where there is no text."""
        return Places(self.filename, self.positions).locate(path, at_key=at_key)

    def attach(self, error: RecipeError) -> RecipeError:
        """The same error, located: fills `error.location` from `error.path` unless it has one."""
        if not error.location:
            error.location = self.locate(error.path)
        return error


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe file, or a shipped recipe by name (`chimera`, `chimera.yaml`, `recipes/chimera.yaml`).

    A file of that name wins. `overrides` are `path=value`, see `overrides.py`. Raises RecipeError.
    """
    path = _find(source)
    filename = str(path)
    return parse_recipe(_read(path), filename, overrides)


def parse_recipe(text: str, filename: str = "recipe", overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe from YAML text; `filename` is for messages. Raises RecipeError."""
    document = parse_document(text, filename)
    if document.data is None and not document.problems:
        hint = "start from a shipped recipe, such as `chimera`"
        raise RecipeError("the recipe is empty", location=f"{filename}:1:1", hint=hint)
    return _checked(document, overrides)


def recipe_from_dict(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe from plain data, as YAML would give it. Raises RecipeError; places are paths."""
    return _checked(Document("recipe", "", _plain(data)), overrides)


def one_step(
    op: str, model: str, params: Mapping[str, Any], output: Mapping[str, Any], overrides: Sequence[str] = ()
) -> LoadedRecipe:
    """The recipe of one step on one model; `overrides` set params of the step. Raises RecipeError."""
    data = {"parents": {"model": model}, "steps": [{"op": op, **params}], "output": dict(output)}
    document = Document("recipe", "", _plain(data))
    for override in overrides:
        apply_override(document, override, below="steps.0")
    return _checked(document, ())


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with surgery, by the name that `load_recipe` takes."""
    folder = recipe_folder()
    found = sorted(folder.rglob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def _checked(document: Document, overrides: Sequence[str]) -> LoadedRecipe:
    if not isinstance(document.data, dict):
        problem = Problem((), "a recipe is a mapping with the keys parents, steps and output")
        raise document.places.error([*document.problems, problem])
    if is_mergekit(document.data):
        document = from_mergekit(document)
    for override in overrides:
        apply_override(document, override)
    recipe, problems = check_recipe(document.data, document.places)
    if recipe is None or document.problems:
        raise document.places.error([*document.problems, *problems])
    return LoadedRecipe(recipe, document.filename, document.text, document.positions)


def _find(source: str | Path) -> Path:
    path = Path(source)
    try:
        if path.is_dir():
            raise RecipeError(
                f"{path} is a folder, not a recipe", location=str(path), hint="`surgery inspect` reads models"
            )
        if path.exists():
            return path
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", location=str(path)) from error
    shipped = shipped_recipes()
    name = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    raise RecipeError(
        f"there is no file {path}, and no recipe of that name comes with surgery",
        location=str(path),
        hint=suggest(name, list(shipped), "shipped recipes"),
    )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(4 * MAX_CHARS + 1)
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", location=str(path)) from error
    if len(data) > 4 * MAX_CHARS:
        raise RecipeError(f"{path} is larger than any recipe", location=f"{path}:1:1")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig")
        raise RecipeError(
            f"this is no text in UTF-8: byte {data[error.start]:#04x} cannot be decoded",
            location=f"{path}:{line_and_column(before)}",
            hint="a recipe is a YAML file in UTF-8",
        ) from error


def _plain(data: Any) -> Any:
    """A copy in which overrides can be set without changing the caller's data."""
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(item) for item in data] if isinstance(data, list | tuple) else data
