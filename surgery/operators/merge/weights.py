"""Weights of parents by tensor: numbers, layer anchors, and rules that give some tensors their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from surgery.stream.roles import TensorInfo
from surgery.stream.select import Matcher, check_entry, layers_matcher, matcher, pattern_matcher

Weight = Annotated[float, Field(ge=0.0, le=1.0)]
Anchors = dict[int | Literal["embedding", "head"], Weight]
ROUNDING = 1e-6
"""How far weights may miss 1."""


def weight_at(weight: float | Mapping[Any, float], info: TensorInfo) -> float:
    """A weight for one tensor: a number, or linear between layer anchors and constant beyond them.

    Before the first layer (`embedding`) and after the last (`head`, the final norm) the anchors of
    those names hold, or else the first and the last number.
    """
    if not isinstance(weight, Mapping):
        return weight
    numbered = sorted((key, value) for key, value in weight.items() if isinstance(key, int | float))
    if info.layer is None:
        at_end = info.role in ("head", "norm")
        named = weight.get("head" if at_end else "embedding")
        return named if named is not None else numbered[-1 if at_end else 0][1]
    before = [pair for pair in numbered if pair[0] <= info.layer]
    after = [pair for pair in numbered if pair[0] >= info.layer]
    if not before or not after:
        return (after or before)[0 if after else -1][1]
    (low, start), (high, stop) = before[-1], after[0]
    return start if low == high else start + (stop - start) * (info.layer - low) / (high - low)


def weight_vector(weights: Mapping[str, float | Anchors], base: str, info: TensorInfo) -> dict[str, float]:
    """Weights by parent for one tensor, the base first; ValueError where they don't sum to 1."""
    others = {name: weight_at(value, info) for name, value in weights.items() if name != base}
    rest = 1.0 - sum(others.values())
    if rest < -ROUNDING:
        raise ValueError(f"the weights sum to {sum(others.values()):g}, which is more than 1")
    rest = rest if rest > ROUNDING else 0.0
    if base in weights and abs(weight_at(weights[base], info) - rest) > ROUNDING:
        total = weight_at(weights[base], info) + sum(others.values())
        raise ValueError(f"the weights sum to {total:g}, not 1; leave out {base} and it gets what is left")
    return {base: rest, **others}


def check_sum(weights: Mapping[str, float | Anchors], base: str) -> None:
    """Refuse constant weights that don't sum to 1; anchors are checked layer by layer when applied."""
    if not any(isinstance(value, dict) for value in weights.values()):
        weight_vector(weights, base, TensorInfo("other", None, None, False))


def check_pattern(text: str) -> str:
    """`text` if it is a regular expression (`re:` in front is fine); ValueError otherwise."""
    pattern_matcher(text.removeprefix("re:"))
    return text


def check_layers(value: Any) -> str:
    """A layer range as text; a single layer may be a number."""
    layers_matcher(str(value))
    return str(value)


class Where(BaseModel):
    """Tensors for which every given condition holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Annotated[str, AfterValidator(check_entry)] | None = None
    match: Annotated[str, AfterValidator(check_pattern)] | None = None
    layers: Annotated[str, BeforeValidator(check_layers, json_schema_input_type=str | int)] | None = None

    def matcher(self) -> Matcher:
        tests = [matcher(self.role)] if self.role else []
        if self.match:
            tests.append(pattern_matcher(self.match.removeprefix("re:")))
        if self.layers:
            tests.append(layers_matcher(self.layers))
        return lambda ref: all(test(ref) for test in tests)


class Rule(Where):
    """Some tensors; `weights` and `threshold` override the step's there."""

    weights: dict[str, Weight | Anchors] | None = None
    threshold: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)

    @field_validator("weights")
    @classmethod
    def _numbered(cls, value: dict[str, Weight | Anchors] | None) -> dict[str, Weight | Anchors] | None:
        return check_anchors(value or {}) if value is not None else None


def check_anchors(weights: dict[str, Weight | Anchors]) -> dict[str, Weight | Anchors]:
    """Refuse anchors without a single layer number."""
    for parent, value in weights.items():
        if isinstance(value, dict) and not any(isinstance(key, int) for key in value):
            raise ValueError(f"the anchors of {parent} name no layer")
    return weights


Entry = Annotated[str, AfterValidator(check_entry)]
