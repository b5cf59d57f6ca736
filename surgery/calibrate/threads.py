"""How many threads torch computes with.

The operations of a small model take microseconds, and torch's threads wait for each other after every one.
Measured with 5.8M parameters on two cores: a second thread makes replies 1.5 times as fast on an idle
machine, and ten times slower when anything else runs. So small models get one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SMALL = 50_000_000
"""Weights up to which one thread is used."""


@contextmanager
def torch_threads(asked: int | None, weights: int) -> Iterator[None]:
    """Compute with `asked` threads; with None, one for a small model and torch's own setting for others."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(asked or (1 if weights <= SMALL else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
