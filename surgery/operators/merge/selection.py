"""The k-th smallest of many non-negative numbers, exactly, in bounded memory and without sorting.

The bits of a non-negative float32 are ordered as the number is, so a rank is found digit by digit: one
reading counts the upper 16 bits, a second the lower 16 of the numbers that share them. `Selector` is fed
tile by tile; the counts are integers, so the order of tiles does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROUNDS = 2
"""Times that all numbers are to be fed."""
_UPPER, _LOWER = 1 << 15, 1 << 16


class Selector:
    """Finds the numbers at `ranks` (from 0, ascending order) of what is fed in each of two rounds."""

    def __init__(self, ranks: Sequence[int]) -> None:
        import torch

        self.ranks = tuple(ranks)
        self._upper = torch.zeros(_UPPER, dtype=torch.int64)
        self._lower: dict[int, torch.Tensor] = {}
        self._rest: list[tuple[int, int]] = []

    def feed(self, values: torch.Tensor) -> None:
        """Count one tile of non-negative float32 numbers."""
        import torch

        bits = values.reshape(-1).view(torch.int32)
        upper = bits >> 16
        if not self._rest:
            self._upper += torch.bincount(upper, minlength=_UPPER)
            return
        for digit, counts in self._lower.items():
            counts += torch.bincount(bits[upper == digit] & (_LOWER - 1), minlength=_LOWER)

    def next_round(self) -> None:
        """Close the first round."""
        import torch

        self._rest = [_locate(self._upper, rank) for rank in self.ranks]
        self._lower = {digit: torch.zeros(_LOWER, dtype=torch.int64) for digit, _ in self._rest}

    def values(self) -> tuple[float, ...]:
        """The numbers at the ranks, after two rounds."""
        import torch

        bits = [digit << 16 | _locate(self._lower[digit], rest)[0] for digit, rest in self._rest]
        return tuple(float(each) for each in torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _locate(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds a rank, and the rank inside it."""
    import torch

    ends = counts.cumsum(0)
    digit = int(torch.searchsorted(ends, rank, right=True))
    return digit, rank - (int(ends[digit - 1]) if digit else 0)
