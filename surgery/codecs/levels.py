"""The nearest of a few levels: how many of the borders between them lie below a value.

Comparing with each border in turn is several times faster than a search for each value, as every comparison
runs on many values at once; it works in cache-sized runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RUN = 1 << 16


def borders_below(values: torch.Tensor, borders: torch.Tensor) -> torch.Tensor:
    """uint8 numbers of borders that are less than each float32 value, 0 for NaN."""
    import torch

    found = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    flat, source, limits = found.view(-1), values.reshape(-1), borders.tolist()
    for start in range(0, flat.numel(), RUN):
        piece, count = source[start : start + RUN], flat[start : start + RUN]
        for limit in limits:
            count += piece > limit
    return found
