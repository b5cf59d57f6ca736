"""The JSON schema for editors."""

from __future__ import annotations

from typing import Any

from surgery.recipe.schema import json_schema
from surgery.recipe.table import OPERATORS


def test_json_schema() -> None:
    schema = json_schema()
    assert schema["required"] == ["parents", "steps"]
    assert schema["additionalProperties"] is False
    definitions = schema["$defs"]
    step = definitions["merge.aoe"]
    assert step["properties"]["op"] == {"const": "merge.aoe"}
    assert step["additionalProperties"] is False
    assert set(step["required"]) == {"op", "base", "weights"}
    assert {"name", "select", "threshold", "norm"} <= set(step["properties"])
    assert {"$ref": "#/$defs/merge.aoe"} in definitions["Step"]["anyOf"]
    assert {"Output", "Step", "Rule", "Calibration", *OPERATORS} <= set(definitions)
    assert not {"Recipe", "Operator"} & set(definitions)


def test_json_schema_references_resolve() -> None:
    schema = json_schema()

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if "$ref" in value else []
            return own + [ref for item in value.values() for ref in references(item)]
        return [ref for item in value for ref in references(item)] if isinstance(value, list) else []

    assert {ref.removeprefix("#/$defs/") for ref in references(schema)} <= set(schema["$defs"])
