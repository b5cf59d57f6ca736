"""The k-th smallest of many non-negative numbers, exactly, in bounded memory and without sorting.

The bits of a non-negative float32 are ordered as the number is, so a rank is found digit by digit: one
reading counts the upper 16 bits, a second the lower 16 of the numbers that share them. `Selector` is fed
tile by tile; the counts are integers, so the order of tiles does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from surgery.operators.merge.method import Tile, Whole
from surgery.stream.fused import computed

if TYPE_CHECKING:
    import torch

    from surgery.codecs.ops import Operand

    RowWeights = Callable[[Tile, Sequence[Operand]], torch.Tensor]

ROUNDS = 2
"""Times that all numbers are to be fed."""
UPPER_BINS, LOWER_BINS = 1 << 15, 1 << 16


class Selector:
    """Finds the numbers at `ranks` (from 0, ascending order) of what is counted in each of two rounds.
    Threads may count at once."""

    def __init__(self, ranks: Sequence[int]) -> None:
        import torch

        self.ranks = tuple(ranks)
        self._upper = torch.zeros(UPPER_BINS, dtype=torch.int64)
        self._lower: dict[int, torch.Tensor] = {}
        self._rest: list[tuple[int, int]] = []
        self._lock = Lock()

    @property
    def digits(self) -> tuple[int, ...]:
        """Upper 16 bits whose lower ones the second round counts; empty in the first."""
        return tuple(self._lower)

    def feed(self, values: torch.Tensor) -> None:
        """Count one tile of non-negative float32 numbers."""
        import torch

        from surgery.codecs.merge_reference import lower_counts, upper_counts

        if not self._rest:
            self.add(upper_counts(values))
        else:
            self.add(torch.stack([lower_counts(values, digit) for digit in self.digits]))

    def add(self, counts: torch.Tensor) -> None:
        """Add a tile's counts: int64 [32768], or in the second round [digits, 65536]; more rows than digits
        are left out."""
        with self._lock:
            if not self._rest:
                self._upper += counts
                return
            for held, found in zip(self._lower.values(), counts, strict=False):
                held += found

    def next_round(self) -> None:
        """Close the first round."""
        import torch

        self._rest = [_locate(self._upper, rank) for rank in self.ranks]
        self._lower = {digit: torch.zeros(LOWER_BINS, dtype=torch.int64) for digit, _ in self._rest}

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


def select_sizes(
    whole: Whole, selectors: Mapping[int, Selector], count: int, row_weights: RowWeights | None = None
) -> None:
    """Both rounds over |model i − base| (times the weights that `row_weights` gives a tile's rows) of a whole
    tensor, for the models that have a selector; `count` inputs are models, the base among them."""
    from surgery.codecs.merges import count_sizes

    def feed(tile: Tile) -> None:
        base, *models = tile.operands(count)
        chosen = [base, *(models[i] for i in selectors)]
        digits = [selector.digits for selector in selectors.values()]
        most = max(map(len, digits))
        padded = [each + each[-1:] * (most - len(each)) for each in digits] if most else None

        def work(there: Sequence[Operand]) -> torch.Tensor:
            return count_sizes(there, padded, row_weights(tile, there) if row_weights else None)

        for selector, found in zip(selectors.values(), computed(chosen, tile.context, work), strict=True):
            selector.add(found)

    for round_ in range(ROUNDS):
        if round_:
            for selector in selectors.values():
                selector.next_round()
        whole.map(feed)
