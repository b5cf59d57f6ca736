"""Jobs of shards that are written together, so that those that read the same bytes follow one another.

The shards have one layout and differ in what fills it: the children of a sweep. Their targets are gone
through in stretches of a few megabytes; within a stretch each child's jobs are spread evenly, so that all
children are at about the same rows. What the first of them reads the others find in the page cache, or in
a block that was read ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from surgery.stream.jobs import Job, compile_jobs
from surgery.stream.targets import Shard

STRETCH = 8 << 20
"""Bytes of output gone through together; a larger tensor is a stretch of its own."""


def interleaved(shards: Sequence[Shard]) -> Iterator[tuple[int, Job]]:
    """(index of the shard, job) that together write every byte of the shards behind their headers."""
    if len(shards) == 1:
        yield from ((0, job) for job in compile_jobs(shards[0]))
        return
    for stretch in _stretches(shards[0]):
        spread = []
        for member, shard in enumerate(shards):
            part = replace(shard, targets=tuple(shard.targets[index] for index in stretch))
            jobs = list(compile_jobs(part))
            spread += [(place / len(jobs), member, job) for place, job in enumerate(jobs)]
        spread.sort(key=lambda each: each[:2])
        yield from ((member, job) for _, member, job in spread)


def _stretches(shard: Shard) -> Iterator[list[int]]:
    """Indexes of targets, in order; what belongs to one tensor (a weight and its scale) stays together."""
    places = {target.stored.name: index for index, (target, _) in enumerate(shard.targets)}
    seen: set[int] = set()
    stretch: list[int] = []
    nbytes = 0
    for index in range(len(shard.targets)):
        if index in seen:
            continue
        unit = _unit(shard, index, places)
        seen.update(unit)
        stretch += unit
        nbytes += sum(shard.targets[each][0].stored.nbytes for each in unit)
        if nbytes >= STRETCH:
            yield sorted(stretch)
            stretch, nbytes = [], 0
    if stretch:
        yield sorted(stretch)


def _unit(shard: Shard, index: int, places: dict[str, int]) -> list[int]:
    """The targets that share refs with one, itself among them."""
    found = {index: None}
    waiting = [index]
    while waiting:
        for ref, _ in shard.targets[waiting.pop()][0].members:
            for part in ref.parts:
                place = places[part.stored.name]
                if place not in found:
                    found[place] = None
                    waiting.append(place)
    return list(found)
