"""Memory that a thread keeps from one job to the next."""

from __future__ import annotations

from threading import local
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class ThreadBuffers(local):
    """What each thread keeps: one reused buffer, since fresh memory for every copy would cost more than
    the copy, and whole stored tensors that were read ahead, by file and offset."""

    def __init__(self) -> None:
        self._bytes: np.ndarray[Any, Any] | None = None
        self.ahead: dict[tuple[int, int], np.ndarray[Any, Any]] = {}

    def take(self, nbytes: int) -> np.ndarray[Any, Any]:
        """uint8 [nbytes], valid until this thread asks again."""
        import numpy as np

        if self._bytes is None or self._bytes.size < nbytes:
            self._bytes = np.empty(nbytes, np.uint8)
        return self._bytes[:nbytes]
