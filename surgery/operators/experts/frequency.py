"""Frequency (baseline): experts ranked by how many tokens choose them.

S[e] = number of tokens routed to e
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from surgery.operators.experts.criterion import Criterion, Fields


def frequency(sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Tokens of each expert. [experts]"""
    return sums["count"]


class Frequency(Criterion):
    """Params of `experts.frequency`."""

    op: ClassVar[str] = "experts.frequency"

    def scores(self, sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
        return frequency(sums)
