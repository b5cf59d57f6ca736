"""Rounding to nearest: each weight by itself on the grid of its group. The baseline that needs no data."""

from __future__ import annotations

from typing import ClassVar

import torch

from surgery.codecs.grid import GridMethod, Quantized, fit_grid, quantize
from surgery.codecs.schemes import IntScheme
from surgery.operators.layerwise.alone import AloneOperator
from surgery.operators.layerwise.problem import Work
from surgery.operators.quantize.precision import Precision
from surgery.stream.checkpoint import TensorRef
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


class RoundToNearest(Precision, AloneOperator):
    """Params of `quantize.rtn`. Needs no data: it composes with other steps in one reading."""

    op: ClassVar[str] = "quantize.rtn"

    def treated(self, ref: TensorRef, work: Work) -> TensorRef:
        parts = stored_as(ref, work.codec).parts
        return RoundedRef(ref, Rounding(self.op, work.codec)).with_form(work.codec, parts)
