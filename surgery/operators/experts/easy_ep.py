"""EASY-EP: experts ranked by what they add to the tokens that need them (arXiv 2504.06792).

    I[e] = Σ_t  g[e, t] · ‖e(x_t)‖₂ · max(0, 1 − cos(h_t, h_t + Σ_i g_i e_i(x_t)))

over all tokens of the demonstrations that are routed to e. h is the residual stream in front of the MLP's
norm; the shared expert takes no part; g is the final gate value. Details the paper leaves open are as in
the authors' code: the cosine in float32, the token weight clamped below at 0, prompt tokens count too. The
demonstrations should be the model's own replies to prompts of the domain (`surgery demonstrate`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from surgery.operators.experts.criterion import Criterion, Fields


def easy_ep(sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Σ g · ‖e(x)‖ · s over tokens: EASY-EP's score (section 4, equations 3 to 8). [experts]"""
    return sums["gate_norm_token"]


class EasyEP(Criterion):
    """Params of `experts.easy_ep`."""

    op: ClassVar[str] = "experts.easy_ep"

    def scores(self, sums: Fields) -> np.ndarray[Any, np.dtype[np.float64]]:
        return easy_ep(sums)
