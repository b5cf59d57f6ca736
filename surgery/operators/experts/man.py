"""Mean activation norm (baseline): the mean output norm over an expert's own tokens, without the gate.

    S[e] = mean over tokens routed to e of ‖e(x_t)‖₂

The routed-token mean without gate that arXiv 2606.15716 proposes for pruning that knows no task; read from
its abstract only.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from surgery.operators.experts.criterion import Criterion, Fields


def man(sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean ‖e(x)‖ over an expert's own tokens. [experts]"""
    count = sums["count"]
    return np.divide(sums["norm"], count, out=np.zeros_like(count), where=count > 0)


class MeanActivationNorm(Criterion):
    """Params of `experts.man`."""

    op: ClassVar[str] = "experts.man"

    def scores(self, sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
        return man(sums)
