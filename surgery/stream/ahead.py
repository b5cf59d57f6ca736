"""Read ahead from the hub: what the next jobs need, in large requests, within a budget of its own.

A job asks for a few megabytes at a time and a worker waits for each, which is right for a disk and slow
over a network. So a planner goes through the jobs before the workers do and joins what they will read:
neighbouring bytes of a file become one block, of 8 to 64 MB, and a few streams fetch the blocks in the
order in which they are needed. Workers take their bytes from the blocks; a block goes when the last job
that reads from it is done. Bytes that no block holds are asked for directly, so that a wrong guess costs
time and nothing else.

Small pieces (the scales of FP8 weights lie together in a file, apart from their weights and in another
order than they are written in) are joined over a whole shard and kept until its last job.

The planner waits while the budget is used up. It sets all of a job's bytes aside at once, and a worker
starts a job only when it is planned, so that the jobs before it can always finish and free their blocks.
What is kept for later jobs has a share of its own, which the waiting does not depend on.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from mmap import mmap
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

from surgery.errors import InterruptedRun
from surgery.stream.interleave import interleaved
from surgery.stream.reads import SMALL, Extent, Run, place_of, remote_reads, small_runs
from surgery.stream.remote import RemoteFile
from surgery.stream.targets import Shard

if TYPE_CHECKING:
    import numpy as np

LEAST_REQUEST, LARGEST_REQUEST = 8 << 20, 64 << 20


@dataclass(eq=False)
class Block:
    """Bytes start..stop of a file, and how many planned jobs still want them. `data` comes when it is
    fetched; `planned` is where the planner stood when it last grew."""

    file: RemoteFile
    start: int
    stop: int
    planned: int
    users: int = 0
    submitted: bool = False
    dropped: bool = False
    run: Run | None = None
    data: np.ndarray[Any, Any] | None = None
    error: BaseException | None = None


def ahead_bytes(memory_bytes: int, peak_bytes: int) -> int:
    """What of a memory budget is for reading ahead: half, or what the largest job leaves; 0 where that is
    less than one request."""
    share = min(memory_bytes // 2, memory_bytes - peak_bytes)
    return share if share >= LEAST_REQUEST else 0


@dataclass
class _Shelf:
    """The blocks of one file by their first byte."""

    starts: list[int] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)

    def add(self, block: Block) -> None:
        if block.start not in self.blocks:
            insort(self.starts, block.start)
        self.blocks[block.start] = block

    def remove(self, block: Block) -> None:
        if self.blocks.get(block.start) is block:
            del self.blocks[block.start]
            self.starts.remove(block.start)

    def covering(self, offset: int) -> Block | None:
        place = bisect_right(self.starts, offset)
        block = self.blocks[self.starts[place - 1]] if place else None
        return block if block is not None and offset < block.stop else None

    def next_start(self, offset: int) -> int | None:
        place = bisect_right(self.starts, offset)
        return self.starts[place] if place < len(self.starts) else None


class ReadAhead:
    """Blocks of the jobs of `rounds` (shards that are written together), at most `budget` bytes of them at a
    time; see the module docstring.

    `starting` and `finished` go around every job, whose number counts from 0 in the order of the rounds.
    """

    def __init__(self, rounds: Sequence[Sequence[Shard]], budget: int, streams: int) -> None:
        self._rounds = rounds
        self._kept_budget = budget // 4
        self._budget = budget - self._kept_budget
        self._streams = streams
        self._request = max(LEAST_REQUEST, min(LARGEST_REQUEST, budget // (2 * streams)))
        self._changed = Condition()
        self._shelves: dict[int, _Shelf] = {}
        self._open: dict[tuple[int, int], Block] = {}
        self._queue: deque[Block] = deque()
        self._by_job: dict[int, list[Block]] = {}
        self._planned_jobs = 0
        self._planned_bytes = 0
        self._used = 0
        self._kept = 0
        self._runs: dict[Run, Block] = {}
        self._begun = False
        self._done = False
        self._stopped = False
        self._error: BaseException | None = None

    @contextmanager
    def attached(self, files: Iterable[RemoteFile]) -> Iterator[ReadAhead]:
        """Serve the reads of `files` while the block runs."""
        files = list(files)
        threads = [Thread(target=self._plan, name="read ahead", daemon=True)]
        threads += [
            Thread(target=self._stream, name=f"stream {number}", daemon=True)
            for number in range(self._streams)
        ]
        for file in files:
            file.transfer.resume()
            file.window = self
        try:
            for thread in threads:
                thread.start()
            yield self
        finally:
            self.stop(files)
            for thread in threads:
                thread.join()
            for file in files:
                file.window = None
                file.transfer.resume()

    def stop(self, files: Iterable[RemoteFile]) -> None:
        """End streams and waits; reads that are under way raise InterruptedRun."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for file in files:
            file.transfer.cancel()

    def starting(self, job: int) -> None:
        """Wait until the job is planned, and at first until the planner is ahead by a request for each
        stream: a block that a worker waits for grows no further."""
        with self._changed:
            self._changed.wait_for(
                lambda: (self._planned_jobs > job and self._begun) or self._done or self._stopped
            )
            if self._error is not None:
                raise self._error

    def finished(self, job: int) -> None:
        """Free the blocks that nobody else wants."""
        with self._changed:
            for block in self._by_job.pop(job, ()):
                block.users -= 1
                if block.users == 0:
                    self._drop(block)
            self._changed.notify_all()

    def read(self, file: RemoteFile, buffer: np.ndarray[Any, Any], offset: int) -> None:
        """Fill a uint8 buffer from blocks where they hold its bytes, and directly where none does."""
        done = 0
        while done < buffer.size:
            place = offset + done
            with self._changed:
                shelf = self._shelves.get(id(file))
                block = shelf.covering(place) if shelf else None
                data = self._wait_for(block) if block is not None else None
                following = block.stop if block is not None else shelf.next_start(place) if shelf else None
            end = min(offset + buffer.size, following or file.size)
            piece = buffer[done : end - offset]
            if block is not None and data is not None:
                piece[:] = data[place - block.start : end - block.start]
            else:
                file.fetch(piece.data, place)
            done = end - offset

    def _wait_for(self, block: Block) -> np.ndarray[Any, Any] | None:
        """The block's bytes, or None where it went before a reader for whom it was not planned had them."""
        self._submit(block)
        self._changed.wait_for(
            lambda: block.data is not None or block.error or block.dropped or self._stopped
        )
        if block.error is not None:
            raise block.error
        if block.data is None and self._stopped:
            raise InterruptedRun("stopped while reading from the hub")
        return block.data

    # The planner

    def _plan(self) -> None:
        try:
            for shards in self._rounds:
                jobs = [remote_reads(job) for _, job in interleaved(shards)]
                runs = small_runs(jobs, self._request)
                for extents in jobs:
                    if not self._add(extents, runs):
                        return
        except BaseException as error:  # noqa: BLE001  (raised by `starting`, on a worker's thread)
            self._error = error
        finally:
            with self._changed:
                self._submit_older_than(-1)
                self._done = True
                self._changed.notify_all()

    def _add(self, extents: Sequence[Extent], runs: Mapping[tuple[int, int], Run]) -> bool:
        """Plan one job's reads; False when stopped."""
        with self._changed:
            kept = self._keep(dict.fromkeys(run for run in map(runs.get, map(place_of, extents)) if run))
            rest = [each for each in extents if runs.get(place_of(each)) not in self._runs]
            need = sum(nbytes for *_, nbytes in rest)
            if need > self._budget:
                rest, need = [], 0
            if self._used + need > self._budget:
                self._submit_older_than(-1)
                self._begun = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopped or self._used + need <= self._budget)
            blocks = {id(block): block for each in rest for block in self._place(*each)}
            for block in blocks.values():
                block.users += 1
            self._by_job[self._planned_jobs] = [*kept, *blocks.values()]
            self._submit_older_than(self._request)
            self._planned_jobs += 1
            self._begun = self._begun or self._planned_bytes >= self._streams * self._request
            self._changed.notify_all()
            return not self._stopped

    def _keep(self, runs: Iterable[Run]) -> list[Block]:
        """The blocks of small runs that one job wants; each is made when the first job wants it, if there
        is room, with the jobs that are still to come for its users."""
        kept = []
        for run in runs:
            nbytes = run.stop - run.start
            block = self._runs.get(run)
            if block is None and self._kept + nbytes <= self._kept_budget:
                block = Block(run.file, run.start, run.stop, 0, users=run.users, run=run)
                self._runs[run] = block
                self._kept += nbytes
                self._shelves.setdefault(id(run.file), _Shelf()).add(block)
                self._submit(block)
            run.users -= 1
            if block is not None:
                kept.append(block)
        return kept

    def _place(self, file: RemoteFile, start: int, nbytes: int) -> Iterator[Block]:
        """The blocks that will hold a range: one that has it, one that it continues, or new ones."""
        shelf = self._shelves.setdefault(id(file), _Shelf())
        stop = start + nbytes
        held = shelf.covering(start)
        if held is not None and stop <= held.stop:
            yield held
            return
        while start < stop:
            block = self._open.pop((id(file), start), None)
            if block is None or block.submitted:
                block = Block(file, start, start, self._planned_bytes)
                shelf.add(block)
            grown = min(stop, block.start + self._request) - start
            block.stop += grown
            self._used += grown
            self._planned_bytes += grown
            block.planned = self._planned_bytes
            start += grown
            other = self._open.pop((id(file), block.stop), None)
            if other is not None:
                self._submit(other)
            if block.stop - block.start >= self._request:
                self._submit(block)
            else:
                self._open[id(file), block.stop] = block
            yield block

    def _submit_older_than(self, age: int) -> None:
        """Queue open blocks that have not grown while `age` further bytes were planned."""
        for key, block in list(self._open.items()):
            if block.submitted or self._planned_bytes - block.planned > age:
                del self._open[key]
                self._submit(block)

    def _submit(self, block: Block) -> None:
        if not block.submitted:
            block.submitted = True
            self._queue.append(block)
            self._changed.notify_all()

    def _drop(self, block: Block) -> None:
        block.submitted = block.dropped = True
        block.data = None
        if block.run is not None:
            self._kept -= block.stop - block.start
            del self._runs[block.run]
        else:
            self._used -= block.stop - block.start
        self._shelves[id(block.file)].remove(block)
        if block in self._queue:
            self._queue.remove(block)

    # The streams

    def _stream(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                block = self._queue.popleft()
            data = _room(block.stop - block.start)
            try:
                block.file.fetch(data.data, block.start)
            except BaseException as error:  # noqa: BLE001  (raised by `read`, on the thread that wants it)
                block.error = error
            with self._changed:
                block.data = data if block.users else None
                self._changed.notify_all()
            del data, block  # a waiting stream must not keep what is no longer counted


def _room(nbytes: int) -> np.ndarray[Any, Any]:
    """uint8 [nbytes] that goes back to the system when it is let go. The allocator's arenas, one for each
    stream, would keep much of it: nearly twice the memory was measured."""
    import numpy as np

    return np.frombuffer(mmap(-1, nbytes), np.uint8) if nbytes > SMALL else np.empty(nbytes, np.uint8)
