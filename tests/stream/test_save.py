"""Saving: equal files whatever the threads, memory and hash seed, true books, and what must fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import factories
import oracle
import pytest
import torch
from folders import change_shards, check_written, file_hashes, lasting, strict_manifest
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from surgery.errors import CheckpointError, PlanError, StrictError, SurgeryError
from surgery.operators.merge.aoe import AssemblyOfExperts
from surgery.stream import jobs, save, survey
from surgery.stream import journal as journal_module
from surgery.stream.checkpoint import Checkpoint
from surgery.stream.journal import Journal
from surgery.stream.save import SaveOptions
from surgery.stream.source import open_checkpoint

MERGES: dict[str, dict[str, Any]] = {
    "chimera": {"weights": {"reasoner": 1.0}, "select": ("routed_expert",)},
    "half": {"weights": {"reasoner": 0.5}},
    "three": {"weights": {"reasoner": 0.5, "third": 0.3}, "threshold": 0.015, "select": ("re:proj", "norm")},
}
merges = pytest.mark.parametrize("name", MERGES)
SHARD = 400_000


def child(parents: dict[str, Path], name: str) -> Checkpoint:
    """A fresh one each time: refs remember what they decided."""
    opened = {label: open_checkpoint(path, label) for label, path in parents.items()}
    return AssemblyOfExperts(base="base", **MERGES[name]).apply(opened)


@pytest.fixture(scope="module")
def written(parents: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, save.SaveResult]:
    """Each merge written once, on two threads."""
    folder = tmp_path_factory.mktemp("written")
    return {name: child(parents, name).save(folder / name, shard_bytes=SHARD, threads=2) for name in MERGES}


@pytest.fixture
def untouched(parents: dict[str, Path]) -> Any:
    """Fails the test if it changed a parent."""
    before = {name: file_hashes(path) for name, path in parents.items()}
    yield
    assert {name: file_hashes(path) for name, path in parents.items()} == before


# Equal files


@merges
@pytest.mark.parametrize("threads", [1, 4])
def test_equal_files_and_manifest_whatever_the_threads(
    parents: dict[str, Path], written: dict[str, save.SaveResult], tmp_path: Path, name: str, threads: int
) -> None:
    again = child(parents, name).save(tmp_path / "out", shard_bytes=SHARD, threads=threads)
    assert file_hashes(again.folder) == file_hashes(written[name].folder)
    assert json.loads(lasting(again)) == json.loads(lasting(written[name]))


def test_the_manifest_is_equal_to_the_letter(
    parents: dict[str, Path],
    written: dict[str, save.SaveResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reports are made from it, so that its order is part of what must be reproducible."""
    slow(monkeypatch, "model-00001", 0.3)
    again = child(parents, "half").save(tmp_path / "out", shard_bytes=SHARD, threads=2)
    assert lasting(again) == lasting(written["half"])


@merges
@pytest.mark.parametrize(("memory", "chunk", "small"), [(9 << 20, 8 << 20, 0), (9 << 20, 4100, 1 << 16)])
def test_equal_files_whatever_the_memory_and_the_size_of_jobs(
    parents: dict[str, Path], written: dict[str, save.SaveResult], tmp_path: Path, name: str,
    memory: int, chunk: int, small: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(survey, "LEAST_MEMORY", 0)
    monkeypatch.setattr(jobs, "CHUNK", chunk)
    monkeypatch.setattr(jobs, "SMALL", small)
    again = child(parents, name).save(tmp_path / "out", shard_bytes=SHARD, threads=3, memory_bytes=memory)
    assert file_hashes(again.folder) == file_hashes(written[name].folder)


@merges
def test_equal_tensors_whatever_the_tiles(
    parents: dict[str, Path], written: dict[str, save.SaveResult], tmp_path: Path, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Tiles are fixed by shape; smaller ones make these small tensors take the way of large ones."""
    from surgery.stream import checkpoint

    monkeypatch.setattr(checkpoint, "TILE_WEIGHTS", 1 << 14)
    monkeypatch.setattr(jobs, "SMALL", 0)
    again = child(parents, name).save(tmp_path / "out", shard_bytes=SHARD, threads=3)
    assert oracle.read_folder(again.folder) == oracle.read_folder(written[name].folder)


@merges
def test_equal_tensors_whatever_the_shard_size(
    parents: dict[str, Path], written: dict[str, save.SaveResult], tmp_path: Path, name: str
) -> None:
    whole = child(parents, name)
    again = whole.save(tmp_path / "out")
    assert [path.name for path in again.folder.glob("*.safetensors")] == ["model.safetensors"]
    assert oracle.read_folder(again.folder) == oracle.read_folder(written[name].folder)
    check_written(again.folder, whole.tensors)


def test_equal_files_whatever_the_hash_seed(
    parents: dict[str, Path], written: dict[str, save.SaveResult], tmp_path: Path
) -> None:
    folder = str(parents["base"].parent)
    script = (
        "import sys; from pathlib import Path\n"
        "import test_save\n"
        f"parents = {{name: Path({folder!r}) / name for name in {sorted(parents)}}}\n"
        "for name in test_save.MERGES:\n"
        f"    test_save.child(parents, name).save(Path(sys.argv[1]) / name, shard_bytes={SHARD}, threads=1)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path, "OMP_NUM_THREADS": seed},
        )
        for seed in ("1", "2")
    ]
    assert [process.wait(90) for process in running] == [0, 0]
    for name, result in written.items():
        for seed in ("1", "2"):
            assert file_hashes(tmp_path / seed / name) == file_hashes(result.folder)


def test_a_second_save_of_the_same_checkpoint_is_equal(parents: dict[str, Path], tmp_path: Path) -> None:
    whole = child(parents, "three")
    first, second = (whole.save(tmp_path / name, shard_bytes=SHARD) for name in ("first", "second"))
    assert file_hashes(first.folder) == file_hashes(second.folder)
    assert json.loads(lasting(first)) == json.loads(lasting(second))


# True books


@merges
@pytest.mark.usefixtures("untouched")
def test_the_books_of_an_output_are_true(
    parents: dict[str, Path], written: dict[str, save.SaveResult], name: str
) -> None:
    manifest = check_written(written[name].folder, child(parents, name).tensors)
    assert manifest["output"]["tensors"] == len(manifest["tensors"])
    assert manifest["run"]["resumed_shards"] == []
    labels = {"chimera": {"base", "reasoner"}, "half": {"base", "reasoner"}}.get(name, set(parents))
    assert set(manifest["inputs"]) == labels


def test_lineage_says_of_every_tensor_where_its_bytes_are_from(
    parents: dict[str, Path], written: dict[str, save.SaveResult]
) -> None:
    folders = {label: oracle.read_folder(path) for label, path in parents.items()}
    for name, result in written.items():
        manifest, stored = strict_manifest(result.folder), oracle.read_folder(result.folder)
        for tensor, number in manifest["tensors"].items():
            lineage = manifest["lineage"][number]
            if "copy" in lineage:
                for key in (tensor, f"{tensor}_scale_inv"):
                    assert stored.get(key) == folders[lineage["copy"]].get(key), (name, key)
            else:
                assert lineage["op"] == "merge.aoe"
                assert lineage["inputs"][0] == {"copy": "base"}
                assert stored[tensor] != folders["base"][tensor] or name == "half"


@merges
def test_libraries_read_what_was_written(written: dict[str, save.SaveResult], name: str) -> None:
    for path in sorted(written[name].folder.glob("*.safetensors")):
        mine = oracle.read_shard(path)
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(mine)
            assert file.metadata() == {"format": "pt"}
            for key, (_, shape, raw) in mine.items():
                tensor = file.get_tensor(key)
                assert tuple(tensor.shape) == shape
                assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == raw


@merges
def test_config_and_side_files_are_the_bases_byte_for_byte(
    parents: dict[str, Path], written: dict[str, save.SaveResult], name: str
) -> None:
    found, base = file_hashes(written[name].folder), file_hashes(parents["base"])
    for file, digest in base.items():
        if not file.endswith((".safetensors", ".index.json")):
            assert found[file] == digest, file


def test_without_hashing_the_tensors_are_the_same_and_no_sum_is_claimed(
    parents: dict[str, Path], written: dict[str, save.SaveResult], tmp_path: Path
) -> None:
    result = child(parents, "half").save(tmp_path / "out", shard_bytes=SHARD, hash=False)
    want = file_hashes(written["half"].folder)
    assert want.pop("SHA256SUMS")
    assert file_hashes(result.folder) == want
    assert {entry["sha256"] for entry in strict_manifest(result.folder)["output"]["files"].values()} == {None}


def test_progress_counts_every_byte_once(parents: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    child(parents, "half").save(
        tmp_path / "out", shard_bytes=SHARD, threads=1, progress=lambda *told: seen.append(told)
    )
    total = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert seen[-1] == ("write", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_further_files_are_made_from_the_manifest_and_summed(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    def extras(manifest: Any) -> dict[str, str]:
        return {"surgery_report.html": f"<p>{manifest['output']['tensors']}</p>", "notes/ü.txt": "ü"}

    whole = child(parents, "chimera")
    result = whole.save(tmp_path / "out", extras=extras)
    assert (result.folder / "surgery_report.html").read_text() == f"<p>{len(whole.tensors)}</p>"
    assert "surgery_report.html" in (result.folder / "SHA256SUMS").read_text()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("chimera", (0,)), ("chimera", (0, 4)),
        ("chimera", (4, 0)), ("half", (0,)), ("half", (0, 4)), ("half", (4, 0)),
        ("three", (0,)), ("three", (0, 4)), ("three", (4, 0)),
    ],
)  # fmt: skip
def test_tensors_without_elements_pass(
    parents: dict[str, Path], tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    """Some checkpoints hold such (partitioned training leaves them behind)."""
    copies = {label: shutil.copytree(path, tmp_path / label) for label, path in parents.items()}
    for folder in copies.values():
        change_shards(folder, lambda tensors: {
            **tensors,
            **({"model.norm.extra": torch.empty(shape)} if "model.norm.weight" in tensors else {}),
        })  # fmt: skip
    result = child(copies, name).save(tmp_path / "out")
    assert oracle.read_folder(result.folder)["model.norm.extra"] == ("F32", shape, b"")


# Refused before anything is written


def refused(call: Callable[[], object], *words: str) -> PlanError:
    with pytest.raises(PlanError) as caught:
        call()
    for word in words:
        assert word in caught.value.message, caught.value.message
    assert caught.value.exit_code == 5
    return caught.value


def test_an_output_that_is_in_use(parents: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert refused(lambda: child(parents, "chimera").save(out), str(out), "not empty").hint
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]
    (tmp_path / "file").write_text("")
    refused(lambda: child(parents, "chimera").save(tmp_path / "file"), "is a file")
    refused(lambda: child(parents, "chimera").save(tmp_path / "file", overwrite=True), "is a file")


def test_an_empty_output_folder_is_filled(parents: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    child(parents, "chimera").save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_the_folder_whole(
    parents: dict[str, Path], written: dict[str, save.SaveResult], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    child(parents, "half").save(out, shard_bytes=100_000)
    (out / "notes.txt").write_text("old")
    result = child(parents, "chimera").save(out, shard_bytes=SHARD, overwrite=True)
    assert file_hashes(result.folder) == file_hashes(written["chimera"].folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_parent_is_never_overwritten(parents: dict[str, Path], tmp_path: Path) -> None:
    copies = {label: shutil.copytree(path, tmp_path / label) for label, path in parents.items()}
    before = file_hashes(copies["base"])
    with pytest.raises(SurgeryError):
        child(copies, "half").save(copies["base"], overwrite=True)
    assert file_hashes(copies["base"]) == before


def test_a_folder_with_parents_in_it_is_never_overwritten(parents: dict[str, Path], tmp_path: Path) -> None:
    copies = {label: shutil.copytree(path, tmp_path / "models" / label) for label, path in parents.items()}
    with pytest.raises(SurgeryError):
        child(copies, "half").save(tmp_path / "models", overwrite=True)
    assert all(path.is_dir() for path in copies.values())


@pytest.mark.usefixtures("untouched")
def test_an_output_inside_a_parent_is_refused(parents: dict[str, Path]) -> None:
    """The parent's side files would grow by the child's."""
    with pytest.raises(SurgeryError, match="not apart"):
        child(parents, "chimera").save(parents["base"] / "child")


@pytest.mark.parametrize("state", ["empty", "full", "dangling"])
def test_an_output_that_is_a_link_to_a_folder(parents: dict[str, Path], tmp_path: Path, state: str) -> None:
    """People link outputs to a larger disk. Refused at once, or written there."""
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    if state != "dangling":
        target.mkdir()
    if state == "full":
        (target / "old").write_text("")
    (tmp_path / "out").symlink_to(target)
    try:
        result = child(parents, "chimera").save(tmp_path / "out", overwrite=state == "full")
    except PlanError:
        assert not (tmp_path / "out.partial").exists()
        return
    check_written(result.folder, child(parents, "chimera").tensors)


@pytest.mark.parametrize("out", ["file/out", "."])
def test_an_output_that_cannot_be_made(
    parents: dict[str, Path], tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    place = Path(out) if out == "." else tmp_path / out
    with pytest.raises(SurgeryError):
        child(parents, "chimera").save(place)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_somebody_else_where_work_would_go(
    parents: dict[str, Path], tmp_path: Path, fresh: bool
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(PlanError):
        child(parents, "chimera").save(tmp_path / "out", fresh=fresh)
    assert (tmp_path / "out.partial" / "thesis.txt").exists()


def test_too_little_disk(parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = child(parents, "chimera")
    need = survey.survey(whole, SHARD).disk_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    error = refused(
        lambda: whole.save(tmp_path / "deep" / "out", shard_bytes=SHARD), str(need), str(need - 1)
    )
    assert error.hint
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need))
    result = whole.save(tmp_path / "deep" / "out", shard_bytes=SHARD)
    listed = strict_manifest(result.folder)["output"]["files"]
    weights = sum(entry["bytes"] for name, entry in listed.items() if name.endswith(".safetensors"))
    assert weights == survey.survey(whole, SHARD).output_bytes


def test_too_little_memory(parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: child(parents, "half").save(tmp_path / "out", memory_bytes=255_000_000), "256 MB")
    monkeypatch.setattr(survey, "LEAST_MEMORY", 0)
    monkeypatch.setattr(survey, "CHUNK", 0)
    whole = child(parents, "half")
    peak = survey.survey(whole, SHARD).peak_bytes
    error = refused(lambda: whole.save(tmp_path / "out", memory_bytes=peak - 1), ".weight needs")
    assert "--memory" in error.hint
    assert not list(tmp_path.iterdir())
    whole.save(tmp_path / "out", memory_bytes=peak, shard_bytes=SHARD)


def test_events_are_errors_under_strict(parents: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(parents["base"], tmp_path / "base")
    shutil.copy(copy / "model-00001-of-000004.safetensors", copy / "stray.safetensors")
    with pytest.raises(StrictError, match=r"stray\.safetensors") as caught:
        open_checkpoint(copy).save(tmp_path / "out", strict=True)
    assert caught.value.exit_code == 7
    assert not (tmp_path / "out").exists()
    assert strict_manifest(open_checkpoint(copy).save(tmp_path / "out").folder)["events"]


def test_two_processes_do_not_write_one_output(parents: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    holder = Journal(tmp_path / "out.partial", {"a": 1})
    try:
        refused(lambda: child(parents, "chimera").save(tmp_path / "out"), "another process")
    finally:
        holder.close()


def test_fresh_does_not_remove_the_work_of_a_running_process(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    holder = Journal(work, {"a": 1})
    (work / "model.safetensors.tmp").write_text("half written")
    try:
        with pytest.raises(PlanError, match="another process"):
            child(parents, "chimera").save(tmp_path / "out", fresh=True)
        assert (work / "model.safetensors.tmp").exists()
    finally:
        holder.close()


# Failing midway


def interrupt(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], after: int, function: str = "pwrite"
) -> SurgeryError | None:
    """Run `call` with a disk that is full from the n-th call of os.<function> on; the error it ended in."""
    real = getattr(os, function)
    calls = 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, function, full)
        try:
            call()
        except SurgeryError as error:
            return error
    return None


def counted(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], function: str) -> int:
    """How often `call` calls os.<function>."""
    real = getattr(os, function)
    calls: list[int] = []

    def count(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, function, count)
        call()
    return len(calls)


def slow(monkeypatch: pytest.MonkeyPatch, name: str, seconds: float) -> None:
    """Make the files whose names begin so be finished later than they would be."""
    import time

    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(target).name.startswith(name):
            time.sleep(seconds)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", ["chimera", "half"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.9, 0.999])
def test_a_disk_that_fills_up_midway(
    parents: dict[str, Path], written: dict[str, save.SaveResult], tmp_path: Path, name: str, share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def write(out: Path) -> object:
        return child(parents, name).save(out, shard_bytes=SHARD, threads=1)

    out = tmp_path / "out"
    writes = counted(monkeypatch, lambda: write(tmp_path / "whole"), "pwrite")
    error = interrupt(monkeypatch, lambda: write(out), int(writes * share))
    assert isinstance(error, PlanError), error
    assert "the disk is full" in error.message and "again" in error.hint
    assert not out.exists()
    kept = {path.name: path.stat() for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert kept or share < 0.9
    result = child(parents, name).save(out, shard_bytes=SHARD)
    assert file_hashes(out) == file_hashes(written[name].folder)
    assert result.manifest["run"]["resumed_shards"] == sorted(kept)
    assert all((out / file).stat().st_mtime_ns == was.st_mtime_ns for file, was in kept.items())


@pytest.mark.parametrize("first", [1, 0])
def test_a_disk_that_fills_up_at_any_sync(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Journal, shards, side files, manifest: each is synced, in this order, the parent folder last."""

    def write(out: Path) -> object:
        return child(parents, "chimera").save(out, shard_bytes=2_000_000, threads=1)

    syncs = counted(monkeypatch, lambda: write(tmp_path / "whole"), "fsync")
    assert syncs > 15
    want = file_hashes(tmp_path / "whole")
    for after in range(first, syncs - 1) if first else [0]:
        out = tmp_path / str(after)
        error = interrupt(monkeypatch, lambda out=out: write(out), after, "fsync")
        assert isinstance(error, PlanError), error
        assert not out.exists()
        write(out)
        assert file_hashes(out) == want
        shutil.rmtree(out)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_journal_on_a_full_disk_ends_in_one_error_of_ours(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    journal._file.close()
    journal._file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(PlanError, match="disk is full"):
        journal.append({"event": "shard"})
    journal.close()


HANGS = """
import os, sys, threading, time
from pathlib import Path
from surgery.stream.source import open_checkpoint
failed = sys.argv[3]
real = os.pwrite
seen = []
def pwrite(descriptor, data, offset):
    name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    seen.append(name)
    if name.startswith(failed) and offset > 10_000 and threading.current_thread().name.startswith("worker"):
        time.sleep(1.0)
        raise OSError(28, "No space left on device")
    return real(descriptor, data, offset)
os.pwrite = pwrite
try:
    open_checkpoint(sys.argv[1]).save(sys.argv[2], shard_bytes=400_000, threads=2)
except Exception as error:
    print(type(error).__name__)
"""


def test_a_failing_shard_does_not_leave_the_others_waiting(parents: dict[str, Path], tmp_path: Path) -> None:
    """One worker meets a full disk in the first shard while the other has run ahead to the fourth."""
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(parents["base"]), str(tmp_path / "out"), "model-00001"],
        capture_output=True, text=True, timeout=8, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.strip() == "PlanError", done.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_while_a_shard_is_finished_is_the_one_that_is_told(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("what went wrong")

    monkeypatch.setattr("surgery.stream.execute.outcomes", broken)
    with pytest.raises(RuntimeError, match="what went wrong"):
        child(parents, "chimera").save(tmp_path / "out")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_one_tensor_stops_the_run_and_leaves_what_is_finished(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    from surgery.operators.merge.aoe import Assembly

    real = Assembly.combine
    calls = 0

    def combine(self: Assembly, tiles: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 60:
            raise CheckpointError("tile 60")
        return real(self, tiles)

    monkeypatch.setattr(Assembly, "combine", combine)
    monkeypatch.setattr(Assembly, "fuse", lambda *_: None)
    with pytest.raises(CheckpointError, match="tile 60"):
        child(parents, "half").save(tmp_path / "out", shard_bytes=2_000_000, threads=threads)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_files_of_the_run_are_closed(parents: dict[str, Path], tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    child(parents, "half").save(tmp_path / "out", shard_bytes=SHARD)
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1


# Odd content


def test_a_parent_left_by_a_killed_run_gives_a_true_child(parents: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(parents["base"], tmp_path / "base")
    (copy / journal_module.NAME).write_text('{"event":"start","fingerprint":{}}\n')
    (copy / journal_module.LOCK).write_text("")
    checkpoint = open_checkpoint(copy)
    check_written(checkpoint.save(tmp_path / "out").folder, checkpoint.tensors)


def broken_norm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = dict(tensors)
    if "model.norm.weight" in found:
        found["model.norm.weight"] = found["model.norm.weight"].clone()
        found["model.norm.weight"][200] = torch.nan
    return found


@pytest.mark.parametrize(
    "merge", [{"weights": {"reasoner": 0.5}}, {"weights": {"reasoner": 1.0}, "select": ("mtp",)}]
)
def test_a_manifest_is_json_even_with_nan_in_a_parent(
    parents: dict[str, Path], tmp_path: Path, merge: dict[str, Any]
) -> None:
    copy = change_shards(shutil.copytree(parents["reasoner"], tmp_path / "reasoner"), broken_norm)
    opened = {"base": open_checkpoint(parents["base"], "base"), "reasoner": open_checkpoint(copy, "reasoner")}
    result = (
        AssemblyOfExperts(base="base", **merge).apply(opened).save(tmp_path / "out", allow_nonfinite=True)
    )
    strict_manifest(result.folder)


def test_an_infinite_threshold_is_refused() -> None:
    """It would be no JSON in the manifest, and leaving the step out says the same."""
    with pytest.raises(ValidationError, match="finite"):
        AssemblyOfExperts(base="base", weights={"reasoner": 0.5}, threshold=float("inf"))


def test_nan_and_infinity_in_what_is_copied(parents: dict[str, Path], tmp_path: Path) -> None:
    copy = change_shards(shutil.copytree(parents["base"], tmp_path / "base"), broken_norm)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of base holds NaN") as caught:
        open_checkpoint(copy, "base").save(tmp_path / "out")
    assert "allow_nonfinite" in caught.value.hint
    assert not (tmp_path / "out").exists()
    result = open_checkpoint(copy, "base").save(tmp_path / "out", allow_nonfinite=True, fresh=True)
    assert oracle.read_folder(result.folder) == oracle.read_folder(copy)


@pytest.mark.parametrize("chunk", [4100, 8 << 20])
def test_nan_at_any_place_of_a_long_copy_is_found(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Whatever tensor of a shard holds it, first or last value, whole or cut into chunks."""
    monkeypatch.setattr(jobs, "CHUNK", chunk)
    copy = shutil.copytree(parents["base"], tmp_path / "base")
    for shard in sorted(copy.glob("*.safetensors")):
        tensors = load_file(shard)
        raw = bytearray(shard.read_bytes())
        header = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + header])
        for name in [*tensors][::7]:
            begin, end = (8 + header + each for each in table[name]["data_offsets"])
            size = tensors[name].element_size()
            bits = {"F8_E4M3": b"\x7f", "BF16": b"\xc0\x7f", "F32": b"\x00\x00\x80\x7f"}[table[name]["dtype"]]
            for place in (begin, end - size):
                changed = raw[:place] + bits + raw[place + size :]
                shard.write_bytes(changed)
                with pytest.raises(CheckpointError, match=f"^{name} of "):
                    open_checkpoint(copy).save(tmp_path / "out", fresh=True, hash=False)
        shard.write_bytes(raw)
        break


def test_a_parent_that_changes_size_meanwhile_is_named(parents: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(parents["base"], tmp_path / "base")
    whole = open_checkpoint(copy)
    shard = sorted(copy.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=shard.name):
        whole.save(tmp_path / "out")


def test_options_that_do_not_exist_are_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        open_checkpoint(parents["base"]).save(tmp_path / "out", shards=3)
    assert SaveOptions().settings().keys() == {"format", "shard_bytes", "hash", "allow_nonfinite"}


def test_small_dense_models_pass_through_unchanged(tmp_path: Path) -> None:
    for factory in (factories.llama, factories.qwen3_moe, factories.gpt_oss_mxfp4, factories.llama4_text):
        folder = factory(tmp_path / factory.__name__, 1)
        checkpoint = open_checkpoint(folder)
        result = checkpoint.save(tmp_path / f"{factory.__name__}-out", shard_bytes=60_000)
        assert oracle.read_folder(result.folder) == oracle.read_folder(folder)
        check_written(result.folder, checkpoint.tensors)
