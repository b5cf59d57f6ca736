"""Save a checkpoint: preflight, journal, shards, side files, manifest, and publishing by rename.

Nothing appears under the output's name before it is whole. Work goes on in `OUT.partial` beside it;
the same call resumes there, `fresh` starts again. Every file is hashed while it is written.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from surgery.errors import PlanError, StrictError
from surgery.stream.ahead import ahead_bytes
from surgery.stream.buffers import ThreadBuffers
from surgery.stream.card import build_card
from surgery.stream.checkpoint import Checkpoint, ComputedRef, Event, ReadContext
from surgery.stream.execute import Execution, Progress, Writing
from surgery.stream.formats import Format, apply_format
from surgery.stream.journal import LOCK, Journal, lock, read_events
from surgery.stream.journal import NAME as JOURNAL
from surgery.stream.lanes import GpuUse, Lanes, gpu_of
from surgery.stream.manifest import NAME as MANIFEST
from surgery.stream.manifest import build_manifest, dump_manifest, kernels_used, tool_versions
from surgery.stream.remote import remote_files, traffic
from surgery.stream.source import collector_paused
from surgery.stream.survey import Survey, check_disk, check_memory, survey
from surgery.stream.targets import Shard
from surgery.stream.task_vectors import norm_rows
from surgery.stream.writer import disk_error

INDEX = "model.safetensors.index.json"
SUMS = "SHA256SUMS"

Extras = Callable[[Mapping[str, Any]], Mapping[str, str]]
"""Further text files of the output, made from its manifest."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback of those who want none."""


def cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class SaveOptions:
    """How to write. `memory_bytes` bounds the buffers in flight; `device` (cpu, cuda, auto) is where tiles
    are computed that have kernels there. Neither of them, nor `threads`, changes what is written."""

    format: Format = "source"
    shard_bytes: int = 5_000_000_000
    hash: bool = True
    memory_bytes: int = 1 << 30
    threads: int = field(default_factory=cores)
    device: str = "cpu"
    overwrite: bool = False
    fresh: bool = False
    strict: bool = False
    allow_nonfinite: bool = False
    recipe: Mapping[str, Any] | None = None
    extras: Extras | None = None
    progress: Progress = silent
    begun: float = field(default_factory=time.monotonic)
    """When the run began, by the monotonic clock: before a walk, where there was one."""

    def settings(self) -> dict[str, Any]:
        """Those that change what is written."""
        return {
            "format": self.format, "shard_bytes": self.shard_bytes, "hash": self.hash,
            "allow_nonfinite": self.allow_nonfinite,
        }  # fmt: skip


@dataclass(frozen=True)
class SaveResult:
    folder: Path
    manifest: Mapping[str, Any]


def save(checkpoint: Checkpoint, folder: Path, options: SaveOptions) -> SaveResult:
    """Write `checkpoint` to `folder`. Raises PlanError before anything is written where it cannot
    work, StrictError under `strict` where there are events."""
    with collector_paused():
        checkpoint = apply_format(checkpoint, options.format)
        plan = survey(checkpoint, options.shard_bytes)
    folder = Path(os.path.realpath(folder))
    check_target(checkpoint, folder, plan, options)
    work = work_folder(folder)
    check_disk(plan.disk_bytes - (0 if options.fresh else bytes_in(work)), folder)
    saving = Saving(checkpoint, folder, plan, options)
    try:
        write_rounds([[saving.writing(shard)] for shard in saving.missing()], [saving], options)
        return saving.publish()
    finally:
        saving.close()


def check_target(checkpoint: Checkpoint, folder: Path, plan: Survey, options: SaveOptions) -> None:
    """Refuse what cannot be written to `folder`, its disk aside."""
    gpu_of(options.device)
    clear_leftovers(folder)
    check_output(folder, options.overwrite)
    check_apart(folder, checkpoint)
    check_memory(plan, options.memory_bytes)
    refuse_events(checkpoint.events, options.strict)
    check_work(work_folder(folder))


def work_folder(folder: Path) -> Path:
    """Where the output is put together before it is published."""
    if not folder.name:
        raise PlanError(f"{folder} is no name for an output", hint="give a folder that can be created")
    return folder.with_name(folder.name + ".partial")


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something, unless it may be replaced."""
    if folder == Path.cwd():
        raise PlanError("the output is the current folder", hint="give a folder that can be created")
    if folder.exists() and not folder.is_dir():
        raise PlanError(f"{folder} is a file", hint="choose another output folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise PlanError(
            f"{folder} exists and is not empty", hint="choose another folder, or replace it with --overwrite"
        )


def check_work(work: Path) -> None:
    """Refuse a work folder that somebody else filled."""
    if work.is_dir() and any(work.iterdir()) and not _is_ours(work):
        raise PlanError(
            f"{work} exists and holds no journal of surgery",
            hint="move it away, or choose another output folder",
        )


def _is_ours(work: Path) -> bool:
    return (work / JOURNAL).is_file() or (work / LOCK).is_file()


def clear_work(work: Path) -> None:
    """Empty the work folder of an earlier run, unless a process is at work in it."""
    held = lock(work)
    try:
        for path in work.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        os.close(held)


def clear_leftovers(folder: Path) -> None:
    """Remove the journal and the lock that a run killed just after publishing left in its output."""
    events = read_events(folder / JOURNAL)
    if events and events[-1].get("event") == "complete":
        (folder / LOCK).unlink(missing_ok=True)
        (folder / JOURNAL).unlink(missing_ok=True)


def check_apart(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse an output that would replace, contain or lie in a folder that is read."""
    place = folder.resolve()
    for source in checkpoint.inputs:
        parent = source.folder.resolve() if source.folder else None
        if parent and (place == parent or place in parent.parents or parent in place.parents):
            raise PlanError(
                f"the output {folder} and the input {source.label} ({source.folder}) are not apart",
                hint="choose an output folder outside of the models that are read",
            )


def refuse_events(events: tuple[Event, ...], strict: bool) -> None:
    if strict and events:
        raise StrictError(
            f"{len(events)} events under --strict, first: {events[0].message}",
            hint="run without --strict to accept them",
        )


def fingerprint(checkpoint: Checkpoint, options: SaveOptions, layout: Sequence[Shard] = ()) -> dict[str, Any]:
    """What a resumed run must agree in; `layout` are the shards where the settings don't say which."""
    shards = sha256(b"".join(shard.header for shard in layout)).hexdigest()
    return {
        **({"shards": shards} if layout else {}),
        "steps": list(checkpoint.history),
        "settings": options.settings(),
        "inputs": {source.label: source.identity() for source in checkpoint.inputs},
        "side_files": {
            name: sha256(path.read_bytes()).hexdigest() for name, path in checkpoint.side_files.items()
        },
        "versions": tool_versions(checkpoint),
    }


class Saving:
    """One output on its way: what is finished of it, in its work folder and its journal, and publishing."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        plan: Survey,
        options: SaveOptions,
        layout: Sequence[Shard] = (),
    ) -> None:
        """Opens the journal. The checkpoint has the output's format; for `layout` see `fingerprint`."""
        self.checkpoint = checkpoint
        self.folder = folder
        self.work = work_folder(folder)
        self.plan = plan
        self.options = options
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(
                f"cannot create {self.work}: {error.strerror}", hint="choose another folder"
            ) from error
        if options.fresh:
            clear_work(self.work)
        self._journal = Journal(self.work, fingerprint(checkpoint, options, layout))
        self.kept = {
            shard.name: self._journal.shards[shard.name]
            for shard in plan.shards
            if shard.name in self._journal.shards and _size(self.work / shard.name) == shard.nbytes
        }
        self.finished: dict[str, dict[str, Any]] = dict(self.kept)
        self.gpu = GpuUse()
        """Of this run, for this output and those written with it."""

    def missing(self) -> list[Shard]:
        """The shards that no earlier run finished."""
        return [shard for shard in self.plan.shards if shard.name not in self.kept]

    def writing(self, shard: Shard) -> Writing:
        return Writing(self.work, shard, self.finish)

    def finish(self, shard: Shard, digest: str | None, found: Mapping[str, Any]) -> None:
        """A shard is in the work folder under its name."""
        entry = {
            "event": "shard", "shard": shard.name, "bytes": shard.nbytes, "sha256": digest,
            "tensors": dict(found),
        }  # fmt: skip
        self._journal.append(entry)
        self.finished[shard.name] = entry

    def publish(self) -> SaveResult:
        """Add everything beside the shards and give the output its name."""
        manifest = _complete(self)
        self._journal.append({"event": "complete"})
        _publish(self.work, self.folder)
        return SaveResult(self.folder, manifest)

    def close(self) -> None:
        self._journal.close()
        if self.folder.exists() and not self.work.exists():
            clear_leftovers(self.folder)


def write_rounds(
    rounds: Sequence[Sequence[Writing]], savings: Sequence[Saving], options: SaveOptions
) -> None:
    """Write shards of outputs, round by round, within the memory of `options`."""
    if any(isinstance(ref, ComputedRef) for each in savings for ref in each.checkpoint.tensors.values()):
        with collector_paused():
            import torch  # noqa: F401  (before the threads start, so that they only compute)
    remote = list(dict.fromkeys(file for each in savings for file in remote_files(each.checkpoint.inputs)))
    peak = max(each.plan.peak_bytes for each in savings)
    done = sum(entry["bytes"] for each in savings for entry in each.finished.values())
    gpu = gpu_of(options.device)
    use = GpuUse()
    context = ReadContext(
        options.allow_nonfinite, several=len(savings) > 1, buffers=ThreadBuffers(pinned=gpu is not None),
        lanes=Lanes(gpu, use) if gpu else None,
    )  # fmt: skip
    Execution(
        options.hash, max(1, options.threads), options.memory_bytes, context, options.progress,
        total_bytes=done + sum(writing.shard.nbytes for each in rounds for writing in each),
        done_bytes=done,
        remote=remote,
        ahead_bytes=ahead_bytes(options.memory_bytes, peak) if remote else 0,
    ).run(rounds)  # fmt: skip
    for each in savings:
        each.gpu = use


def _complete(saving: Saving) -> dict[str, Any]:
    """Write everything beside the shards; returns the manifest."""
    checkpoint, plan, options = saving.checkpoint, saving.plan, saving.options
    started = time.time() - (time.monotonic() - options.begun)
    outcomes = {name: each for entry in saving.finished.values() for name, each in entry["tensors"].items()}
    measurements = [*norm_rows(checkpoint.tensors, outcomes), *(p.measure() for p in checkpoint.probes)]
    weights = {
        shard.name: {"bytes": shard.nbytes, "sha256": saving.finished[shard.name]["sha256"]}
        for shard in plan.shards
    }
    network, gpu = traffic(checkpoint.inputs), gpu_of(options.device)
    files = {**weights, **_write_side_files(checkpoint, plan, saving.work, options.hash)}
    manifest = build_manifest(
        checkpoint,
        plan,
        outcomes,
        recipe=options.recipe,
        settings=options.settings(),
        events=checkpoint.events,
        measurements=measurements,
        files=files,
        run={
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.monotonic() - options.begun, 3),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "threads": options.threads,
            "memory_bytes": options.memory_bytes,
            "device": gpu if gpu and saving.gpu.passes else "cpu",
            **({"gpu_passes": len(saving.gpu.passes)} if gpu else {}),
            "kernels": kernels_used(checkpoint, gpu, saving.gpu),
            "resumed_shards": sorted(saving.kept),
            **({"remote": network} if network else {}),
        },
    )
    texts = {"README.md": build_card(checkpoint, manifest), **checkpoint.texts}
    if options.extras:
        texts |= options.extras(manifest)
    for name, text in texts.items():
        _write_bytes(saving.work / name, text.encode())
    if options.hash:
        sums = {name: entry["sha256"] for name, entry in files.items()}
        sums |= {name: sha256(text.encode()).hexdigest() for name, text in texts.items()}
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        _write_bytes(saving.work / SUMS, lines.encode())
    _write_bytes(saving.work / MANIFEST, dump_manifest(manifest))
    return manifest


def _write_side_files(
    checkpoint: Checkpoint, plan: Survey, work: Path, hashed: bool
) -> dict[str, dict[str, Any]]:
    """config.json, the index, and everything else that travels with the weights."""
    files = {name: path.read_bytes() for name, path in checkpoint.side_files.items()}
    config = dict(checkpoint.config)
    if "config.json" not in files or json.loads(files["config.json"]) != config:
        files["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    if len(plan.shards) > 1:
        weight_map = {target.stored.name: shard.name for shard in plan.shards for target, _ in shard.targets}
        total = sum(target.stored.nbytes for shard in plan.shards for target, _ in shard.targets)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files[INDEX] = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
    for name, data in files.items():
        _write_bytes(work / name, data)
    return {
        name: {"bytes": len(data), "sha256": sha256(data).hexdigest() if hashed else None}
        for name, data in sorted(files.items())
    }


def _write_bytes(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, path) from error


def _publish(work: Path, folder: Path) -> None:
    """Give the finished work folder the output's name; what it replaces goes last."""
    replaced = folder.with_name(folder.name + ".surgery-replaced")
    if folder.exists() and any(folder.iterdir()):
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(folder, replaced)
    os.rename(work, folder)
    parent = os.open(folder.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def bytes_in(folder: Path) -> int:
    """Bytes that an unfinished run already holds."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
