"""Expert activation norm (baseline): experts ranked by the sum of their output norms.

S[e] = Σ_t ‖e(x_t)‖₂   over tokens routed to e
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from surgery.operators.experts.criterion import Criterion, Fields


def ean(sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Σ ‖e(x)‖ over an expert's tokens. [experts]"""
    return sums["norm"]


class ExpertActivationNorm(Criterion):
    """Params of `experts.ean`."""

    op: ClassVar[str] = "experts.ean"

    def scores(self, sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
        return ean(sums)
