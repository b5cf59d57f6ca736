"""What the classic merge methods share: models with settings, the walk over tensors, and their kernels'
frame.

A method says, tensor by tensor, either whose tensor is taken as it is or which kernel computes it; `Whole` is
how a kernel reads through a tensor before its first tile is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator

from surgery.codecs.plain import Opaque
from surgery.errors import RecipeError
from surgery.operators.merge.compatible import (
    check_decodable,
    check_parents,
    config_events,
    equal_bytes,
    join_inputs,
)
from surgery.operators.merge.distances import as_json, cosines, distances, tau_sums, totals
from surgery.operators.merge.schedules import Setting, decoder_layers, is_place, setting_at
from surgery.operators.merge.weights import Entry
from surgery.operators.protocol import Kind, Operator, record_step
from surgery.stream.checkpoint import (
    Checkpoint,
    ComputedRef,
    Decision,
    Event,
    ReadContext,
    Sums,
    TensorRef,
)
from surgery.stream.fused import computed, form_of, operands, parts_of
from surgery.stream.recode import recode
from surgery.stream.select import matcher
from surgery.stream.team import Team

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.codecs.ops import Operand

Result = TypeVar("Result")
Values = dict[str, float]
"""Settings of one model, or those of the step, for one tensor."""


class Settings(BaseModel):
    """Settings of one model; methods add theirs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: Setting = 1.0


@dataclass(frozen=True)
class Tile:
    """Rows start..stop of all inputs of one tensor."""

    inputs: Sequence[TensorRef]
    start: int
    stop: int
    context: ReadContext

    def values(self) -> list[torch.Tensor]:
        """float32, as kernels get them to `merge`."""
        return [ref.pull(self.start, self.stop, self.context) for ref in self.inputs]

    def operands(self, count: int) -> list[Operand]:
        """Of the first `count` inputs, for the native kernels; valid until the thread's next tile."""
        return operands(self.inputs[:count], self.start, self.stop, self.context)

    def computed(self, count: int, work: Callable[[Sequence[Operand]], Result]) -> Result:
        """`work` on `operands(count)`, on a GPU where one is to compute; see `fused.computed`."""
        return computed(self.operands(count), self.context, work)


class Whole:
    """Reads through all inputs of one tensor, tile by tile, as often as `map` is called."""

    def __init__(self, inputs: Sequence[TensorRef], context: ReadContext) -> None:
        self._inputs = inputs
        self._context = context
        self.rows, self.shape = inputs[0].rows, inputs[0].shape
        self.numel = inputs[0].numel

    def map(self, work: Callable[[Tile], Result]) -> list[Result]:
        """Results in the order of the tiles; threads that wait for this tensor take some of them."""
        grid = max(self._inputs, key=lambda ref: ref.tile_rows())
        tiles = (Tile(self._inputs, start, stop, self._context) for start, stop in grid.tiles())
        return (self._context.team or Team()).map(work, tiles)

    def sum(self, work: Callable[[Tile], Sequence[float]]) -> list[float]:
        """Numbers of the tiles, each added up in the order of the tiles; empty for an empty tensor."""
        return [sum(column) for column in zip(*self.map(work), strict=True)]


class MethodKernel:
    """The kernel of one merged tensor. The first `len(labels)` inputs are tensors of models; where there is a
    base it is the first, and distances from it are measured as the tiles pass."""

    def __init__(self, op: str, labels: Sequence[str], *, based: bool, equal_copies: bool = True) -> None:
        self.op = op
        self.labels = tuple(labels)
        self.based = based
        self.equal_copies = equal_copies

    @property
    def temporaries(self) -> float:
        """float32 tiles beside the inputs that `merge` or `measure` holds at once by torch."""
        return len(self.labels) + 2

    def decide(self, inputs: Sequence[TensorRef], context: ReadContext) -> Decision:
        if self.equal_copies and equal_bytes(inputs[: len(self.labels)], context):
            nothing = (0.0,) * len(self.labels)
            metrics = self.metrics(nothing, inputs[0].numel) if self.based else {"weights": inputs[0].numel}
            return Decision(0, "parents are equal", metrics)
        self.measure(Whole(inputs, context))
        return Decision()

    def measure(self, whole: Whole) -> None:
        """Whole-tensor statistics that `merge` needs; none by default."""

    def merge(self, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} cannot merge")

    def merge_stored(
        self, tile: Tile, dtype: torch.dtype, *, ue8m0: bool
    ) -> tuple[Operand, torch.Tensor | None] | None:
        """`merge` by the native kernels, with the sums of `tau_sums` where there is a base; None where they
        cannot."""
        return None

    def fuse(
        self, inputs: Sequence[TensorRef], target: ComputedRef, start: int, stop: int, context: ReadContext
    ) -> tuple[dict[str, np.ndarray[Any, Any]], Sums] | None:
        from surgery.codecs.native import cpu

        if cpu().library is None or not target.numel:
            return None
        dtype, ue8m0 = form_of(target)
        made = self.merge_stored(Tile(inputs, start, stop, context), dtype, ue8m0=ue8m0)
        if made is None:
            return None
        result, sums = made
        return parts_of(target, result), () if sums is None else totals(sums)

    def combine(self, tiles: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sums]:
        return self.merge(tiles), tau_sums(tiles[: len(self.labels)]) if self.based else ()

    def metrics(self, sums: Sums, numel: int) -> dict[str, Any]:
        others = self.labels[1:]
        found = {"weights": numel, "distance": as_json(distances(sums[: len(self.labels)], numel, others))}
        return found | cosines(sums, others)

    def lineage(self) -> dict[str, Any]:
        return {"op": self.op}


class Method(Operator):
    """Base of the classic methods: `models` (and, where there is one, `base`), `select`, a shared setting or
    several. A setting is a number, a gradient, anchors or a list of choices, see `schedules.py`."""

    kind: ClassVar[Kind] = "weight"
    step_settings: ClassVar[tuple[str, ...]] = ()
    """Fields of the step that are settings."""

    models: Mapping[str, Settings]
    select: tuple[Entry, ...] = ("all",)

    @field_validator("models", mode="before")
    @classmethod
    def _numbers_are_weights(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            name: {"weight": item} if not isinstance(item, Mapping | Settings) or _is_anchors(item) else item
            for name, item in value.items()
        }

    @field_validator("models")
    @classmethod
    def _some_model(cls, value: Mapping[str, Settings]) -> Mapping[str, Settings]:
        if not value:
            raise ValueError("no model is named")
        return value

    @property
    def base_name(self) -> str | None:
        """The base where the method has one."""
        found = getattr(self, "base", None)
        return None if found is None else str(found)

    def input_names(self) -> tuple[str, ...]:
        base = self.base_name
        names = [] if base is None else [base]
        return (*names, *(name for name in self.models if name != base))

    def donor(self, models: Mapping[str, Values], step: Values) -> str | None:
        """The model whose tensor is the result as it is, where settings alone say so."""
        return None

    def kernel(
        self, labels: Sequence[str], models: Mapping[str, Values], step: Values, ref: TensorRef
    ) -> MethodKernel:
        """The kernel of one tensor; settings by model in the order of `input_names`, without the base."""
        raise TypeError(f"{type(self).__name__} has no kernel")

    def extra_inputs(self, ref: TensorRef, models: Sequence[str]) -> tuple[TensorRef, ...]:
        """Inputs beside the models' tensors."""
        return ()

    def apply(self, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
        names = self.input_names()
        first = names[0]
        template = inputs[first]
        parents = {name: inputs[name] for name in names}
        layers = decoder_layers(template)
        chosen = self._chosen(template)
        check_parents(first, parents, {name: list(names) for name in chosen})
        tensors = dict(template.tensors)
        converted = []
        for name in chosen:
            refs = {parent: inputs[parent].tensors[name] for parent in names}
            tensors[name], same = self._merged(refs, layers, {n: inputs[n].label for n in names})
            if not same:
                converted.append(name)
        events = config_events(first, parents)
        if converted:
            message = f"{len(converted)} tensors are re-encoded: they are stored otherwise in {first}"
            events = (*events, Event("re-encoded", message, tuple(converted)))
        sources, inherited = join_inputs(parents.values())
        labels = {name: parent.label for name, parent in parents.items()}
        label, history = record_step(self.op, self.summary(), labels, parents.values())
        return template.replace(
            tensors=tensors, label=label, inputs=sources, history=history, events=(*inherited, *events),
            probes=tuple(probe for each in parents.values() for probe in each.probes),
        )  # fmt: skip

    def _chosen(self, template: Checkpoint) -> list[str]:
        tests = [matcher(entry) for entry in self.select]
        for index, test in enumerate(tests):
            if not any(test(ref) for ref in template.tensors.values()):
                raise RecipeError(
                    f"select entry {self.select[index]} matches none of the {len(template.tensors)} "
                    f"tensors of {template.label}", path=("select", index),
                )  # fmt: skip
        return [
            name for name, ref in template.tensors.items()
            if any(test(ref) for test in tests)
            and not (isinstance(ref.codec, Opaque) and not ref.codec.weights)
        ]  # fmt: skip

    def _merged(
        self, refs: Mapping[str, TensorRef], layers: int, labels: Mapping[str, str]
    ) -> tuple[TensorRef, bool]:
        """The result's ref, and whether all forms were those of the template."""
        template = next(iter(refs.values()))
        models = {
            name: self._values(template, layers, name, settings) for name, settings in self.models.items()
            if name != self.base_name
        }  # fmt: skip
        step = self._values(template, layers, None, self)
        donor = self.donor(models, step)
        if donor is not None:
            ref = refs[donor]
            if ref.same_form(template):
                return ref, True
            check_decodable((template, ref))
            return recode(ref, template.codec, template.parts), False
        inputs = tuple(refs.values())
        check_decodable(inputs)
        kernel = self.kernel([labels[name] for name in refs], models, step, template)
        return (
            ComputedRef(template, (*inputs, *self.extra_inputs(template, list(models))), kernel),
            all(ref.same_form(template) for ref in inputs),
        )

    def _values(self, ref: TensorRef, layers: int, model: str | None, settings: BaseModel) -> Values:
        names = self.step_settings if model is None else tuple(type(settings).model_fields)
        found = {}
        for name in names:
            try:
                found[name] = setting_at(getattr(settings, name), ref, layers)
            except ValueError as error:
                path = (name,) if model is None else ("models", model, name)
                raise RecipeError(f"{error} (at {ref.name})", path=path) from error
        return found


def _is_anchors(item: Any) -> bool:
    return isinstance(item, Mapping) and bool(item) and all(is_place(key) for key in item)
