"""Save several checkpoints in one reading of their parents: the children of a sweep.

The children hold the same tensors in the same forms and differ in what fills some of them. Their shards are
written side by side, each stretch of the parents read once for all (see `interleave`). Tensors that several
children share lie in shards of their own, which are written for one of them; the others get the file as a
reflink, a hard link, or, where the file system has neither, a copy. Tensors are grouped by the children that
share them, so the shards of such a child are not cut as those of the same child saved alone; its tensors are
equal byte for byte.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path
from typing import Any

from surgery.stream.checkpoint import Checkpoint, ComputedRef, StoredRef, TensorRef
from surgery.stream.execute import Writing
from surgery.stream.files import StoredTensor
from surgery.stream.formats import Format, apply_format
from surgery.stream.journal import NAME as JOURNAL
from surgery.stream.journal import read_events
from surgery.stream.save import (
    SaveOptions,
    SaveResult,
    Saving,
    bytes_in,
    check_target,
    fingerprint,
    work_folder,
    write_rounds,
)
from surgery.stream.source import collector_paused
from surgery.stream.survey import Survey, check_disk, survey
from surgery.stream.targets import Shard, Target
from surgery.stream.writer import disk_error

FICLONE = 0x40049409
"""The ioctl of Linux that makes one file share the blocks of another."""


@dataclass(frozen=True)
class Family:
    """Children with one layout, from headers alone. `alike[number]` are the classes of children that share
    shard `number`, each class by indexes in order."""

    checkpoints: tuple[Checkpoint, ...]
    plans: tuple[Survey, ...]
    alike: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def output_bytes(self) -> int:
        """Bytes to be written: shared shards once, side files for each."""
        shards = self.plans[0].shards
        weights = sum(shard.nbytes * len(classes) for shard, classes in zip(shards, self.alike, strict=True))
        return weights + sum(plan.side_bytes for plan in self.plans)

    @property
    def whole_bytes(self) -> int:
        """What the children would take if each were saved alone."""
        return sum(plan.disk_bytes for plan in self.plans)

    def twin(self, index: int) -> int:
        """The first child that is the same as this one in every byte, itself maybe."""
        mine = self.checkpoints[index]
        for other in range(index):
            its = self.checkpoints[other]
            if (
                all(other in kin for classes in self.alike for kin in classes if index in kin)
                and its.config == mine.config
                and its.side_files == mine.side_files
                and its.texts == mine.texts
            ):
                return other
        return index

    @property
    def reads(self) -> Mapping[str, int]:
        """Bytes of each parent that are read for all children, by its label."""
        wanted: dict[tuple[int, int, str], StoredTensor | tuple[int, str]] = {}
        total: dict[str, int] = {}
        for checkpoint in self.checkpoints:
            for ref in checkpoint.tensors.values():
                for source in ref.sources():
                    for part in map(source.place, source.parts):
                        key = (id(part.stored.file), part.stored.offset, str(part.view))
                        if key not in wanted:
                            wanted[key] = part.stored
                            total[source.origin] = total.get(source.origin, 0) + source.part_nbytes(part)
        return total


def family_of(checkpoints: Sequence[Checkpoint], form: Format, shard_bytes: int) -> Family | None:
    """How children would be saved together; None where their tensors are not the same by name and form.

    Parents that several children read must be the same objects, opened once. Raises what `survey` does.
    """
    with collector_paused():
        formed = [apply_format(each, form) for each in checkpoints]
        kinship = Kinship(formed)
        plans = [survey(each, shard_bytes, kinship.of_unit) for each in formed]
        layouts = [[(shard.name, shard.header) for shard in plan.shards] for plan in plans]
        if any(layout != layouts[0] for layout in layouts):
            return None
        alike = [kinship.of_unit([target for target, _ in shard.targets]) for shard in plans[0].shards]
    return Family(tuple(formed), tuple(plans), tuple(alike))


@dataclass
class Kinship:
    """Which children hold equal bytes, told from how their tensors come about."""

    children: Sequence[Checkpoint]
    _of_tensor: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def of_unit(self, unit: Sequence[Target]) -> tuple[tuple[int, ...], ...]:
        """The classes of children to whom all tensors of a unit are the same."""
        names = dict.fromkeys(ref.name for target in unit for ref, _ in target.members)
        classes: dict[tuple[int, ...], list[int]] = {}
        for child, key in enumerate(zip(*map(self.of_tensor, names), strict=True)):
            classes.setdefault(key, []).append(child)
        return tuple(map(tuple, classes.values()))

    def of_tensor(self, name: str) -> tuple[int, ...]:
        """For each child the first child with the same tensor, itself maybe."""
        found = self._of_tensor.get(name)
        if found is None:
            first: list[int] = []
            refs = [child.tensors.get(name) for child in self.children]
            for index, ref in enumerate(refs):
                earlier = (each for each in dict.fromkeys(first) if same_tensor(refs[each], ref))
                first.append(next(earlier, index))
            found = self._of_tensor[name] = tuple(first)
        return found


def same_tensor(one: TensorRef | None, other: TensorRef | None) -> bool:
    """Whether two refs would be written as the same bytes: the same tensor of a parent, or the same
    arithmetic on the same tensors. Kernels that do not compare count as different."""
    if one is other:
        return True
    if one is None or other is None or type(one) is not type(other) or not one.same_form(other):
        return False
    if isinstance(one, StoredRef) and isinstance(other, StoredRef):
        places = zip(map(one.place, one.parts), map(other.place, other.parts), strict=True)
        return one.origin == other.origin and all(
            a.view == b.view and a.stored.file is b.stored.file and a.stored.offset == b.stored.offset
            for a, b in places
        )
    if isinstance(one, ComputedRef) and isinstance(other, ComputedRef):
        return (
            one.kernel == other.kernel
            and len(one.inputs) == len(other.inputs)
            and all(map(same_tensor, one.inputs, other.inputs))
        )
    return False


def save_together(
    family: Family,
    folders: Sequence[Path | None],
    options: Sequence[SaveOptions],
    published: Callable[[int, SaveResult], None] | None = None,
) -> None:
    """Write the children that have a folder, and say of each when it is there.

    `options` of a child are its own (recipe, extras); memory, threads, hashing and progress are those of the
    first. Raises as `save` does; finished shards stay, and the same call resumes.
    """
    wanted = {index: Path(os.path.realpath(folder)) for index, folder in enumerate(folders) if folder}
    if not wanted:
        return
    for index, folder in wanted.items():
        check_target(family.checkpoints[index], folder, family.plans[index], options[index])
    check_disk(_missing_bytes(family, wanted), next(iter(wanted.values())).parent)
    layout = family.plans[0].shards
    with ExitStack() as stack:
        savings = {}
        for index, folder in wanted.items():
            saving = Saving(family.checkpoints[index], folder, family.plans[index], options[index], layout)
            stack.callback(saving.close)
            savings[index] = saving
        rounds = [
            _round(number, [[savings[each] for each in kin if each in savings] for kin in classes])
            for number, classes in enumerate(family.alike)
        ]
        first = options[next(iter(wanted))]
        write_rounds([each for each in rounds if each], list(savings.values()), first)
        for index, saving in savings.items():
            result = saving.publish()
            if published:
                published(index, result)


def begun_otherwise(family: Family, index: int, folder: Path, options: SaveOptions) -> bool:
    """Whether an earlier run left a child half written with other settings or in other shards."""
    events = read_events(work_folder(folder) / JOURNAL)
    mine = fingerprint(family.checkpoints[index], options, family.plans[0].shards)
    return bool(events) and events[0].get("fingerprint") != json.loads(json.dumps(mine))


def _missing_bytes(family: Family, wanted: Mapping[int, Path]) -> int:
    need = sum(family.plans[index].side_bytes for index in wanted)
    for shard, classes in zip(family.plans[0].shards, family.alike, strict=True):
        need += shard.nbytes * sum(any(each in wanted for each in kin) for kin in classes)
    return need - sum(bytes_in(work_folder(folder)) for folder in wanted.values())


def _round(number: int, classes: Sequence[Sequence[Saving]]) -> list[Writing]:
    """Shard `number` of every class, but for those that have it already."""
    found = []
    for kin in classes:
        lacking = [saving for saving in kin if saving.plan.shards[number].name not in saving.kept]
        having = [saving for saving in kin if saving not in lacking]
        if having and lacking:
            shard = having[0].plan.shards[number]
            entry = having[0].kept[shard.name]
            _hand_on(having[0], lacking, shard, entry["sha256"], entry["tensors"])
        elif lacking:
            found.append(_leading(lacking[0], lacking[1:], lacking[0].plan.shards[number]))
    return found


def _leading(leader: Saving, others: Sequence[Saving], shard: Shard) -> Writing:
    def finished(shard: Shard, digest: str | None, found: Mapping[str, Any]) -> None:
        leader.finish(shard, digest, found)
        _hand_on(leader, others, shard, digest, found)

    return Writing(leader.work, shard, finished)


def _hand_on(
    giver: Saving, takers: Sequence[Saving], shard: Shard, digest: str | None, found: Mapping[str, Any]
) -> None:
    for taker in takers:
        share(giver.work / shard.name, taker.work / shard.name)
        taker.finish(shard, digest, found)


def share(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: blocks shared where the file system can, else a hard link,
    else a copy. Replaces what an interrupted run left."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        if not _cloned(source, temporary) and not _linked(source, temporary):
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, target) from error


def _cloned(source: Path, target: Path) -> bool:
    try:
        with open(source, "rb") as giver, open(target, "xb") as taker:
            ioctl(taker.fileno(), FICLONE, giver.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        target.unlink(missing_ok=True)
        return False
    return True


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
