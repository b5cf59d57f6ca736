"""Rows of a pair of matrices with NaN and infinities in them."""

from __future__ import annotations

import math

import torch

BROKEN = {
    "nan first": (0, 0, math.nan), "nan later": (0, 5, math.nan), "nan in the model": (1, 5, math.nan),
    "inf": (0, 5, math.inf), "-inf": (1, 0, -math.inf),
}  # fmt: skip


def broken_rows(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Small and wide rows of a pair, one number of each of which is none; two rows have no other."""
    pair = [
        torch.randn(6, 300) * torch.tensor([[0.01], [0.01], [2.0], [2.0], [0.01], [2.0]]) for _ in range(2)
    ]
    pair[1][1] *= 300
    which, column, number = BROKEN[name]
    pair[which][:4, column] = number
    pair[which][4:] = number
    return pair[0], pair[1]
