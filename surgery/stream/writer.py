"""One shard being written: bytes at any offset, from any thread, hashed in file order.

A follower thread reads back what is complete from the start of the file (it is still in the page
cache), so hashing overlaps with the writing, keeps no copy, and does not care in which order the
jobs finish. Once all bytes are there the file is synced and renamed to its final name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import Condition, Lock, Thread
from typing import TYPE_CHECKING, Any

from surgery.errors import PlanError, SurgeryError

if TYPE_CHECKING:
    import numpy as np

READ_BACK = 1 << 20
"""Bytes hashed at a time."""
PIECE = 256 << 10
"""Bytes written at a time: larger pieces were several times slower where the page cache had to grow."""
LAG = 64 << 20
"""Bytes by which the hash of a last shard may be behind, so that little is left to do at the end."""
FLUSH = 64 << 20
"""Bytes after which the disk is asked to catch up."""

Finished = Callable[[str | None], None]
"""Called from the follower thread with the file's SHA-256 (None without hashing)."""


class ShardWriter:
    """Writes `path` by way of `path.tmp`; `join` waits for it and raises what went wrong.

    `last`: nothing comes after this shard, so that writing must not take the processor from its hash.
    """

    def __init__(
        self, path: Path, header: bytes, nbytes: int, *, hashed: bool, finished: Finished, last: bool = False
    ) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._nbytes = nbytes
        self._digest = hashlib.sha256() if hashed else None
        self._finished = finished
        self._lag = LAG if hashed and last else nbytes
        self._writing = Lock()
        self._ready = Condition()
        self._complete = self._hashed = 0
        self._islands: dict[int, int] = {}
        self._stopped = False
        self._error: BaseException | None = None
        self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._follower = Thread(target=self._follow, name=f"finish {path.name}", daemon=True)
        try:
            self._write_all(0, memoryview(header))
        except BaseException:
            os.close(self._file)
            raise
        self._mark(0, len(header))
        self._follower.start()

    def write(self, offset: int, data: np.ndarray[Any, Any]) -> None:
        """Store bytes at `offset` of the file."""
        if not data.nbytes:
            return
        view = data.data.cast("B")
        with self._ready:
            self._ready.wait_for(lambda: self._stopped or self._complete - self._hashed < self._lag)
        with self._writing:  # else the threads would spin for the file's lock in the kernel
            if self._stopped:  # and the file closed
                return
            self._write_all(offset, view)
        self._mark(offset, len(view))

    def _write_all(self, offset: int, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._file, view[done : done + PIECE], offset + done)
        except OSError as error:
            raise disk_error(error, self._temporary) from error

    def _mark(self, offset: int, length: int) -> None:
        with self._ready:
            self._islands[offset] = offset + length
            while (end := self._islands.pop(self._complete, None)) is not None:
                self._complete = end
            self._ready.notify_all()

    def stop(self) -> None:
        """Give up: the follower ends and the unfinished file stays for the next run to replace."""
        with self._ready:
            self._stopped = True
            self._ready.notify_all()

    def no_more(self) -> None:
        """All jobs have run: a shard that is not complete now never will be."""
        with self._ready:
            if self._complete < self._nbytes and self._error is None:
                self._error = SurgeryError(
                    f"{self._path.name} lacks bytes from {self._complete} on: no job wrote them",
                    hint="this is a fault of surgery; please report the recipe",
                )
                self._stopped = True
                self._ready.notify_all()

    def join(self) -> None:
        self._follower.join()
        if self._error:
            raise self._error

    def _follow(self) -> None:
        try:
            if self._all_hashed():
                os.fsync(self._file)
                os.rename(self._temporary, self._path)
                self._finished(self._digest.hexdigest() if self._digest else None)
        except OSError as error:
            self._error = disk_error(error, self._temporary)
        except BaseException as error:  # noqa: BLE001  (raised by join, on the thread that waits)
            self._error = error
        finally:
            self.stop()
            with self._writing:
                os.close(self._file)

    def _all_hashed(self) -> bool:
        """Follow the written bytes to the end; False when stopped before."""
        flushed = 0
        buffer = bytearray(READ_BACK)
        while self._hashed < self._nbytes:
            complete = self._wait_beyond(self._hashed)
            if complete is None:
                return False
            while self._hashed < complete:
                self._advance(memoryview(buffer)[: min(READ_BACK, complete - self._hashed)])
                if self._hashed - flushed >= FLUSH:
                    self._start_flushing(flushed, self._hashed)
                    flushed = self._hashed
        return True

    def _advance(self, view: memoryview) -> None:
        """Hash what comes next, and let writers know."""
        got = len(view)
        if self._digest:
            got = os.preadv(self._file, [view], self._hashed)
            self._digest.update(view[:got])
        with self._ready:
            self._hashed += got
            if self._complete - self._hashed < self._lag // 2:
                self._ready.notify_all()

    def _start_flushing(self, start: int, stop: int) -> None:
        """Let the kernel begin to write a range out, so that the sync at the end has little to do."""
        os.posix_fadvise(self._file, start, stop - start, os.POSIX_FADV_DONTNEED)

    def _wait_beyond(self, offset: int) -> int | None:
        """How far the file is complete, once that is beyond `offset`; None when stopped."""
        with self._ready:
            self._ready.wait_for(lambda: self._stopped or self._complete > offset)
            return None if self._stopped else self._complete


def write_json(path: Path, document: Any) -> None:
    """A JSON file that appears under its name when it is whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> SurgeryError:
    """A full disk or a failing one, in words; what is finished stays and the run resumes."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PlanError(
            f"the disk is full: writing {path} failed",
            hint="free some space and run the same command again: finished shards are kept",
        )
    return SurgeryError(
        f"writing {path} failed: {error.strerror}",
        hint="mend the disk or its permissions and run the same command again: finished shards are kept",
    )
