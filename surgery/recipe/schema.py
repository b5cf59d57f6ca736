"""The typed form of a recipe: parents, steps, output. Unknown keys are refused everywhere.

A step is written flat, `op` and `name` beside the params of its operator, and holds the operator once it
is validated. The operators' own classes say what their params are; this file knows none of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import models_json_schema
from pydantic_core import InitErrorDetails, PydanticCustomError

from surgery.errors import RecipeError, UsageError
from surgery.operators.protocol import PREVIOUS, Operator
from surgery.recipe.problems import DocPath, suggest
from surgery.recipe.table import OPERATORS, operator_class
from surgery.stream.units import parse_size

Name = Annotated[str, Field(min_length=1)]
_CLASS = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*:[A-Za-z_]\w*", re.ASCII)


class Output(BaseModel):
    """How the result is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal[
        "source", "bf16", "fp8-block", "compressed-tensors", "gptq", "gptq-v2", "awq", "bnb-nf4", "mxfp4"
    ] = "source"
    """`source`: every tensor as stored in the base; `compressed-tensors`, `gptq`, `awq`: quantized weights in
    those layouts; `bf16`, `fp8-block`, `bnb-nf4`, `mxfp4`: linear weights rounded to it."""
    tokenizer_from: Name | None = None
    """Whose tokenizer, chat template and generation config the child gets; the base's by default."""
    allow_nonfinite: bool = Field(default=False, strict=True)
    """Let NaN and infinity in parents pass."""
    shard_size: str = "5GB"
    """Largest shard: 5GB, 500MB, 1GiB, or a number of bytes."""

    @field_validator("shard_size", mode="before", json_schema_input_type=str | int)
    @classmethod
    def _number_of_bytes(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @field_validator("shard_size")
    @classmethod
    def _is_size(cls, value: str) -> str:
        parse_size(value)
        return value

    @property
    def shard_bytes(self) -> int:
        return parse_size(self.shard_size)


class Step(BaseModel):
    """One operator with its params. `op` is a name from the table or `package.module:Class`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: str
    name: Name | None = None
    """Later steps read this step's result by this name."""
    operator: SerializeAsAny[Operator]

    @model_validator(mode="before")
    @classmethod
    def _gather_params(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or isinstance(data.get("operator"), Operator):
            return data
        step = {key: data[key] for key in ("op", "name") if key in data}
        return step | {"operator": {key: data[key] for key in data if key not in step}}

    @field_validator("operator", mode="plain")
    @classmethod
    def _build_operator(cls, value: Any, info: ValidationInfo) -> Any:
        op = info.data.get("op")
        if isinstance(value, Operator) or op is None:
            return value
        try:
            operator = step_class(op).model_validate(value)
            operator.input_names()
        except ValidationError:
            raise
        except RecipeError as error:
            raise _invalid([_fault(error.path, error.message, hint=error.hint)]) from error
        except Exception as error:
            # Params reach code of third parties here; whatever it raises, the user needs the place.
            message = f"{op} fails on its params: {type(error).__name__}: {error}"
            raise _invalid([_fault((), message)]) from error
        misread = list(_misread(value, operator.model_dump(by_alias=True), ()))
        if misread:
            raise _invalid([_fault(path, "misread", expected=expected) for path, expected in misread])
        return operator

    def resolved(self) -> dict[str, Any]:
        """Plain data, flat again. A param that is None counts as not given."""
        name = {} if self.name is None else {"name": self.name}
        params = self.operator.model_dump(mode="json", by_alias=True, exclude_none=True)
        return {"op": self.op, **name, **params}


class Recipe(BaseModel):
    """A whole recipe. The result of the last step is the output."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    parents: dict[Name, Name] = Field(min_length=1)
    """The models to read, by the name that steps use: a folder, or a hub id as repo or repo@revision."""
    steps: tuple[Step, ...] = Field(min_length=1)
    """What is done, in order."""
    output: Output = Output()

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        steps = [(step.name, step.operator) for step in self.steps]
        faults = name_faults(list(self.parents), steps, self.output.tokenizer_from)
        if faults:
            raise _invalid(faults)
        return self

    def resolved(self) -> dict[str, Any]:
        """Plain data that loads again to an equal recipe, defaults written out."""
        return {
            "parents": dict(self.parents),
            "steps": [step.resolved() for step in self.steps],
            "output": self.output.model_dump(mode="json", exclude_none=True),
        }


def step_class(op: str) -> type[Operator]:
    """The operator class of a step. Raises RecipeError with the path ("op",) where there is none."""
    if op not in OPERATORS and not _CLASS.fullmatch(op):
        hint = suggest(op, list(OPERATORS), "operators")
        raise RecipeError(f"unknown operator `{op}`", path=("op",), hint=hint)
    try:
        return operator_class(op)
    except UsageError as error:
        raise RecipeError(error.message, path=("op",), hint=error.hint) from error
    except Exception as error:
        # Importing third-party code may raise anything.
        message = f"operator {op} cannot be imported: {type(error).__name__}: {error}"
        raise RecipeError(message, path=("op",)) from error


def name_faults(
    parents: Sequence[str], steps: Sequence[tuple[object, Operator | None]], tokenizer_from: object
) -> list[InitErrorDetails]:
    """Names that stand for no checkpoint, and steps that nothing reads. `steps` are names and operators;
    a step that is itself faulty has None for an operator."""
    faults = []
    known = list(parents)
    read: set[int] = set()
    number_of: dict[str, int] = {}
    for index, (name, operator) in enumerate(steps):
        for wanted in operator.input_names() if operator else ():
            if wanted == PREVIOUS:
                read.add(index - 1)
                if index == 0 and len(parents) > 1:
                    problem = f"which of {len(parents)} parents this step works on is not said"
                    hint = f"add `input:` with one of {', '.join(map(str, parents))}"
                    faults.append(_fault(("steps", index), problem, hint=hint))
                continue
            read.add(number_of.get(wanted, -1))
            if wanted not in known:
                path, at_key = _place_of(wanted, operator)
                later = any(wanted == other for other, _ in steps[index:])
                problem = f"`{wanted}` is no {'' if later else 'parent and no '}earlier step"
                hint = suggest(wanted, known, "known here")
                faults.append(_fault(("steps", index, *path), problem, hint=hint, at_key=at_key))
        if isinstance(name, str):
            if name in known:
                problem = f"`{name}` is already a parent or an earlier step"
                faults.append(_fault(("steps", index, "name"), problem))
                read.add(index)  # who reads it cannot be told
            else:
                known.append(name)
                number_of[name] = index
    if all(operator for _, operator in steps):
        faults += [
            _fault(
                ("steps", index), "nothing reads the result of this step",
                hint="give the step a `name` and read it in a later step",
            )
            for index in range(len(steps) - 1) if index not in read
        ]  # fmt: skip
    if isinstance(tokenizer_from, str) and tokenizer_from not in known:
        problem = f"`{tokenizer_from}` is no parent and no step"
        hint = suggest(tokenizer_from, known, "known")
        faults.append(_fault(("output", "tokenizer_from"), problem, hint=hint))
    return faults


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors: a step is one of the table's operators, or a class by path."""
    classes = {op: step_class(op) for op in OPERATORS}
    refs, schema = models_json_schema(
        [(Recipe, "validation"), *((each, "validation") for each in classes.values())], by_alias=True
    )
    definitions = schema["$defs"]
    name = {"type": "string", "minLength": 1, "description": "Later steps read the result by this name."}
    for op, operator in classes.items():
        params = definitions.pop(refs[operator, "validation"]["$ref"].rpartition("/")[2])
        definitions[op] = params | {
            "title": op,
            "properties": {"op": {"const": op}, "name": name} | params["properties"],
            "required": ["op", *params.get("required", [])],
        }
    by_path = {"type": "string", "pattern": f"^{_CLASS.pattern}$", "description": "package.module:Class"}
    definitions["Step"] = {
        "anyOf": [
            *({"$ref": f"#/$defs/{op}"} for op in classes),
            {"type": "object", "properties": {"op": by_path, "name": name}, "required": ["op"]},
        ]
    }
    definitions.pop("Operator", None)
    recipe = definitions.pop("Recipe")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe, "$defs": definitions}


def _place_of(name: str, operator: Operator | None) -> tuple[DocPath, bool]:
    """Where params name a checkpoint: the path, and whether it stands there as a key."""
    params = operator.model_dump(by_alias=True) if operator else {}
    for path, value in _leaves(params, ()):
        if name in path[1:]:  # the first key is a param's own name
            return path[: path.index(name, 1) + 1], True
        if value == name:
            return path, False
    return (), False


def _leaves(value: Any, path: DocPath) -> Iterator[tuple[DocPath, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _misread(given: Any, taken: Any, path: DocPath) -> Iterator[tuple[DocPath, str]]:
    """What pydantic would let pass: truth values taken for numbers, and numbers that are not finite.
    Yields the path and what is expected there."""
    if isinstance(taken, Mapping) and isinstance(given, Mapping):
        taken_by_text = {str(key): value for key, value in taken.items()}
        for key, value in given.items():
            if str(key) in taken_by_text:
                yield from _misread(value, taken_by_text[str(key)], (*path, key))
    elif isinstance(taken, list | tuple):
        items = given if isinstance(given, list | tuple) else [given]
        for index, (one, other) in enumerate(zip(items, taken, strict=False)):
            yield from _misread(one, other, (*path, index))
    elif isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        yield path, "a number"
    elif isinstance(taken, float) and not math.isfinite(taken):
        yield path, "a finite number"


def _fault(
    path: DocPath, message: str, *, hint: str = "", at_key: bool = False, expected: str = ""
) -> InitErrorDetails:
    context = {"problem": message, "hint": hint, "at_key": at_key, "expected": expected}
    return InitErrorDetails(type=PydanticCustomError("recipe", "{problem}", context), loc=path, input=None)


def _invalid(faults: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data("Recipe", faults)
