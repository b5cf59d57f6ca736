"""Memory that a thread keeps from one job to the next."""

from __future__ import annotations

from threading import local
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class ThreadBuffers(local):
    """What each thread keeps: reused buffers, since fresh memory for every copy would cost more than the
    copy, and whole stored tensors that were read ahead, by file and offset."""

    def __init__(self) -> None:
        self._bytes: dict[int, np.ndarray[Any, Any]] = {}
        self.ahead: dict[tuple[int, int], np.ndarray[Any, Any]] = {}

    def take(self, nbytes: int, slot: int = 0) -> np.ndarray[Any, Any]:
        """uint8 [nbytes], valid until this thread asks for the same slot again."""
        import numpy as np

        held = self._bytes.get(slot)
        if held is None or held.size < nbytes:
            held = self._bytes[slot] = np.empty(nbytes, np.uint8)
        return held[:nbytes]
