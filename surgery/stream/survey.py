"""What writing a checkpoint will take, from headers alone: shards, reads, memory, coverage."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import PlanError
from surgery.stream.checkpoint import Checkpoint, ComputedRef, StoredRef, TensorRef
from surgery.stream.jobs import CHUNK
from surgery.stream.targets import Apart, Shard, pack, plan_targets
from surgery.stream.units import format_bytes
from surgery.stream.workspace import tile_bytes

LEAST_MEMORY = 256_000_000


@dataclass(frozen=True)
class Coverage:
    """Tensors of one role that share a fate."""

    role: str
    mtp: bool
    action: str
    tensors: int
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "role": self.role, "mtp": self.mtp, "action": self.action,
            "tensors": self.tensors, "bytes": self.nbytes,
        }  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """`reads` are bytes by parent label; `peak_bytes` is the largest job, `output_bytes` the weights."""

    shards: tuple[Shard, ...]
    reads: Mapping[str, int]
    peak_bytes: int
    largest: str
    output_bytes: int
    side_bytes: int
    coverage: tuple[Coverage, ...]

    @property
    def disk_bytes(self) -> int:
        return self.output_bytes + self.side_bytes


def action_of(ref: TensorRef) -> str:
    """What happens to a tensor, in two words."""
    if isinstance(ref, StoredRef):
        return f"copy of {ref.origin}"
    if isinstance(ref, ComputedRef):
        return str(ref.kernel.lineage()["op"])
    return type(ref).__name__


def survey(checkpoint: Checkpoint, shard_bytes: int, apart: Apart | None = None) -> Survey:
    """Everything that can be known before reading weights; raises CheckpointError on contradictions."""
    shards = tuple(pack(plan_targets(checkpoint.tensors.values()), shard_bytes, apart))
    reads: dict[str, int] = dict.fromkeys((source.label for source in checkpoint.inputs), 0)
    counts: dict[tuple[str, bool, str], list[int]] = {}
    peak, largest = CHUNK, ""
    for ref in checkpoint.tensors.values():
        for source in ref.sources():
            reads[source.origin] = reads.get(source.origin, 0) + source.nbytes
        cell = counts.setdefault((ref.info.role, ref.info.mtp, action_of(ref)), [0, 0])
        cell[0] += 1
        cell[1] += ref.nbytes
        if isinstance(ref, ComputedRef):
            need = tile_bytes(ref, min(ref.rows, ref.tile_rows()))
            if need > peak:
                peak, largest = need, ref.name
    coverage = tuple(Coverage(*key, *cell) for key, cell in counts.items())
    return Survey(
        shards, reads, peak, largest,
        sum(shard.nbytes for shard in shards),
        sum(path.stat().st_size for path in checkpoint.side_files.values()),
        tuple(sorted(coverage, key=lambda each: (each.role, each.mtp, each.action))),
    )  # fmt: skip


def check_memory(plan: Survey, memory_bytes: int) -> None:
    """Refuse a budget that one tile does not fit in."""
    if memory_bytes < LEAST_MEMORY:
        raise PlanError(
            f"a memory budget of {format_bytes(memory_bytes)} is below the least, "
            f"{format_bytes(LEAST_MEMORY)}",
            hint="run with --memory 256MB or more",
        )
    if plan.peak_bytes > memory_bytes:
        raise PlanError(
            f"{plan.largest} needs {format_bytes(plan.peak_bytes)} at once, above the budget of "
            f"{format_bytes(memory_bytes)}",
            hint=f"run with --memory {-(-plan.peak_bytes >> 20)}MiB or more",
        )


def free_bytes(folder: Path) -> int:
    """Free space on the file system that `folder` is or will be on."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_disk(need: int, folder: Path) -> None:
    """Refuse what does not fit on the disk of `folder`."""
    free = free_bytes(folder)
    if need > free:
        raise PlanError(
            f"{folder} needs {format_bytes(need)}, but its file system has only {format_bytes(free)} free "
            f"({need} and {free} bytes)",
            hint="free some space or choose an output folder on another file system",
        )
