"""Keep-lists, and the surgery that a keep-list stands for.

A checkpoint without some of its experts: the others are renumbered without gaps, the rows of the router and
its bias go with them, config.json says how many there are and how they are grouped. Experts are copied byte
for byte whatever their form; fused ones are sliced. The multi-token-prediction (MTP) layer shares the
config's number of experts, so it is pruned with the last layer's list, or dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surgery.calibrate.lines import read_json_file
from surgery.errors import CheckpointError, PlanError, UsageError
from surgery.operators.experts.groups import LEAST_GROUP, Groups
from surgery.stream.checkpoint import Checkpoint, TensorRef
from surgery.stream.files import natural_key
from surgery.stream.reshape import RowsRef, rename_parts, renamed, slab_parts
from surgery.stream.roles import ExpertRules

KIND = "surgery-keep-list"
SCHEMA = 1
_EXPERT = re.compile(r"layers\.(\d+)\..*experts\.(\d+)(?=\.|$)")
COUNT_KEYS = ("n_routed_experts", "num_local_experts", "num_experts")
"""What configs call the number of routed experts; some say it twice."""

Mtp = Literal["prune", "drop"]


@dataclass(frozen=True)
class ExpertShape:
    """The routed experts of a checkpoint: layers that have them, how many, how tokens choose."""

    rules: ExpertRules
    layers: tuple[int, ...]
    count: int
    top_k: int
    groups: Groups


@dataclass(frozen=True)
class KeepList:
    """The experts that stay, by layer and in their new order, and the groups that they form."""

    layers: Mapping[int, tuple[int, ...]]
    groups: Groups

    @property
    def count(self) -> int:
        return len(next(iter(self.layers.values())))

    def as_dict(self) -> dict[str, Any]:
        return {
            "layers": {str(layer): list(kept) for layer, kept in self.layers.items()},
            "n_group": self.groups.count, "topk_group": self.groups.chosen,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> KeepList:
        layers = {int(layer): tuple(kept) for layer, kept in found["layers"].items()}
        return cls(layers, Groups(found["n_group"], found["topk_group"]))

    def dump(self) -> str:
        """The file that `read_keep_list` reads."""
        return json.dumps({"kind": KIND, "schema": SCHEMA, **self.as_dict()}) + "\n"


def read_keep_list(path: Path) -> KeepList:
    """A keep-list from a JSON file; UsageError where it is none."""
    found = read_json_file(path)
    if found.get("kind") != KIND or found.get("schema") != SCHEMA:
        raise UsageError(
            f"{path} holds no keep-list", hint=f'it begins with {{"kind": "{KIND}", "schema": {SCHEMA}, …'
        )
    try:
        keep = KeepList.from_dict(found)
        numbers = [expert for kept in keep.layers.values() for expert in kept]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is no whole keep-list: {type(error).__name__}: {error}") from error
    if not keep.layers or not all(type(number) is int for number in numbers):
        raise UsageError(f"{path} must list experts by number for each layer")
    sizes = (keep.groups.count, keep.groups.chosen)
    if not all(type(size) is int and size >= 1 for size in sizes):
        raise UsageError(f"{path}: n_group and topk_group must be whole numbers from 1 on, not {sizes}")
    return keep


def expert_shape(checkpoint: Checkpoint) -> ExpertShape:
    """The routed experts of a checkpoint, from headers. Raises CheckpointError where it has none, and where
    config and tensors disagree."""
    rules = checkpoint.architecture.experts
    found: dict[int, set[int]] = {}
    whole = ""
    for name, ref in checkpoint.tensors.items():
        if ref.info.role == "routed_expert" and not ref.info.mtp and ref.info.layer is not None:
            if ref.info.expert is None:
                whole = whole or name
            else:
                found.setdefault(ref.info.layer, set()).add(ref.info.expert)
    if rules is None or not (found or whole):
        raise CheckpointError(
            f"{checkpoint.label} has no routed experts (model_type {checkpoint.config.get('model_type')!r})",
            hint="experts can be dropped from mixtures of experts only: surgery inspect shows the roles",
        )
    if whole:
        raise CheckpointError(
            f"{whole} holds all experts of a layer in a form that cannot be told apart",
            hint="use a checkpoint with one tensor per expert, or in bf16",
        )
    config = text_section(checkpoint.config)
    count = _integer(config, rules.count) or max(len(experts) for experts in found.values())
    for layer, experts in found.items():
        if experts != set(range(count)):
            raise CheckpointError(
                f"layer {layer} of {checkpoint.label} has {len(experts)} experts, config.json says {count}",
                hint="the checkpoint is incomplete; fetch it again",
            )
    top_k = _integer(config, rules.top_k)
    if top_k is None:
        raise CheckpointError(f"config.json of {checkpoint.label} does not say {rules.top_k}")
    return ExpertShape(rules, tuple(sorted(found)), count, top_k, _groups(config, rules))


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that speaks of the language model."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _integer(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int else None


def _groups(config: Mapping[str, Any], rules: ExpertRules) -> Groups:
    if rules.groups is None or config.get("topk_method") == "greedy":
        return Groups()
    count, chosen = (_integer(config, key) or 1 for key in rules.groups)
    return Groups(count, chosen)


def check_keep(shape: ExpertShape, keep: KeepList) -> None:
    """Refuse lists that engines could not run. Raises PlanError."""
    if tuple(sorted(keep.layers)) != shape.layers:
        raise PlanError(
            f"the keep-list has {len(keep.layers)} layers, the model has experts in {len(shape.layers)}: "
            f"{shape.layers[0]} to {shape.layers[-1]}",
            hint="list every layer that has routed experts",
        )
    for layer, kept in keep.layers.items():
        if len(set(kept)) != len(kept) or not set(kept) <= set(range(shape.count)):
            raise PlanError(
                f"layer {layer} of the keep-list: experts are numbered 0 to {shape.count - 1}, each once"
            )
        if len(kept) != keep.count:
            raise PlanError(
                f"layer {layer} keeps {len(kept)} experts, layer {shape.layers[0]} keeps {keep.count}",
                hint="config.json has one number for all layers: keep as many in each",
            )
    if keep.count >= shape.count:
        raise PlanError(f"the keep-list keeps {keep.count} of {shape.count} experts: nothing to drop")
    size, rest = divmod(keep.count, keep.groups.count)
    if keep.groups.limited and not shape.groups.limited:
        raise PlanError(
            f"the keep-list has {keep.groups.count} groups, but this model's router has none",
            hint="set n_group and topk_group to 1",
        )
    if rest or keep.groups.chosen * size < shape.top_k or keep.groups.chosen > keep.groups.count:
        raise PlanError(
            f"{keep.count} experts in {keep.groups.count} groups, {keep.groups.chosen} of them to choose "
            f"from, do not give every token {shape.top_k} experts",
            hint="keep more experts, or set n_group and topk_group to 1",
        )
    if keep.groups.limited and size < LEAST_GROUP:
        raise PlanError(
            f"groups of {size} are too small: a router scores a group by its {LEAST_GROUP} best experts",
            hint="keep more experts, or set n_group and topk_group to 1",
        )


def apply_keep(checkpoint: Checkpoint, shape: ExpertShape, keep: KeepList, mtp: Mtp, why: str) -> Checkpoint:
    """The checkpoint with the kept experts alone, unread. `why` is the reason that the manifest gives."""
    check_keep(shape, keep)
    dropped = dict(checkpoint.dropped)
    refs: list[TensorRef] = []
    for name, ref in checkpoint.tensors.items():
        if ref.info.mtp and mtp == "drop":
            dropped[name] = f"{why}: the prediction layer is dropped"
            continue
        layer = shape.layers[-1] if ref.info.mtp else ref.info.layer
        kept = keep.layers.get(layer) if layer is not None else None
        new = ref if kept is None else _keep_tensor(ref, kept, shape)
        if new is None:
            dropped[name] = f"{why}: expert {ref.info.expert} of layer {ref.info.layer} is not kept"
        else:
            refs.append(new)
    refs.sort(key=lambda ref: natural_key(ref.name))
    return checkpoint.replace(
        tensors={ref.name: ref for ref in refs},
        config=_config(checkpoint.config, shape, keep, mtp),
        dropped=dropped,
    )


def keep_tensors(refs: Sequence[TensorRef], kept: tuple[int, ...], shape: ExpertShape) -> list[TensorRef]:
    """The tensors of one layer with these experts alone."""
    new = [_keep_tensor(ref, kept, shape) for ref in refs]
    return [ref for ref in new if ref is not None]


def _keep_tensor(ref: TensorRef, kept: tuple[int, ...], shape: ExpertShape) -> TensorRef | None:
    """The tensor in the pruned layer; None for those of experts that go."""
    info = ref.info
    if info.role == "router":
        if not ref.shape or ref.shape[0] != shape.count:
            raise CheckpointError(
                f"{ref.name} is part of a router, but of shape {list(ref.shape)} for {shape.count} experts",
                hint="this architecture's routers are not known well enough to drop experts",
            )
        return RowsRef(ref, kept)
    if info.role != "routed_expert" or info.expert is None:
        return ref
    if info.expert not in kept:
        return None
    number = kept.index(info.expert)
    old, new = f".experts.{info.expert}.", f".experts.{number}."

    def rename(name: str) -> str:
        return name.replace(old, new, 1)

    name = rename(ref.name)
    parts = slab_parts(ref, number, len(kept)) if ref.is_view else rename_parts(ref, rename)
    return renamed(ref, name, type(info)(info.role, info.layer, number, info.mtp), parts)


def _config(config: Mapping[str, Any], shape: ExpertShape, keep: KeepList, mtp: Mtp) -> dict[str, Any]:
    changes: dict[str, Any] = {shape.rules.count: keep.count}
    section = text_section(config)
    changes |= {key: keep.count for key in COUNT_KEYS if section.get(key) == shape.count}
    if shape.rules.groups and shape.groups.limited:
        changes |= dict(zip(shape.rules.groups, (keep.groups.count, keep.groups.chosen), strict=True))
    if mtp == "drop" and section.get("num_nextn_predict_layers"):
        changes["num_nextn_predict_layers"] = 0
    found = {**config, **changes} if section is config else {**config, "text_config": {**section, **changes}}
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        last = section.get("num_hidden_layers")
        predicted = keep.layers[shape.layers[-1]] if mtp == "prune" else ()
        layers = dict(keep.layers) | ({last: predicted} if isinstance(last, int) else {})
        found["quantization_config"] = _renumbered_lists(quantization, layers)
    return found


def _renumbered_lists(section: Mapping[str, Any], layers: Mapping[int, tuple[int, ...]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            found[key] = _renumbered_lists(value, layers)
        else:
            found[key] = _renumbered(value, layers) if isinstance(value, list) else value
    return found


def _renumbered(names: list[Any], layers: Mapping[int, tuple[int, ...]]) -> list[Any]:
    """Lists of module names in a quantization_config (what is left unquantized): experts under their new
    numbers, dropped ones left out."""
    kept = []
    for name in names:
        found = _EXPERT.search(name) if isinstance(name, str) else None
        experts = layers.get(int(found[1])) if found else None
        if found is None or experts is None:
            kept.append(name)
        elif int(found[2]) in experts:
            number = experts.index(int(found[2]))
            kept.append(f"{name[: found.start(2)]}{number}{name[found.end(2) :]}")
    return kept
