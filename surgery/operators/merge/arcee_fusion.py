"""Arcee Fusion, the merge of Branch-Merge distillation (arXiv 2503.04872): take over what matters most.

    D     = KL(softmax(P) ‖ softmax(B)) of each row, 10⁻⁸ added to the probabilities   (P: model, B: base)
    I     = |P − B| · D
    keep  where I ≥ median(I) + 1.5 · (Q3 − Q1)
    result B + keep · (P − B)

Quantiles are order statistics without interpolation, at ⌊q (n − 1)⌋. They are exact here at any size, found
by selection; sampling, as published tools do above 10⁶ entries, would make the result depend on chance. D is
summed in float64 and rounded to float32; it is a difference of nearly equal numbers, of which float32 would
leave three digits. A one-dimensional tensor is one row. Not symmetric; for more than two models fuse one
after the other.

If three quarters of I are 0 the threshold is 0, and everything is kept, as in the published rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator

from surgery.operators.merge.method import Method, MethodKernel, Settings, Tile, Values, Whole
from surgery.operators.merge.selection import Selector, select_sizes
from surgery.stream.checkpoint import TensorRef

if TYPE_CHECKING:
    import torch

    from surgery.codecs.ops import Operand


class Fusion(MethodKernel):
    @property
    def temporaries(self) -> float:
        return 6

    def __init__(self, op: str, labels: Sequence[str]) -> None:
        super().__init__(op, labels, based=True)
        self._threshold = 0.0
        self._divergence: torch.Tensor | None = None

    def measure(self, whole: Whole) -> None:
        if not whole.numel:
            return
        import torch

        if len(whole.shape) > 1:
            self._divergence = torch.full((whole.rows,), -1.0)
        ranks = [int(quantile * (whole.numel - 1)) for quantile in (0.25, 0.5, 0.75)]
        selector = Selector(ranks)
        select_sizes(whole, {0: selector}, 2, self._row_weights)
        first, median, third = selector.values()
        self._threshold = median + 1.5 * (third - first)

    def _row_weights(self, tile: Tile, operands: Sequence[Operand]) -> torch.Tensor:
        """The rows' divergences, computed on the first reading and kept."""
        from surgery.codecs.merges import row_divergence

        if self._divergence is None:
            return row_divergence(*operands)
        kept = self._divergence[tile.start : tile.stop]
        if bool((kept < 0).any()):
            kept.copy_(row_divergence(*operands))
        return kept

    def merge_stored(
        self, tile: Tile, dtype: torch.dtype, *, ue8m0: bool
    ) -> tuple[Operand, torch.Tensor | None] | None:
        from surgery.codecs.merges import merge_fusion

        def work(parents: Sequence[Operand]) -> tuple[Operand, torch.Tensor]:
            base, model = parents
            weights = self._row_weights(tile, parents)
            return merge_fusion(base, model, weights, self._threshold, dtype, ue8m0=ue8m0)

        return tile.computed(2, work)

    def merge(self, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        base, model = tiles
        delta = model - base
        kept = delta.abs().mul_(_divergence_of(base, model)) >= self._threshold
        return delta.mul_(kept).add_(base)


def _divergence_of(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Of float32 tiles, to be multiplied with them."""
    from surgery.codecs.merges import row_divergence
    from surgery.codecs.ops import Operand

    if base.dim() < 2:
        return row_divergence(Operand(base.view(1, -1)), Operand(model.view(1, -1)))
    return row_divergence(Operand(base), Operand(model)).unsqueeze(-1)


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
