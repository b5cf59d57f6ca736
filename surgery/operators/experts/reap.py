"""REAP: experts ranked by the mean of gate times output norm over their own tokens (arXiv 2510.13999).

    S[e] = mean over tokens routed to e of  g[e, t] · ‖e(x_t)‖₂

A mean, not a sum: rare experts that matter when they are chosen stay. The gate is the model's own final
value; the published code takes a softmax over raw logits instead, which is another routing than that of
models with sigmoid scores or correction biases. Experts that no token chose score 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from surgery.operators.experts.criterion import Criterion, Fields


def reap(sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean of g · ‖e(x)‖ over an expert's own tokens. [experts]"""
    count = sums["count"]
    return np.divide(sums["gate_norm"], count, out=np.zeros_like(count), where=count > 0)


class Reap(Criterion):
    """Params of `experts.reap`."""

    op: ClassVar[str] = "experts.reap"

    def scores(self, sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
        return reap(sums)
