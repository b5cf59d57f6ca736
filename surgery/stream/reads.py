"""What jobs will read over the network, before they run: their byte ranges, and which small ones to join."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from surgery.stream.checkpoint import StoredRef
from surgery.stream.files import DataFile
from surgery.stream.jobs import CopyJob, Job, SlabJob, TileJob
from surgery.stream.remote import RemoteFile

SMALL = 1 << 20
"""Bytes up to which a piece is joined with its neighbours in the file, whenever those are needed."""

Extent = tuple[RemoteFile, int, int]
"""A file, the first byte, and how many."""


@dataclass(eq=False)
class Run:
    """Neighbouring small pieces of a file, and how many of a shard's jobs want some of them."""

    file: RemoteFile
    start: int
    stop: int
    users: int = 0


def reads_of(job: Job) -> Iterator[tuple[DataFile, int, int]]:
    """What a job will read: file, first byte, number of bytes."""
    if isinstance(job, CopyJob):
        if job.part.stored.file is not None:
            yield job.part.stored.file, job.source, job.nbytes
    elif isinstance(job, TileJob):
        for rows in job.tiles:
            for source in rows.ref.sources():
                yield from _rows_of(source, rows.start, rows.stop)
    elif isinstance(job, SlabJob):
        for ref, _ in job.members:
            for source in ref.sources():
                yield from _rows_of(source, 0, source.rows)


def remote_reads(job: Job) -> list[Extent]:
    """Those that go over the network."""
    return [(file, start, size) for file, start, size in reads_of(job) if isinstance(file, RemoteFile)]


def place_of(extent: Extent) -> tuple[int, int]:
    return id(extent[0]), extent[1]


def small_runs(jobs: Sequence[Sequence[Extent]], longest: int) -> dict[tuple[int, int], Run]:
    """Small pieces of all jobs joined to runs of at most `longest` bytes, by file and first byte of each
    piece. Pieces without a neighbour are left out, and so are those that overlap others."""
    wanted: dict[tuple[int, int], tuple[Extent, set[int]]] = {}
    for number, extents in enumerate(jobs):
        for extent in extents:
            if extent[2] <= SMALL:
                wanted.setdefault(place_of(extent), (extent, set()))[1].add(number)
    found: dict[tuple[int, int], Run] = {}
    members: list[tuple[int, int]] = []
    users: set[int] = set()
    run: Run | None = None

    def close() -> None:
        if run is not None and len(members) > 1:
            run.users = len(users)
            found.update(dict.fromkeys(members, run))
        members.clear()
        users.clear()

    for place, ((file, start, nbytes), numbers) in sorted(wanted.items()):
        joined = run is not None and run.file is file and run.stop == start
        if run is None or not joined or start + nbytes - run.start > longest:
            close()
            run = Run(file, start, start)
        run.stop = start + nbytes
        members.append(place)
        users |= numbers
    close()
    return found


def _rows_of(ref: StoredRef, start: int, stop: int) -> Iterator[tuple[DataFile, int, int]]:
    stop = min(stop, ref.rows)
    for part in map(ref.place, ref.parts):
        stored = part.stored
        if stored.file is None or start >= stop:
            continue
        if part.view is not None:
            slab = stored.nbytes // stored.shape[0]
            yield stored.file, stored.offset + part.view.index * slab, slab
        elif start == 0 and stop == ref.rows:
            yield stored.file, stored.offset, stored.nbytes
        else:
            first, last = ref.codec.spans(ref.shape, start, stop)[part.key]
            if last > first:
                yield stored.file, stored.offset + first, last - first
