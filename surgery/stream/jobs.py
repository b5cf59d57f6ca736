"""The work of one shard as a sequence of jobs, each small enough for the memory budget.

    CopyJob   bytes of parents as stored; neighbours in a file are read together
    TileJob   some rows of computed tensors: read, combine, encode
    SlabJob   one expert of a fused tensor, put together from its projections

A job reads, computes and writes by itself, so jobs in flight on several threads overlap all three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from surgery.errors import CheckpointError
from surgery.stream.checkpoint import ComputedRef, Part, ReadContext, StoredRef, TensorRef, nonfinite
from surgery.stream.files import StoredTensor
from surgery.stream.fused import encoded
from surgery.stream.targets import Shard, Target
from surgery.stream.workspace import tile_bytes

if TYPE_CHECKING:
    import numpy as np

CHUNK = 4 << 20
"""Bytes that a copy reads at a time."""
SMALL = 1 << 18
"""Weights up to which computed tensors share a job."""
APART = 32 << 20
"""Bytes of the shard over which they may be spread: its hash waits at the first that is missing."""

Write = Callable[[int, "np.ndarray[Any, np.dtype[Any]]"], None]
"""Write bytes at an offset of the shard."""


class Job(Protocol):
    @property
    def peak_bytes(self) -> int: ...

    def run(self, write: Write, context: ReadContext) -> None: ...


@dataclass(slots=True)
class Piece:
    """Bytes of one stored tensor inside a copy: where they begin in the job, and whose they are."""

    begin: int
    nbytes: int
    ref: StoredRef
    key: str


@dataclass(slots=True)
class CopyJob:
    """`nbytes` bytes from one place in a parent's shard to one place in ours."""

    part: Part
    source: int
    target: int
    nbytes: int
    pieces: list[Piece] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        return self.nbytes

    def run(self, write: Write, context: ReadContext) -> None:
        file = self.part.stored.file
        if file is None:
            raise TypeError(f"{self.part.stored.name} lies in no file")
        buffer = context.buffers.take(self.nbytes)
        file.read_into(buffer, self.source)
        if not context.allow_nonfinite:
            for piece in self.pieces:
                data = buffer[piece.begin : piece.begin + piece.nbytes]
                if not piece.ref.codec.finite(piece.key, data):
                    raise nonfinite(piece.ref, piece.key)
        write(self.target, buffer)


@dataclass(slots=True)
class Rows:
    """Rows start..stop of a computed tensor, and where in the shard each of its parts begins."""

    ref: ComputedRef
    start: int
    stop: int
    offsets: dict[str, int]

    def run(self, write: Write, context: ReadContext) -> None:
        ref = self.ref
        spans = self._spans()
        choice = ref.decision(context).copy
        donor = ref.inputs[choice] if choice is not None else None
        if isinstance(donor, StoredRef) and same_bytes(donor, ref):
            raw = {part.key: donor.raw(part, self.start, self.stop, context) for part in donor.parts}
            donor.check_finite(raw, context)
        else:
            raw = encode(ref, self.start, self.stop, context)
        for key, data in raw.items():
            write(self.offsets[key] + spans[key], data)

    def _spans(self) -> dict[str, int]:
        if self.start == 0:
            return dict.fromkeys(self.offsets, 0)
        spans = self.ref.codec.spans(self.ref.shape, self.start, self.stop)
        return {key: first for key, (first, _) in spans.items()}


@dataclass(slots=True)
class TileJob:
    """Rows of one large computed tensor, or several small ones whole."""

    tiles: list[Rows] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        largest = max(tile_bytes(rows.ref, rows.stop - rows.start) for rows in self.tiles)
        if len(self.tiles) == 1:
            return largest
        ahead = sum(source.nbytes for rows in self.tiles for source in rows.ref.sources())
        return largest + ahead + sum(rows.ref.nbytes for rows in self.tiles)

    def run(self, write: Write, context: ReadContext) -> None:
        if len(self.tiles) == 1:
            self.tiles[0].run(write, context)
            return
        context.buffers.ahead = read_ahead(self.tiles)
        gathered: list[tuple[int, np.ndarray[Any, Any]]] = []
        try:
            with context.batch:
                for rows in self.tiles:
                    rows.run(lambda offset, data: gathered.append((offset, data)), context)
        finally:
            context.buffers.ahead = {}
        write_together(gathered, write)


def read_ahead(tiles: Sequence[Rows]) -> dict[tuple[int, int], np.ndarray[Any, Any]]:
    """The stored bytes of small tensors' inputs by file and offset, neighbours read at once."""
    import numpy as np

    wanted = {
        (id(part.stored.file), part.stored.offset): part.stored
        for rows in tiles
        for ref in rows.ref.sources()
        for part in ref.parts
        if part.view is None and part.stored.file is not None and part.stored.nbytes
    }
    found: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
    run: list[StoredTensor] = []

    def read_run() -> None:
        if run and run[0].file is not None:
            buffer = np.empty(sum(stored.nbytes for stored in run), np.uint8)
            run[0].file.read_into(buffer, run[0].offset)
            for stored in run:
                begin = stored.offset - run[0].offset
                found[id(stored.file), stored.offset] = buffer[begin : begin + stored.nbytes]
        run.clear()

    for _, stored in sorted(wanted.items()):
        if run and (stored.file is not run[-1].file or stored.offset != run[-1].offset + run[-1].nbytes):
            read_run()
        run.append(stored)
    read_run()
    return found


def write_together(gathered: list[tuple[int, np.ndarray[Any, Any]]], write: Write) -> None:
    """Write pieces, neighbours at once."""
    import numpy as np

    gathered.sort(key=lambda piece: piece[0])
    begin = 0
    for index in range(1, len(gathered) + 1):
        end = gathered[index - 1][0] + gathered[index - 1][1].nbytes
        if index == len(gathered) or gathered[index][0] != end:
            pieces = [data for _, data in gathered[begin:index]]
            write(gathered[begin][0], pieces[0] if len(pieces) == 1 else np.concatenate(pieces))
            begin = index


@dataclass(slots=True)
class SlabJob:
    """Expert `index` of a fused tensor whose projections come from different places."""

    target: Target
    index: int
    offset: int
    members: list[tuple[TensorRef, Part]]

    @property
    def peak_bytes(self) -> int:
        slab = self.target.stored.nbytes // self.target.stored.shape[0]
        return 2 * slab + max(tile_bytes(ref, ref.rows) for ref, _ in self.members)

    def run(self, write: Write, context: ReadContext) -> None:
        import numpy as np

        stored = self.target.stored
        nbytes = stored.nbytes // stored.shape[0]
        itemsize = nbytes // prod(stored.shape[1:])
        slab = np.empty(nbytes, np.uint8)
        cells = slab.view(f"V{itemsize}" if itemsize > 1 else np.uint8).reshape(stored.shape[1:])
        for ref, part in self.members:
            if part.view is None:
                raise TypeError(f"{ref.name} is no part of the fused tensor {stored.name}")
            place = part.view.of(cells)
            data = np.ascontiguousarray(self._bytes(ref, part, context))
            place[...] = data.view(cells.dtype).reshape(place.shape)
        write(self.offset + self.index * nbytes, slab)

    @staticmethod
    def _bytes(ref: TensorRef, part: Part, context: ReadContext) -> np.ndarray[Any, Any]:
        donor: TensorRef = ref
        if isinstance(ref, ComputedRef):
            choice = ref.decision(context).copy
            donor = ref.inputs[choice] if choice is not None else ref
        if isinstance(donor, StoredRef) and same_bytes(donor, ref):
            mine = next(each for each in donor.parts if each.key == part.key)
            raw = donor.raw(mine, 0, donor.rows)
            donor.check_finite({part.key: raw}, context)
            return raw
        return encode(ref, 0, ref.rows, context)[part.key]


def encode(ref: TensorRef, start: int, stop: int, context: ReadContext) -> dict[str, np.ndarray[Any, Any]]:
    """Stored bytes of computed rows. Raises CheckpointError where finite values do not fit the form."""
    raw = encoded(ref, start, stop, context)
    if not context.allow_nonfinite and not all(ref.codec.finite(key, data) for key, data in raw.items()):
        raise CheckpointError(
            f"{ref.name} would hold NaN or infinity: its values do not fit {ref.codec.name}",
            hint="write another format (output.format: bf16), or let it pass with output.allow_nonfinite",
        )
    return raw


def same_bytes(donor: TensorRef, ref: TensorRef) -> bool:
    """Whether the donor's stored bytes can be written for `ref` as they are (names may differ)."""
    if donor.codec != ref.codec or donor.shape != ref.shape or len(donor.parts) != len(ref.parts):
        return False
    return all(
        mine.key == other.key and mine.stored.dtype == other.stored.dtype
        for mine, other in zip(donor.parts, ref.parts, strict=True)
    )


def compile_jobs(shard: Shard) -> Iterator[Job]:
    """Jobs that together write every byte of the shard behind its header, in file order."""
    copy: CopyJob | None = None
    small = TileJob()
    weights = begun = 0
    offsets = {target.stored.name: offset for target, offset in shard.targets}
    for target, offset in shard.targets:
        ref, part = target.members[0]
        if copy and (target.fused or not isinstance(ref, StoredRef)):
            yield from _split(copy)
            copy = None
        if small.tiles and offset - begun >= APART:
            yield small
            small, weights = TileJob(), 0
        if target.fused:
            yield from _fused_jobs(target, offset)
            continue
        if isinstance(ref, StoredRef):
            if copy and _continues(copy, part, offset):
                _extend(copy, ref, part)
            else:
                if copy:
                    yield from _split(copy)
                copy = CopyJob(part, part.stored.offset, offset, 0)
                _extend(copy, ref, part)
        elif isinstance(ref, ComputedRef) and part is ref.parts[0]:
            places = {each.key: offsets[each.stored.name] for each in ref.parts}
            tiles = [Rows(ref, start, stop, places) for start, stop in ref.tiles()]
            if len(tiles) == 1 and ref.numel <= SMALL:
                begun = begun if small.tiles else offset
                small.tiles.append(tiles[0])
                weights += ref.numel
                if weights >= SMALL:
                    yield small
                    small, weights = TileJob(), 0
            else:
                yield from (TileJob([rows]) for rows in tiles)
    if copy:
        yield from _split(copy)
    if small.tiles:
        yield small


def _continues(copy: CopyJob, part: Part, offset: int) -> bool:
    return (
        copy.part.stored.file is part.stored.file
        and copy.source + copy.nbytes == part.stored.offset
        and copy.target + copy.nbytes == offset
    )


def _extend(copy: CopyJob, ref: StoredRef, part: Part) -> None:
    copy.pieces.append(Piece(copy.nbytes, part.stored.nbytes, ref, part.key))
    copy.nbytes += part.stored.nbytes


def _split(copy: CopyJob) -> Iterator[CopyJob]:
    """Chunks of one long copy; tensors cut by a chunk border are cut at multiples of 8 bytes."""
    begin = first = 0
    while begin < copy.nbytes:
        end = min(begin + CHUNK, copy.nbytes)
        while first < len(copy.pieces) and copy.pieces[first].begin + copy.pieces[first].nbytes <= begin:
            first += 1
        pieces = []
        for piece in copy.pieces[first:]:
            if piece.begin >= end:
                break
            if end < piece.begin + piece.nbytes:
                end -= (end - piece.begin) % 8
            low, high = max(piece.begin, begin), min(piece.begin + piece.nbytes, end)
            if high > low:
                pieces.append(Piece(low - begin, high - low, piece.ref, piece.key))
        yield CopyJob(copy.part, copy.source + begin, copy.target + begin, end - begin, pieces)
        begin = end


def _fused_jobs(target: Target, offset: int) -> Iterator[Job]:
    by_expert: dict[int, list[tuple[TensorRef, Part]]] = {}
    for ref, part in target.members:
        by_expert.setdefault(part.view.index if part.view else 0, []).append((ref, part))
    nbytes = target.stored.nbytes // target.stored.shape[0]
    copy: CopyJob | None = None
    for index, members in sorted(by_expert.items()):
        place = offset + index * nbytes
        origin = _whole_slab(members)
        if origin is None:
            yield SlabJob(target, index, offset, members)
            continue
        ref, part, source = origin
        if copy and copy.part.stored.file is part.stored.file and copy.source + copy.nbytes == source:
            copy.nbytes += nbytes
        else:
            if copy:
                yield from _split(copy)
            copy = CopyJob(part, source, place, nbytes)
        copy.pieces.append(Piece(place - copy.target, nbytes, ref, part.key))
    if copy:
        yield from _split(copy)


def _whole_slab(members: list[tuple[TensorRef, Part]]) -> tuple[StoredRef, Part, int] | None:
    """The parent's bytes of a whole expert, where every projection is a copy of one expert of it."""
    placed = [(ref, ref.place(part)) for ref, part in members if isinstance(ref, StoredRef)]
    if len(placed) != len(members):
        return None
    slabs = {(id(part.stored.file), part.stored.offset, part.view and part.view.index) for _, part in placed}
    ref, part = placed[0]
    if len(slabs) != 1 or part.view is None:
        return None
    source = part.stored.offset + part.view.index * (part.stored.nbytes // part.stored.shape[0])
    return ref, part, source
