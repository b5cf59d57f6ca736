"""What each tensor of a checkpoint is: its role, layer and expert, from its name alone.

The names are those found on disk in published checkpoints, not the ones a library uses in memory. They are
data: architectures/*.yaml holds one short file per family,

    model_types: [qwen3_moe]         # values of "model_type" in config.json
    extends: llama                   # rules of that file follow this file's own
    roles:                           # first match wins
      - router: layers.N.mlp.gate.   # start of the name inside the decoder; N stands for an index
    experts:                         # what a config says of routed experts, see ExpertRules
    fused:                           # stored tensors that hold many experts, see layouts.py

"Inside the decoder" is without the wrappers in front (`model.`, `language_model.`, `mtp.`, in any order).
Whatever then matches no rule is `other`: vision and audio towers, projectors, all of an unknown family.

Multi-token-prediction (MTP) layers come in two forms: as decoder layers numbered after the last one
(DeepSeek-V3, GLM-4.5), or under `mtp.` with a count of their own. Both get `mtp=True`, the role that the
tensor would have elsewhere, and a layer number after the last decoder layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from surgery.stream.layouts import FusedRule, Rows, View, split

Role = Literal[
    "routed_expert", "shared_expert", "router", "attention", "dense_mlp", "norm", "embedding", "head", "other"
]
ROLES: tuple[str, ...] = get_args(Role)
QUANTIZED_ROLES = frozenset({"routed_expert", "shared_expert", "attention", "dense_mlp"})
"""Whose linear weights a format of few bits holds; routers, embeddings and heads keep their values."""

_WRAPPERS = frozenset({"model", "language_model", "mtp"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a tensor is. `layer` and `expert` are None where it belongs to none; `mtp` is beside the role."""

    role: Role
    layer: int | None
    expert: int | None
    mtp: bool


@dataclass(frozen=True, slots=True)
class _Kind:
    """What names have in common that differ in their indices only; `_at` counts dot-separated segments."""

    role: Role
    layer_at: int | None
    expert_at: int | None
    under_mtp: bool


@dataclass(frozen=True, slots=True)
class ExpertRules:
    """Where a family says what of its routed experts: config keys, and names inside a decoder layer.

    `count` and `top_k` are config keys; `groups` those of the number of routing groups and of the groups
    that a token may choose from, where the router is limited to groups. `projections` are the names of gate,
    up and down projection behind the expert's index; `norm` is the norm in front of the experts, whose input
    is the residual stream. `observable` is False where transformers runs all experts in one operation.
    """

    count: str
    top_k: str
    projections: tuple[str, str, str]
    norm: str
    groups: tuple[str, str] | None
    observable: bool = True


@dataclass(frozen=True)
class _Family:
    """One file of architectures/, `extends` followed."""

    name: str
    model_types: tuple[str, ...]
    roles: tuple[tuple[str, Role], ...]
    fused: tuple[FusedRule, ...]
    experts: ExpertRules | None


@dataclass(frozen=True)
class Architecture:
    """The naming rules of one checkpoint: those of its family, and its number of decoder layers."""

    name: str
    known: bool
    fused: tuple[FusedRule, ...]
    roles: tuple[tuple[str, Role], ...]
    num_hidden_layers: int | None
    experts: ExpertRules | None = None
    _kinds: dict[str, _Kind] = field(default_factory=dict, init=False, repr=False, compare=False)

    def info(self, name: str) -> TensorInfo:
        """What the tensor with this logical name is. Never fails: an unknown name is `other`."""
        segments = name.split(".")
        template = _template(segments)
        kind = self._kinds.get(template)
        if kind is None:
            kind = self._kinds[template] = self._kind(template)
        layer = _index(segments, kind.layer_at)
        expert = _index(segments, kind.expert_at)
        decoder_layers = self.num_hidden_layers
        if layer is None or decoder_layers is None:
            return TensorInfo(kind.role, None if kind.under_mtp else layer, expert, kind.under_mtp)
        if kind.under_mtp:
            layer += decoder_layers
        return TensorInfo(kind.role, layer, expert, layer >= decoder_layers)

    def split(self, stored_name: str, shape: tuple[int, ...]) -> list[tuple[str, str, View]] | None:
        """The logical tensors inside a fused stored tensor, as (logical name, part key, view); else None.

        Raises CheckpointError where a fused tensor has a shape that cannot be split.
        """
        if not self.fused:
            return None
        inner = _inside_decoder(_template(stored_name.split(".")))
        for rule in self.fused:
            if rule.stored == inner:
                return split(rule, stored_name, shape)
        return None

    def _kind(self, template: str) -> _Kind:
        inner = _inside_decoder(template)
        role: Role = next((role for start, role in self.roles if inner.startswith(start)), "other")
        segments = template.split(".")
        layer_at = segments.index("layers") + 1 if inner.startswith("layers.N.") else None
        one_expert = role == "routed_expert" and ".experts.N." in inner
        expert_at = segments.index("experts") + 1 if one_expert else None
        return _Kind(role, layer_at, expert_at, "mtp" in segments)


def architecture_for(config: Mapping[str, Any]) -> Architecture:
    """The naming rules for a checkpoint with this config.json.

    Goes by `model_type`, then by `text_config.model_type` (multimodal wrappers). Where no file claims either,
    the result is named "unknown", has `known=False`, and gives every tensor the role `other`.
    """
    text = config.get("text_config")
    sections = [config, text] if isinstance(text, Mapping) else [config]
    families = _families()
    layer_counts = [count for s in sections if isinstance(count := s.get("num_hidden_layers"), int)]
    num_hidden_layers = layer_counts[0] if layer_counts else None
    for section in sections:
        family = families.get(str(section.get("model_type")))
        if family is not None:
            return Architecture(
                family.name, True, family.fused, family.roles, num_hidden_layers, family.experts
            )
    return Architecture("unknown", False, (), (), num_hidden_layers)


def _template(segments: list[str]) -> str:
    return ".".join(["N" if segment.isdecimal() else segment for segment in segments])


def _index(segments: list[str], at: int | None) -> int | None:
    """The index at a segment; None where a name from a damaged file has something else there."""
    if at is None or not segments[at].isdecimal() or len(segments[at]) > 9:
        return None
    return int(segments[at])


def _inside_decoder(template: str) -> str:
    segments = template.split(".")
    while segments and segments[0] in _WRAPPERS:
        del segments[0]
    return ".".join(segments)


@cache
def _families() -> Mapping[str, _Family]:
    """Families by the model_type they claim."""
    folder = Path(__file__).parent / "architectures"
    documents = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(folder.glob("*.yaml"))}
    families: dict[str, _Family] = {}
    for name in documents:
        family = _family(name, documents)
        for model_type in family.model_types:
            if model_type in families:
                raise ValueError(f"{folder}: {name} and {families[model_type].name} both claim {model_type}")
            families[model_type] = family
    return families


def _family(name: str, documents: Mapping[str, Any]) -> _Family:
    document = documents[name]
    roles: list[tuple[str, Role]] = []
    for rule in document.get("roles", []):
        ((role, start),) = rule.items()
        if role not in ROLES:
            raise ValueError(f"architectures/{name}.yaml: {role} is no role; roles are {', '.join(ROLES)}")
        roles.append((start, role))
    fused = [_fused_rule(name, rule) for rule in document.get("fused", [])]
    experts = _expert_rules(document["experts"]) if "experts" in document else None
    if "extends" in document:
        base = _family(document["extends"], documents)
        roles += base.roles
        fused += base.fused
        experts = experts or base.experts
    return _Family(name, tuple(document["model_types"]), tuple(roles), tuple(fused), experts)


def _expert_rules(rules: Mapping[str, Any]) -> ExpertRules:
    gate, up, down = rules["projections"]
    groups = tuple(rules["groups"]) if "groups" in rules else None
    observable = bool(rules.get("observable", True))
    return ExpertRules(rules["count"], rules["top_k"], (gate, up, down), rules["norm"], groups, observable)


def _fused_rule(name: str, rule: Mapping[str, Any]) -> FusedRule:
    for rows in rule["rows"].values():
        if rows not in get_args(Rows):
            raise ValueError(f"architectures/{name}.yaml: {rows} is none of {', '.join(get_args(Rows))}")
    return FusedRule(rule["stored"], rule["part"], rule.get("transpose", False), tuple(rule["rows"].items()))
