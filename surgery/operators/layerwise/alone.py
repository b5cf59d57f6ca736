"""Base of the operators that treat each matrix by its weights alone, lazily: they read along with others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from surgery.errors import PlanError
from surgery.operators.protocol import PREVIOUS, Kind, Operator, record_step
from surgery.stream.checkpoint import Checkpoint, TensorRef

if TYPE_CHECKING:
    from surgery.operators.layerwise.problem import Work


class AloneOperator(Operator):
    """Params that all of them share."""

    kind: ClassVar[Kind] = "weight"

    input: str | None = None
    """The checkpoint to work on; by default the result of the step before, or the only parent."""
    mtp: Literal["keep", "rtn"] = "keep"
    """The prediction (MTP) layer: `keep` its bytes, or treat it like the others."""

    def input_names(self) -> tuple[str, ...]:
        return (self.input or PREVIOUS,)

    def work(self, ref: TensorRef) -> Work | None:
        """What is to become of a tensor; None where it stays. Raises PlanError where that cannot be."""
        raise TypeError(f"{type(self).__name__} does not say what it works on")

    def treated(self, ref: TensorRef, work: Work) -> TensorRef:
        """The tensor as it will be."""
        raise TypeError(f"{type(self).__name__} does not say what becomes of a tensor")

    def described(
        self, checkpoint: Checkpoint, tensors: Mapping[str, TensorRef]
    ) -> tuple[Mapping[str, TensorRef], Mapping[str, Any]]:
        """The treated tensors with those that stay, under the names that go together, and their config."""
        return tensors, checkpoint.config

    def apply(self, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
        (checkpoint,) = inputs.values()
        tensors: dict[str, TensorRef] = {}
        changed = 0
        for name, ref in checkpoint.tensors.items():
            work = None if ref.info.mtp and self.mtp == "keep" else self.work(ref)
            tensors[name] = ref if work is None else self.treated(ref, work)
            changed += work is not None
        if not changed:
            raise PlanError(
                f"{self.op} finds nothing to work on in {checkpoint.label}",
                hint="surgery inspect shows the roles of its tensors",
            )
        label, history = record_step(
            self.op, self.summary(), {self.input_names()[0]: checkpoint.label}, [checkpoint]
        )
        named, config = self.described(checkpoint, tensors)
        return checkpoint.replace(tensors=named, config=config, label=label, history=history)
