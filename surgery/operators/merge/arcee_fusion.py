"""Arcee Fusion, the merge of Branch-Merge distillation (arXiv 2503.04872): take over what matters most.

    D     = KL(softmax(P) ‖ softmax(B)) of each row, 10⁻⁸ added to the probabilities   (P: model, B: base)
    I     = |P − B| · D
    keep  where I ≥ median(I) + 1.5 · (Q3 − Q1)
    result B + keep · (P − B)

Quantiles are order statistics without interpolation, at ⌊q (n − 1)⌋. They are exact here at any size, found
by selection; sampling, as published tools do above 10⁶ entries, would make the result depend on chance. A
one-dimensional tensor is one row. Not symmetric; for more than two models fuse one after the other.

If three quarters of I are 0 the threshold is 0, and everything is kept, as in the published rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator

from surgery.operators.merge.method import Method, MethodKernel, Settings, Values, Whole
from surgery.operators.merge.selection import ROUNDS, Selector
from surgery.stream.checkpoint import TensorRef

if TYPE_CHECKING:
    import torch

TINY = 1e-8


def row_divergence(model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL of every row, [rows, 1]; of a one-dimensional tensor [1]."""
    p = model.softmax(-1).add_(TINY)
    q = base.softmax(-1).add_(TINY)
    return (p / q).log_().mul_(p).sum(-1, keepdim=True)


class Fusion(MethodKernel):
    def __init__(self, op: str, labels: Sequence[str]) -> None:
        super().__init__(op, labels, based=True)
        self._threshold = 0.0

    def measure(self, whole: Whole) -> None:
        if not whole.numel:
            return
        ranks = [int(quantile * (whole.numel - 1)) for quantile in (0.25, 0.5, 0.75)]
        selector = Selector(ranks)
        for round_ in range(ROUNDS):
            if round_:
                selector.next_round()
            for base, model in whole:
                selector.feed(_importance(base, model))
        first, median, third = selector.values()
        self._threshold = median + 1.5 * (third - first)

    def merge(self, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        base, model = tiles
        kept = _importance(base, model) >= self._threshold
        return (model - base).mul_(kept).add_(base)


def _importance(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """|P − B| · D; rounding may leave a KL of equal rows a little below 0, which is 0."""
    return (model - base).abs_().mul_(row_divergence(model, base).clamp_(min=0.0))


class ArceeFusion(Method):
    """Params of `merge.arcee_fusion`: the base and one model."""

    op: ClassVar[str] = "merge.arcee_fusion"

    base: str
    models: Mapping[str, Settings]

    @model_validator(mode="after")
    def _two(self) -> ArceeFusion:
        if len(self.input_names()) != 2:
            raise ValueError("arcee_fusion takes two models; for more, fuse the result with the next")
        if any(settings.weight != 1.0 for settings in self.models.values()):
            raise ValueError("arcee_fusion takes no weights")
        return self

    def kernel(
        self, labels: Sequence[str], models: Mapping[str, Values], step: Values, ref: TensorRef
    ) -> MethodKernel:
        return Fusion(self.op, labels)
