"""Stacking: the child's layers are layers of its parents, one slice after the other, as stored.

    slices:
      - {model: a, layers: 0-15}      # both included, as everywhere
      - {model: b, layers: 8-23}

Nothing is computed. What lies before the layers (embeddings) is the first slice's model's, what lies after
them (final norm, head) the last's. The first's config gets the new number of layers and, for `layer_types`,
the entries of the chosen layers.
Configs that say otherwise which layer is what (dense first layers, MTP layers, sparse steps) are
refused unless every layer stays where it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from surgery.errors import CheckpointError, RecipeError
from surgery.operators.merge.compatible import join_inputs
from surgery.operators.merge.schedules import decoder_layers
from surgery.operators.merge.weights import check_layers
from surgery.operators.protocol import Kind, Operator, record_step
from surgery.stream.checkpoint import Checkpoint, StoredRef, TensorRef
from surgery.stream.roles import architecture_for

_BY_POSITION = ("first_k_dense_replace", "num_nextn_predict_layers", "mlp_only_layers", "decoder_sparse_step")
_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")


class Slice(BaseModel):
    """Consecutive layers of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    layers: Annotated[str, BeforeValidator(check_layers, json_schema_input_type=str | int)]

    def numbers(self) -> range:
        first, _, last = self.layers.partition("-")
        return range(int(first), int(last or first) + 1)


class Passthrough(Operator):
    """Params of `merge.passthrough`."""

    op: ClassVar[str] = "merge.passthrough"
    kind: ClassVar[Kind] = "layer"

    slices: Annotated[tuple[Slice, ...], Field(min_length=1)]

    def input_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(each.model for each in self.slices))

    def apply(self, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
        first = inputs[self.slices[0].model]
        plan: list[tuple[Checkpoint, int]] = []
        for index, each in enumerate(self.slices):
            parent = inputs[each.model]
            count = decoder_layers(parent)
            if each.numbers()[-1] >= count:
                raise RecipeError(
                    f"{each.model} has layers 0 to {count - 1}, the slice asks for {each.layers}",
                    path=("slices", index, "layers"),
                )
            plan += [(parent, number) for number in each.numbers()]
        self._check(first, plan)
        by_layer: dict[str, dict[int, list[TensorRef]]] = {}
        for parent in {id(parent): parent for parent, _ in plan}.values():
            for ref in parent.tensors.values():
                if ref.info.layer is not None:
                    by_layer.setdefault(parent.label, {}).setdefault(ref.info.layer, []).append(ref)
        still = all(number == place and parent is first for place, (parent, number) in enumerate(plan))
        config = _config(first, plan)
        architecture = architecture_for(config)
        tensors: dict[str, TensorRef] = {}
        last = inputs[self.slices[-1].model].tensors
        for ref in first.tensors.values():
            if ref.info.layer is None or (still and ref.info.mtp):
                at_end = ref.info.layer is None and ref.info.role in ("norm", "head")
                tensors[ref.name] = last.get(ref.name, ref) if at_end else ref
        for place, (parent, number) in enumerate(plan):
            for ref in by_layer[parent.label].get(number, ()):
                moved = _moved(ref, place)
                moved.info = architecture.info(moved.name)
                tensors[moved.name] = moved
        kept = set(tensors)
        label, history = record_step(
            self.op, self.summary(), {name: inputs[name].label for name in inputs}, inputs.values()
        )
        sources, events = join_inputs(inputs[name] for name in self.input_names())
        dropped = {name: "in no slice" for name in first.tensors if name not in kept}
        return first.replace(
            tensors=tensors, config=config, architecture=architecture, label=label, inputs=sources,
            history=history, events=events, dropped={**first.dropped, **dropped},
        )  # fmt: skip

    def _check(self, first: Checkpoint, plan: list[tuple[Checkpoint, int]]) -> None:
        if not first.architecture.known:
            raise CheckpointError(
                f"no roles are known for {first.config.get('model_type')!r}, so its layers cannot be stacked"
            )
        still = all(number == place for place, (_, number) in enumerate(plan))
        for parent in {id(parent): parent for parent, _ in plan}.values():
            for key in ("model_type", "hidden_size", "vocab_size"):
                if parent.config.get(key) != first.config.get(key):
                    raise CheckpointError(
                        f"{parent.label} has {key} {parent.config.get(key)}, {first.label} has "
                        f"{first.config.get(key)}: their layers do not stack"
                    )
            tells = [key for key in _BY_POSITION if parent.config.get(key) not in (None, 0, 1, [])]
            tells += ["num_nextn_predict_layers"] * (parent.config.get("num_nextn_predict_layers") == 1)
            tells += ["first_k_dense_replace"] * (parent.config.get("first_k_dense_replace") == 1)
            if tells and not (still and len(plan) == decoder_layers(first)):
                raise CheckpointError(
                    f"{parent.label}'s config tells layers apart by their place ({tells[0]}), so they cannot "
                    "move", hint="stack models whose layers are alike, or keep every layer in its place",
                )  # fmt: skip
            if any(not isinstance(ref, StoredRef) for ref in parent.tensors.values()):
                raise CheckpointError(
                    f"{parent.label} is computed by an earlier step; stack parents, then merge the results"
                )


def _config(first: Checkpoint, plan: list[tuple[Checkpoint, int]]) -> dict[str, Any]:
    config = dict(first.config)
    text = config.get("text_config")
    nested = isinstance(text, Mapping) and "num_hidden_layers" in text
    section = dict(text) if nested and isinstance(text, Mapping) else config
    before = section.get("num_hidden_layers")
    for key, value in list(section.items()):
        if isinstance(value, list) and key == "layer_types" and len(value) == before:
            section[key] = [_section(parent)[key][number] for parent, number in plan]
    section["num_hidden_layers"] = len(plan)
    return {**config, "text_config": section} if nested else section


def _section(parent: Checkpoint) -> Mapping[str, Any]:
    text = parent.config.get("text_config")
    return text if isinstance(text, Mapping) and "num_hidden_layers" in text else parent.config


def _moved(ref: TensorRef, place: int) -> TensorRef:
    """The same stored bytes under the name that they have as layer `place`."""
    if not isinstance(ref, StoredRef):
        raise TypeError(f"{ref.name} is not stored")
    parts = tuple(
        part._replace(stored=replace(part.stored, name=_LAYER.sub(str(place), part.stored.name, count=1)))
        for part in ref.parts
    )
    name = _LAYER.sub(str(place), ref.name, count=1)
    return StoredRef(name, ref.shape, ref.info, ref.codec, parts, ref.origin)
