"""How far a model is from a parent: KL divergence and agreement of the most likely token.

    KL(parent ‖ model) = Σ_v p(v) · log(p(v) / q(v)),   p the parent's next-token distribution, q the model's

per prediction of the same text and windows as the perplexity, in nats, float64. Both models see one window
at a time, so memory stays at two models and two windows of logits. The interval of the mean is over windows;
that of the agreement is Wilson's over predictions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError
from surgery.evaluate.intervals import Mean, Share

if TYPE_CHECKING:
    import torch

_CHUNK = 64


@dataclass(frozen=True)
class WindowDivergence:
    """Sums over the predictions of one window."""

    kl: float
    agreeing: int
    tokens: int


@dataclass(frozen=True)
class Divergence:
    """`kl` in nats per token; `agreement` is the share of predictions whose most likely token is the same."""

    parent: str
    kl: Mean
    agreement: Share
    tokens: int

    @classmethod
    def of(cls, parent: str, found: Iterable[WindowDivergence]) -> Divergence:
        """From at least one window."""
        each = list(found)
        tokens = sum(window.tokens for window in each)
        return cls(
            parent,
            Mean.of([window.kl for window in each], [window.tokens for window in each]),
            Share.of(sum(window.agreeing for window in each), tokens),
            tokens,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "parent": self.parent,
            "kl": self.kl.as_dict(),
            "agreement": self.agreement.as_dict(),
            "tokens": self.tokens,
        }


def window_divergence(parent: torch.Tensor, model: torch.Tensor) -> WindowDivergence:
    """From the logits of both, [predictions, vocabulary] each. Raises CheckpointError for NaN."""
    if parent.shape != model.shape:
        raise CheckpointError(
            f"the parent gives logits of shape {list(parent.shape)}, the model of {list(model.shape)}",
            hint="KL needs models with the same vocabulary",
        )
    kl, agreeing = 0.0, 0
    for start in range(0, len(parent), _CHUNK):
        p = parent[start : start + _CHUNK].double().log_softmax(dim=-1)
        q = model[start : start + _CHUNK].double().log_softmax(dim=-1).to(p.device)
        # A token that the parent rules out (log p = -inf) adds nothing, whatever the model says.
        terms = (p.exp() * (p - q)).masked_fill(p.isneginf(), 0.0)
        kl += float(terms.sum())
        agreeing += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    if not kl < float("inf"):
        raise CheckpointError(
            f"the KL divergence of a window is {kl}: one of the models gives NaN or infinity",
            hint="compute in float32, and look for NaN in the weights: surgery verify",
        )
    return WindowDivergence(kl, agreeing, len(parent))
