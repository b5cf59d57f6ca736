"""Threads that wait for a decision about a tensor help to make it.

A kernel that reads through a whole tensor before its first tile would otherwise do so on one thread while
the others, whose tiles are of the same tensor, wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from threading import Condition
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Team:
    """One thread calls `map`, others `help`; all run the same queue."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._waiting: deque[Callable[[], None]] = deque()
        self._busy = 0
        self._over = False
        self._error: BaseException | None = None

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results in the order of the items, whoever computed them. Raises the first error."""
        found: dict[int, Result] = {}

        def run(index: int, item: Item) -> None:
            found[index] = work(item)

        with self._changed:
            self._waiting.extend(partial(run, index, item) for index, item in enumerate(items))
            self._changed.notify_all()
        while self._take():
            pass
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            error, self._error = self._error, None
        if error is not None:
            raise error
        return [found[index] for index in range(len(found))]

    def help(self) -> None:
        """Take part until `close`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._over)
                if self._over:
                    return
            self._take()

    def close(self) -> None:
        """Send the helpers away."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _take(self) -> bool:
        """Run one piece of work; False where none is waiting."""
        with self._changed:
            if not self._waiting:
                return False
            work = self._waiting.popleft()
            self._busy += 1
        error: BaseException | None = None
        try:
            work()
        except BaseException as raised:  # noqa: BLE001  (raised again by map, on the thread that decides)
            error = raised
        with self._changed:
            self._busy -= 1
            if error is not None:
                self._error = self._error or error
                self._waiting.clear()
            self._changed.notify_all()
        return True
