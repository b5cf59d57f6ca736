"""Rounding to nearest: each weight by itself on the grid of its group. The baseline that needs no data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch

from surgery.codecs.codec import Codec
from surgery.codecs.grid import GridMethod, Quantized, fit_grid, quantize
from surgery.codecs.schemes import IntScheme
from surgery.errors import PlanError
from surgery.operators.protocol import PREVIOUS, Kind, record_step
from surgery.operators.quantize.precision import Precision
from surgery.stream.checkpoint import Checkpoint, TensorRef
from surgery.stream.recode import stored_as
from surgery.stream.rounding import RoundedRef, Rounding


def rtn(
    weights: torch.Tensor,
    scheme: IntScheme,
    *,
    grid: GridMethod = "absmax",
    scale_dtype: torch.dtype = torch.float32,
) -> Quantized:
    """Weights [..., R, C] in a scheme. Raises ValueError where its groups do not divide C."""
    return quantize(weights, fit_grid(weights, scheme, grid, scale_dtype), scheme)


class RoundToNearest(Precision):
    """Params of `quantize.rtn`. Needs no data: it composes with other steps in one reading."""

    op: ClassVar[str] = "quantize.rtn"
    kind: ClassVar[Kind] = "weight"

    input: str | None = None
    """The checkpoint to work on; by default the result of the step before, or the only parent."""
    mtp: Literal["keep", "rtn"] = "keep"
    """The prediction (MTP) layer: `keep` its bytes, or round it as well."""

    def input_names(self) -> tuple[str, ...]:
        return (self.input or PREVIOUS,)

    def apply(self, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
        (checkpoint,) = inputs.values()
        tensors: dict[str, TensorRef] = {}
        changed = 0
        for name, ref in checkpoint.tensors.items():
            work = None if ref.info.mtp and self.mtp == "keep" else self.work(ref)
            tensors[name] = ref if work is None else self._rounded(ref, work.codec)
            changed += work is not None
        if not changed:
            raise PlanError(
                f"{self.op} finds nothing to work on in {checkpoint.label}",
                hint="surgery inspect shows the roles of its tensors",
            )
        label, history = record_step(
            self.op, self.summary(), {self.input_names()[0]: checkpoint.label}, [checkpoint]
        )
        return checkpoint.replace(
            tensors=tensors, config=self.config_after(checkpoint, tensors), label=label, history=history
        )

    def _rounded(self, ref: TensorRef, codec: Codec) -> TensorRef:
        return RoundedRef(ref, Rounding(self.op, codec)).with_form(codec, stored_as(ref, codec).parts)
