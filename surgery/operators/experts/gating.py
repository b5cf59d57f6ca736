"""Gating score (baseline): experts ranked by the sum of their gate values.

S[e] = Σ_t g[e, t]
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from surgery.operators.experts.criterion import Criterion, Fields


def gating(sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Σ g over an expert's tokens. [experts]"""
    return sums["gate"]


class Gating(Criterion):
    """Params of `experts.gating`."""

    op: ClassVar[str] = "experts.gating"

    def scores(self, sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
        return gating(sums)
