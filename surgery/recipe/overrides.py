"""`--set steps.0.weights.reasoner=0.5`: change a recipe from outside before it is checked.

A path is made of keys and list indexes, joined by dots; the value is read as YAML. What an override puts
into the document keeps the override's text as its place, so that complaints name it.
"""

from __future__ import annotations

from typing import Any

from surgery.errors import RecipeError
from surgery.recipe.document import Document, parse_document
from surgery.recipe.problems import DocPath, Position, Problem, dotted


def apply_override(document: Document, override: str, below: str = "") -> None:
    """Set one value in `document.data`, a mapping. Faults go to `document.problems`. Paths are below `below`
    (steps.0, say), which is not part of what users write."""
    origin = Position(0, 0, 0, 0, origin=f"--set {override}")
    path, equals, text = override.partition("=")
    segments = path.strip().split(".")
    if below:
        segments = [*below.split("."), *segments]
    if not equals or not all(segments):
        message = f"`{override}` is no override"
        hint = "write it as path=value, e.g. steps.0.threshold=0.01"
        document.problems.append(Problem((), message, hint, position=origin))
        return
    try:
        value = parse_document(text, "value")
    except RecipeError as error:
        hint = error.hint or "put the value in quotes, and the whole argument in quotes again for the shell"
        document.problems.append(Problem((), error.message, hint, position=origin))
        return
    document.problems += [
        Problem(each.path, each.message, each.hint, each.at_key, origin) for each in value.problems
    ]
    try:
        target = _assign(document, segments, value.data, origin)
    except LookupError as error:
        document.problems.append(Problem((), str(error.args[0]), position=origin))
        return
    for known in [each for each in document.positions if each[: len(target)] == target]:
        del document.positions[known]
    document.positions[target] = origin
    for inner, position in value.positions.items():
        document.positions[target + inner] = Position(0, 0, 0, 0, position.text, origin.origin)


def _assign(document: Document, segments: list[str], value: Any, origin: Position) -> DocPath:
    """Store `value`, making the mappings on the way that are missing. LookupError where there is no way."""
    here: Any = document.data
    path: DocPath = ()
    for depth, segment in enumerate(segments):
        key = _key(here, segment, path)
        path = (*path, key)
        if depth == len(segments) - 1:
            here[key] = value
        elif isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
            document.positions[path] = origin
        here = here[key]
    return path


def _key(container: Any, segment: str, path: DocPath) -> str | int:
    if isinstance(container, dict):
        numbered = any(isinstance(key, int) for key in container)
        return int(segment) if numbered and _is_index(segment) else segment
    place = f"`{dotted(path)}`"
    if not isinstance(container, list):
        raise LookupError(f"{place} is neither a mapping nor a list, so it has no `{segment}`")
    if not _is_index(segment):
        raise LookupError(f"{place} is a list; `{segment}` is no index")
    if int(segment) >= len(container):
        raise LookupError(f"{place} has {len(container)} items; there is no item {segment} (the first is 0)")
    return int(segment)


def _is_index(segment: str) -> bool:
    return segment.isascii() and segment.isdecimal() and len(segment) < 10
