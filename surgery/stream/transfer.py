"""Requests to the hub and to the storage behind it: what is tried again, how often, and after what wait.

One `Transfer` is shared by everything that reads from a hub in a run, so that a rate limit which one
stream meets holds all of them back. Waits grow exponentially with jitter; a `Retry-After` or `RateLimit`
header, where a server sends one, decides instead.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from threading import Event, Lock
from typing import TypeVar

from surgery.errors import CheckpointError, InterruptedRun
from surgery.stream.units import format_bytes

_log = logging.getLogger(__name__)

T = TypeVar("T")

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed."""
WORTH_TELLING_S = 10.0
"""Waits from here on are announced."""


@dataclass(frozen=True)
class Limits:
    """How much at once and how patiently. Times in seconds, sizes in bytes."""

    streams: int = 8
    """Requests in flight."""
    attempts: int = 8
    """Failures in a row, without a byte gained, that end a read."""
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    longest_pause_s: float = 900.0
    """A server that asks for a longer pause than this ends the run."""
    header_bytes: int = 128 << 10
    """First request of a shard: the header of one with about a thousand tensors."""


class Fault(Exception):
    """A failure that another try may mend. `pause_s` is what the server asked for; `stale` means that the
    address no longer holds; `gained` bytes came before it."""

    def __init__(
        self, reason: str, *, pause_s: float | None = None, stale: bool = False, gained: int = 0
    ) -> None:
        super().__init__(reason)
        self.pause_s = pause_s
        self.stale = stale
        self.gained = gained


@dataclass
class Traffic:
    """What went over the network, for the manifest."""

    requests: int = 0
    nbytes: int = 0
    retries: int = 0

    def as_dict(self) -> dict[str, int]:
        return {"requests": self.requests, "bytes": self.nbytes, "retries": self.retries}


@dataclass
class Transfer:
    """The shared state of all requests: counts, the pauses that hosts asked for, and cancellation."""

    limits: Limits = field(default_factory=Limits)
    traffic: Traffic = field(default_factory=Traffic)
    _cancelled: Event = field(default_factory=Event)
    _free_at: dict[str, float] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def cancel(self) -> None:
        """End every wait and every stream; they raise InterruptedRun."""
        self._cancelled.set()

    def resume(self) -> None:
        self._cancelled.clear()

    def check(self) -> None:
        """Raise InterruptedRun after `cancel`."""
        if self._cancelled.is_set():
            raise InterruptedRun("stopped while reading from the hub")

    def count(self, *, requests: int = 0, nbytes: int = 0) -> None:
        with self._lock:
            self.traffic.requests += requests
            self.traffic.nbytes += nbytes

    def pause(self, host: str, seconds: float) -> None:
        """No request of any stream to `host` before that."""
        with self._lock:
            self._free_at[host] = max(self._free_at.get(host, 0.0), time.monotonic() + seconds)

    def wait_for_turn(self, host: str) -> None:
        """Wait while a pause of `host` lasts."""
        while True:
            left = self._free_at.get(host, 0.0) - time.monotonic()
            if left <= 0:
                self.check()
                return
            self._cancelled.wait(left)
            self.check()

    def persist(self, what: str, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, tried again after every Fault until the limits are used up."""
        failures = 0
        while True:
            try:
                return attempt()
            except Fault as fault:
                failures = 1 if fault.gained else failures + 1
                self._back_off(what, fault, failures)

    def _back_off(self, what: str, fault: Fault, failures: int) -> None:
        """Wait before the next try; CheckpointError after too many failures or too long a pause."""
        limits = self.limits
        if failures >= limits.attempts:
            raise CheckpointError(
                f"{what} failed {failures} times in a row, last: {fault}",
                hint="check the network and run the same command again: finished shards are kept",
            ) from fault
        if fault.pause_s is not None and fault.pause_s > limits.longest_pause_s:
            raise CheckpointError(
                f"{what}: {fault}; the server asks for a pause of {fault.pause_s:.0f} s",
                hint="run the same command again after that: finished shards are kept",
            ) from fault
        with self._lock:
            self.traffic.retries += 1
        grown = min(limits.longest_wait_s, limits.first_wait_s * 2.0 ** (failures - 1))
        seconds = grown * random.uniform(0.5, 1.0)
        if fault.pause_s is not None:
            seconds = fault.pause_s + min(seconds, 1.0)
        elif fault.stale and failures == 1:
            seconds = 0.0
        if seconds >= WORTH_TELLING_S:
            _log.warning("%s: %s; next try in %.0f s", what, fault, seconds)
        self._cancelled.wait(seconds)
        self.check()


def pause_of(status: int, headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, from `RateLimit` (429 only) or `Retry-After`, in seconds or as a
    date; None where it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # a lazy facade

    if status == 429:
        limit = parse_ratelimit_headers(headers)
        if limit is not None and limit.remaining == 0:
            return float(limit.reset_in_seconds)
    told = headers.get("retry-after", "").strip()
    if not told:
        return None
    if told.isdecimal():
        return float(told)
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def used_up(headers: Mapping[str, str]) -> float | None:
    """Seconds until a rate limit renews whose last request was just answered; None where some are left."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # a lazy facade

    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def range_text(offset: int, nbytes: int) -> str:
    """Bytes of a file in words."""
    return f"bytes {offset}–{offset + nbytes - 1} ({format_bytes(nbytes)})"
