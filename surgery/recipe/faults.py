"""Turns what pydantic says about a recipe into problems with a path, a sentence and a suggestion.

A union reports a fault for each of its branches. Those of the branch that was meant lie deeper or say more
than "wrong type"; the rest is dropped, and where all branches only miss their type they become one sentence.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from surgery.errors import RecipeError
from surgery.operators.protocol import Operator
from surgery.recipe.problems import DocPath, Places, Problem, dotted, nearest_name, suggest
from surgery.recipe.schema import Recipe, Step, name_faults, step_class
from surgery.recipe.table import OPERATORS

_EXPECTED = {
    "string": "text", "float": "a number", "int": "a whole number", "bool": "true or false",
    "dict": "a mapping", "mapping": "a mapping", "model": "a mapping", "dataclass": "a mapping",
    "list": "a list", "tuple": "a list", "set": "a list", "frozen_set": "a list", "none": "nothing",
}  # fmt: skip
_MISTYPED = ("_type", "_parsing", "_parsing_size", "_from_float", "_required", "_attributes_type")
_LIMITS = {
    "greater_than_equal": ("ge", "at least"), "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"), "less_than": ("lt", "less than"),
}  # fmt: skip
_SHOWN_CHARS = 60


@dataclass(frozen=True)
class _Fault:
    """One of pydantic's errors, its place found in the document."""

    detail: ErrorDetails
    path: DocPath
    at_key: bool
    expected: str = ""
    """What should be there, where the fault is only that something else is."""


def check_recipe(data: Mapping[Any, Any], places: Places) -> tuple[Recipe | None, list[Problem]]:
    """Validate plain data: the recipe, or None and everything that is wrong with it."""
    try:
        return Recipe.model_validate(data), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    named = [detail for detail in details if detail["type"] == "recipe"]
    if len(named) < len(details) or any(detail["loc"][2:3] == ("operator",) for detail in named):
        details += _faulty_names(data)
    return None, _Wording(data, places).problems(details)


def _faulty_names(data: Mapping[Any, Any]) -> list[ErrorDetails]:
    """The check of names, which pydantic leaves out where anything else is wrong, on what is sound."""
    parents, steps, output = data.get("parents"), data.get("steps"), data.get("output")
    if not isinstance(parents, Mapping) or not parents or not isinstance(steps, list | tuple):
        return []
    sound: list[tuple[object, Operator | None]] = []
    for raw in steps:
        try:
            step = Step.model_validate(raw)
        except ValidationError:
            sound.append((raw.get("name") if isinstance(raw, Mapping) else None, None))
        else:
            sound.append((step.name, step.operator))
    donor = output.get("tokenizer_from") if isinstance(output, Mapping) else None
    faults = name_faults([str(name) for name in parents], sound, donor)
    return ValidationError.from_exception_data("Recipe", faults).errors(include_url=False) if faults else []


class _Wording:
    """Says in the words of a recipe what pydantic says in its own."""

    def __init__(self, data: Mapping[Any, Any], places: Places) -> None:
        self.data = data
        self.places = places

    def problems(self, details: list[ErrorDetails]) -> list[Problem]:
        faults = [self._fault(detail) for detail in details]
        problems: dict[tuple[DocPath, bool, str], Problem] = {}
        for fault in faults:
            if fault.detail["type"] == "too_short" and fault.detail["input"]:
                continue  # the items are there, but none of them is valid
            if not fault.expected:
                problem = self._problem(fault)
            elif any(self._says_more(other, fault) for other in faults):
                continue
            else:
                problem = self._mistyped(fault, faults)
            problems.setdefault((problem.path, problem.at_key, problem.message), problem)
        found = list(problems.values())
        meant = [self._meant(fault) for fault in faults if fault.detail["type"] == "extra_forbidden"]
        return [each for each in found if not (each.message.endswith("is missing") and each.path in meant)]

    def _fault(self, detail: ErrorDetails) -> _Fault:
        kind, loc = detail["type"], detail["loc"]
        if loc[0] == "steps" and loc[2:3] == ("operator",):
            loc = (*loc[:2], *loc[3:])
        path, value, at_key = self._follow(loc)
        context = detail.get("ctx", {})
        if kind == "missing":
            path = (*path, loc[-1])
        elif kind in ("extra_forbidden", "invalid_key"):
            at_key = True
        elif kind == "recipe":
            at_key = context["at_key"]
        elif kind in ("value_error", "assertion_error"):
            path = self._blamed_item(path, value, str(context.get("error", "")))
        expected = ""
        if kind in ("literal_error", "enum"):
            expected = context["expected"].replace("'", "`")
        elif kind == "recipe":
            expected = context["expected"]
        elif kind == "finite_number":
            expected = "a finite number"
        elif kind.endswith(_MISTYPED):
            stem = next((kind.removesuffix(end) for end in reversed(_MISTYPED) if kind.endswith(end)), kind)
            expected = _EXPECTED.get(stem, "")
        return _Fault(detail, path, at_key, expected)

    def _follow(self, loc: tuple[int | str, ...]) -> tuple[DocPath, Any, bool]:
        """The part of a location that exists in the document: names of union branches drop out."""
        path: DocPath = ()
        value: Any = self.data
        for segment in loc:
            if segment == "[key]":
                return path, value, True
            if _has(value, segment):
                value = value[segment]
                path = (*path, segment)
        return path, value, False

    @staticmethod
    def _blamed_item(path: DocPath, value: Any, message: str) -> DocPath:
        """Validators of a list complain of one entry by quoting it; that entry's place is the better one."""
        if isinstance(value, list | tuple):
            blamed = [i for i, item in enumerate(value) if isinstance(item, str) and f"`{item}`" in message]
            return (*path, blamed[0]) if blamed else path
        return path

    @staticmethod
    def _says_more(other: _Fault, fault: _Fault) -> bool:
        same = other.path == fault.path and (other.at_key or not fault.at_key)
        if same and other.at_key == fault.at_key:
            return not other.expected
        return same or (len(other.path) > len(fault.path) and other.path[: len(fault.path)] == fault.path)

    def _mistyped(self, fault: _Fault, faults: list[_Fault]) -> Problem:
        path, at_key = fault.path, fault.at_key
        same = [other for other in faults if (other.path, other.at_key) == (path, at_key)]
        wanted = dict.fromkeys(other.expected for other in same if other.expected)
        given = path[-1] if at_key else self._follow(path)[1]
        position = self.places.positions.get(path)
        text = position.text if position and not at_key else ""
        if isinstance(given, Mapping | list | tuple):
            shown = "a mapping" if isinstance(given, Mapping) else "a list"
        elif given is None or given == "":
            shown = "empty"
        else:
            shown = f"`{_shortened(text or str(given))}`"
        subject = f"the key `{_shortened(str(given))}`" if at_key else f"`{dotted(path) or 'recipe'}`"
        message = f"{subject} must be {' or '.join(wanted)}"
        if not at_key:
            message += ", but is empty" if shown == "empty" else f", not {shown}"
        hint = ""
        if "text" in wanted and isinstance(given, bool | int | float):
            hint = f'put it in quotes: "{text or given}"'
        elif isinstance(given, str):
            choices = [choice for each in wanted for choice in each.split("`")[1::2]]
            close = nearest_name(given, choices)
            hint = f"did you mean `{close}`?" if close else ""
        return Problem(path, message, hint, at_key)

    def _problem(self, fault: _Fault) -> Problem:
        detail, path, at_key = fault.detail, fault.path, fault.at_key
        context = detail.get("ctx", {})
        subject = f"`{dotted(path)}`" if path else "the recipe"
        match detail["type"]:
            case "recipe":
                return Problem(path, context["problem"], context["hint"], at_key)
            case "missing":
                hint = f"operators: {', '.join(OPERATORS)}" if path[-1:] == ("op",) else ""
                return Problem(path, f"{subject} is missing", hint)
            case "extra_forbidden" | "invalid_key":
                key = path[-1] if path else detail["loc"][-1]
                hint = suggest(key, self._known_keys(detail["loc"]), "keys here")
                return Problem(path, f"unknown key `{_shortened(str(key))}`", hint, True)
            case "greater_than_equal" | "greater_than" | "less_than_equal" | "less_than" as kind:
                name, words = _LIMITS[kind]
                given = _shortened(str(detail["input"]))
                return Problem(path, f"{subject} must be {words} {context[name]:g}, not {given}")
            case "too_short" | "string_too_short":
                return Problem(path, f"{subject} must not be empty", "", at_key)
            case "value_error" | "assertion_error":
                return Problem(path, str(context.get("error") or detail["msg"]))
            case _:
                return Problem(path, f"{subject}: {detail['msg'][:1].lower()}{detail['msg'][1:]}", "", at_key)

    def _meant(self, fault: _Fault) -> DocPath:
        """The path that an unknown key would have if it were spelt as suggested."""
        *parent, key = fault.path
        close = nearest_name(key, self._known_keys(fault.detail["loc"]))
        return (*parent, close) if close else ()

    def _known_keys(self, loc: tuple[int | str, ...]) -> list[str]:
        """The keys that are allowed beside the unknown one at `loc`."""
        models: list[type[BaseModel]] = [Recipe]
        own: list[str] = []
        for segment in loc[:-1]:
            if segment == "operator" and models == [Step]:
                try:
                    models, own = [step_class(self._follow((*loc[:2], "op"))[1])], ["op", "name"]
                except RecipeError:
                    return []
                continue
            inner = [m for model in models for m in _models_in_field(model, str(segment))]
            if inner:
                models, own = inner, []
        fields = (item for model in models for item in model.model_fields.items())
        return [*own, *dict.fromkeys(field.alias or name for name, field in fields)]


def _has(container: Any, segment: int | str) -> bool:
    if isinstance(container, list | tuple):
        return isinstance(segment, int) and 0 <= segment < len(container)
    return isinstance(container, Mapping) and segment in container


def _models_in_field(model: type[BaseModel], key: str) -> Iterator[type[BaseModel]]:
    for name, field in model.model_fields.items():
        if key == (field.alias or name):
            yield from _models_in(field.annotation)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models_in(part)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…"
