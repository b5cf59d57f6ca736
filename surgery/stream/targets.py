"""Where output bytes go: stored tensors to be written, packed into shards.

A target is one stored tensor of the output with the refs that fill it: one ref for a plain tensor,
one per expert and projection for a fused one. Targets that share refs (a weight and its scale, the
blocks and scales of fused experts) are a unit and never leave their shard.

Shards are filled in natural order of names. Within a shard, tensors whose size is no multiple of 8
bytes come last, by falling element size, so that every tensor is aligned for its dtype: the format
allows no padding between tensors, and readers map them in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from surgery.errors import CheckpointError
from surgery.stream.checkpoint import Part, TensorRef
from surgery.stream.files import StoredTensor, natural_key
from surgery.stream.header import DTYPE_BITS, build_header


@dataclass(slots=True)
class Target:
    """One stored tensor of the output; `members` are the refs and parts that fill it."""

    stored: StoredTensor
    members: list[tuple[TensorRef, Part]] = field(default_factory=list)

    @property
    def fused(self) -> bool:
        return self.members[0][1].view is not None


@dataclass(frozen=True)
class Shard:
    """One output file: its name, header bytes and the byte offset of every target."""

    name: str
    header: bytes
    targets: tuple[tuple[Target, int], ...]
    nbytes: int


Apart = Callable[[Sequence[Target]], Hashable]
"""A key for each unit; units with different keys go to different shards."""


def plan_targets(refs: Iterable[TensorRef]) -> list[list[Target]]:
    """Units of targets in natural order. Raises CheckpointError where refs contradict each other."""
    targets: dict[str, Target] = {}
    unit_of: dict[str, list[Target]] = {}
    for ref in refs:
        unit: list[Target] | None = None
        for part in ref.parts:
            name = part.stored.name
            target = targets.get(name)
            if target is None:
                target = targets[name] = Target(part.stored)
                unit_of[name] = [target]
            elif part.view is None or target.stored != part.stored:
                raise CheckpointError(f"two tensors would be written to {name}")
            target.members.append((ref, part))
            mine = unit_of[name]
            if unit is None:
                unit = mine
            elif unit is not mine:
                unit.extend(mine)
                for moved in mine:
                    unit_of[moved.stored.name] = unit
    units = {id(unit): unit for unit in unit_of.values()}
    for unit in units.values():
        unit.sort(key=lambda target: natural_key(target.stored.name))
        for target in unit:
            if target.fused:
                _check_filled(target)
    return sorted(units.values(), key=lambda unit: natural_key(unit[0].stored.name))


def _check_filled(target: Target) -> None:
    places = {part.view: TensorRef.part_nbytes(part) for _, part in target.members}
    covered = sum(places.values())
    if covered != target.stored.nbytes or len(places) != len(target.members):
        raise CheckpointError(
            f"the experts in hand fill {covered} of the {target.stored.nbytes} bytes of {target.stored.name}",
            hint="experts of a fused tensor can only be written together",
        )


def pack(units: Sequence[Sequence[Target]], shard_bytes: int, apart: Apart | None = None) -> list[Shard]:
    """Shards of at most `shard_bytes` of tensors each (a larger unit gets its own); where units are kept
    `apart`, those of the first key come first."""
    kinds: dict[Hashable, list[Sequence[Target]]] = {}
    for unit in units:
        kinds.setdefault(apart(unit) if apart else None, []).append(unit)
    groups: list[list[Target]] = []
    for kind in kinds.values() or [[]]:
        groups.append([])
        filled = 0
        for unit in kind:
            size = sum(target.stored.nbytes for target in unit)
            if groups[-1] and filled + size > shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].extend(unit)
            filled += size
    return [_shard(group, number, len(groups)) for number, group in enumerate(groups, 1)]


def _shard(targets: list[Target], number: int, count: int) -> Shard:
    tail = sorted(
        (target for target in targets if target.stored.nbytes % 8),
        key=lambda target: -DTYPE_BITS[target.stored.dtype],
    )
    ordered = [target for target in targets if target.stored.nbytes % 8 == 0] + tail
    stored = [target.stored for target in ordered]
    header = build_header(((each.name, each.dtype, each.shape) for each in stored), {"format": "pt"})
    offset = len(header)
    placed = []
    for target in ordered:
        placed.append((target, offset))
        offset += target.stored.nbytes
    name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
    return Shard(name, header, tuple(placed), offset)
