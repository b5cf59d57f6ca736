"""Memory that a thread keeps from one job to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import local
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")


class ThreadBuffers(local):
    """What each thread keeps: reused buffers, since fresh memory for every copy would cost more than the
    copy; whole stored tensors that were read ahead, by file and offset; and what the last tile was made from,
    for the outputs whose same tile comes next. `pinned`: page-locked, for copies to a GPU."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._bytes: dict[int, np.ndarray[Any, Any]] = {}
        self.ahead: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
        self._last: tuple[Hashable, Any] | None = None

    def take(self, nbytes: int, slot: int = 0) -> np.ndarray[Any, Any]:
        """uint8 [nbytes], valid until this thread asks for the same slot again."""
        held = self._bytes.get(slot)
        if held is None or held.size < nbytes:
            held = self._bytes[slot] = self._room(nbytes)
        return held[:nbytes]

    def _room(self, nbytes: int) -> np.ndarray[Any, Any]:
        if self._pinned:
            import torch

            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        import numpy as np

        return np.empty(nbytes, np.uint8)

    def recall(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when this thread last asked, if it was for the same key; nobody may change it."""
        if self._last is None or self._last[0] != key:
            self._last = None
            self._last = (key, make())
        found: T = self._last[1]
        return found
