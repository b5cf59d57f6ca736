"""Run the jobs of all shards on a few threads, within the memory budget, and finish shard by shard.

Every job reads, computes and writes by itself, so threads overlap disk and arithmetic; results do
not depend on their number, because tiles are fixed by shape and partial sums are added in tile order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Condition, Event, Lock, Thread
from typing import Any

from surgery.errors import InterruptedRun
from surgery.stream.ahead import ReadAhead
from surgery.stream.checkpoint import ComputedRef, ReadContext, Sums
from surgery.stream.interleave import interleaved
from surgery.stream.jobs import Job
from surgery.stream.remote import RemoteFile
from surgery.stream.targets import Shard
from surgery.stream.writer import ShardWriter

OPEN_ROUNDS = 3
"""Rounds of shards being written or hashed at one time."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); bytes for the stage `write`."""


class MemoryGate:
    """Lets jobs in while their bytes fit the budget; a job larger than the budget runs alone."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._changed = Condition()

    @contextmanager
    def admit(self, nbytes: int, stopped: Callable[[], bool]) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(
                lambda: stopped() or self._used == 0 or self._used + nbytes <= self._budget
            )
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()


class SumTable:
    """Partial sums of computed tensors, added in tile order when a tensor is complete."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._sums: dict[int, dict[int, Sums]] = {}

    def record(self, ref: ComputedRef, start: int, sums: Sums) -> None:
        if sums:
            with self._lock:
                self._sums.setdefault(id(ref), {})[start] = sums

    def take(self, ref: ComputedRef) -> Sums | None:
        """Totals of a finished tensor, or None where nothing was recorded."""
        with self._lock:
            tiles = self._sums.pop(id(ref), None)
        if not tiles:
            return None
        ordered = [tiles[start] for start in sorted(tiles)]
        return tuple(sum(column) for column in zip(*ordered, strict=True))


@dataclass(frozen=True)
class Writing:
    """A shard and the folder that it goes to. `finished` hears of it once it is there."""

    folder: Path
    shard: Shard
    finished: Callable[[Shard, str | None, Mapping[str, Any]], None]


@dataclass
class Execution:
    """One run over shards: rounds of those that are written together, from one reading of what they share
    (see `interleave`). `ahead_bytes` of the memory are for reading ahead from the `remote` files."""

    hashed: bool
    threads: int
    memory_bytes: int
    context: ReadContext
    progress: Progress
    total_bytes: int
    done_bytes: int = 0
    remote: Sequence[RemoteFile] = ()
    ahead_bytes: int = 0
    _stop: Event = field(default_factory=Event)
    _errors: list[BaseException] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)
    _counting: Lock = field(default_factory=Lock)
    _open: list[ShardWriter] = field(default_factory=list)
    _ahead: ReadAhead | None = None

    def run(self, rounds: Sequence[Sequence[Writing]]) -> None:
        """Write the shards. Raises the first error; finished shards stay."""
        sums = SumTable()
        self.context.record = sums.record
        gate = MemoryGate(self.memory_bytes - self.ahead_bytes)
        queue = self._jobs(rounds, sums)
        if self.remote:
            shards = [[writing.shard for writing in each] for each in rounds]
            self._ahead = ReadAhead(shards, self.ahead_bytes, self.remote[0].transfer.limits.streams)
        workers = [
            Thread(target=self._work, args=(queue, gate), name=f"worker {number}", daemon=True)
            for number in range(self.threads)
        ]
        with one_thread_per_job(), self._ahead.attached(self.remote) if self._ahead else nullcontext():
            for worker in workers:
                worker.start()
            try:
                for worker in workers:
                    while worker.is_alive():
                        worker.join(0.2)
                if not self._stop.is_set():
                    for writer in self._open:
                        writer.no_more()
                self._close(0)
            except KeyboardInterrupt:
                self._halt()
                for worker in workers:
                    worker.join()
                raise InterruptedRun(
                    "stopped by the user", hint="the same command resumes: finished shards are kept"
                ) from None
            except BaseException as error:  # noqa: BLE001  (raised below, once the shards are closed)
                self._fail(error)
            finally:
                self._stop_open()
        if self._errors:
            raise self._errors[0]

    def _work(self, queue: Iterator[tuple[int, ShardWriter, Job]], gate: MemoryGate) -> None:
        while not self._stop.is_set():
            try:
                with self._lock:
                    if self._stop.is_set():
                        return
                    item = next(queue, None)
                if item is None:
                    return
                number, writer, job = item
                with self._read_ahead(number), gate.admit(job.peak_bytes, self._stop.is_set):
                    if not self._stop.is_set():
                        job.run(self._writing(writer), self.context)
            except BaseException as error:  # noqa: BLE001  (raised again by run, on the caller's thread)
                self._fail(error)
                return

    @contextmanager
    def _read_ahead(self, number: int) -> Iterator[None]:
        """What a job reads from the hub is planned before the job counts against the memory."""
        if self._ahead is None:
            yield
            return
        self._ahead.starting(number)
        try:
            yield
        finally:
            self._ahead.finished(number)

    def _writing(self, writer: ShardWriter) -> Callable[[int, Any], None]:
        def write(offset: int, data: Any) -> None:
            writer.write(offset, data)
            self._advance(data.nbytes)

        return write

    def _advance(self, nbytes: int) -> None:
        with self._counting:
            self.done_bytes += nbytes
            self.progress("write", self.done_bytes, self.total_bytes)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._halt()

    def _halt(self) -> None:
        """Let everybody come to an end: workers after their job, followers at once."""
        self._stop.set()
        for writer in list(self._open):
            writer.stop()
        if self._ahead is not None:
            self._ahead.stop(self.remote)

    def _jobs(
        self, rounds: Sequence[Sequence[Writing]], sums: SumTable
    ) -> Iterator[tuple[int, ShardWriter, Job]]:
        """Numbered jobs of all rounds in order; opens a round when its first job is asked for."""
        numbers = count()
        for number, each in enumerate(rounds, 1):
            self._close((OPEN_ROUNDS - 1) * len(each))
            if self._stop.is_set():
                return
            writers = [self._opened(writing, sums, number == len(rounds)) for writing in each]
            for member, job in interleaved([writing.shard for writing in each]):
                yield next(numbers), writers[member], job

    def _opened(self, writing: Writing, sums: SumTable, last: bool) -> ShardWriter:
        shard = writing.shard
        writer = ShardWriter(
            writing.folder / shard.name,
            shard.header,
            shard.nbytes,
            hashed=self.hashed,
            last=last,
            finished=lambda digest: writing.finished(shard, digest, outcomes(shard, sums)),
        )
        self._advance(len(shard.header))
        self._open.append(writer)
        return writer

    def _close(self, keep: int) -> None:
        """Wait until at most `keep` shards are unfinished."""
        while len(self._open) > keep:
            if self._stop.is_set():
                return
            self._open[0].join()
            self._open.pop(0)

    def _stop_open(self) -> None:
        for writer in self._open:
            writer.stop()
        while self._open:
            try:
                self._open.pop(0).join()
            except Exception as error:  # noqa: BLE001  (the first error is raised by run)
                self._errors.append(error)


def outcomes(shard: Shard, sums: SumTable) -> dict[str, Any]:
    """What was decided and measured for the computed tensors of a finished shard, by name."""
    found: dict[str, Any] = {}
    for target, _ in shard.targets:
        for ref, part in target.members:
            if not isinstance(ref, ComputedRef) or part is not ref.parts[0]:
                continue
            decision = ref.decision(ReadContext())
            entry: dict[str, Any] = {}
            if decision.copy is not None:
                entry = {"copied": decision.copy, "reason": decision.reason}
            totals = sums.take(ref)
            metrics = decision.metrics or (ref.kernel.metrics(totals, ref.numel) if totals else None)
            if metrics:
                entry["metrics"] = dict(metrics)
            if entry:
                found[ref.name] = entry
    return found


@contextmanager
def one_thread_per_job() -> Iterator[None]:
    """torch, where it is loaded, computes each tile on the thread that asked: parallelism is over
    tiles, and a reduction split over threads would not be reproducible."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
