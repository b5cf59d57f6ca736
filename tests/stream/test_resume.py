"""Killed at any moment, a run leaves inputs whole and nothing half-published, and resumes to equal files.

One process does the killing: it forks a child for every moment, lets it save until it kills itself there,
looks at what is left, and forks another that makes the same call. Each kill is a SIGKILL of a process, at the
price of one start.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import change_config, check_written, file_hashes

from surgery.errors import CheckpointError, PlanError
from surgery.operators.merge.aoe import AssemblyOfExperts
from surgery.stream import journal as journal_module
from surgery.stream.checkpoint import Checkpoint
from surgery.stream.source import open_checkpoint

SHARD = 1_000_000
MERGES: dict[str, dict[str, Any]] = {
    "chimera": {"weights": {"reasoner": 1.0}, "select": ("routed_expert",)},
    "half": {"weights": {"reasoner": 0.5}},
}
SHARDS = 5
EVENTS = SHARDS + 2
RENAMES = SHARDS + 1
TEXTS = 11
"""Seven side files, index, card, sums, manifest."""

MOMENTS = [
    *(f"journal-{when}:{n}" for n in range(EVENTS) for when in ("before", "after", "torn")),
    *(f"rename-{when}:{n}" for n in range(RENAMES) for when in ("before", "after")),
    *(f"pwrite-half:{n}" for n in (0, 1, 3, 8, 13)),
    *(f"text-half:{n}" for n in (0, 4, 7, 8, 9, 10)),
]
LAST = f"rename-after:{RENAMES - 1}"
FEW = [moment for moment in MOMENTS if moment.startswith(("journal-after", "pwrite"))]
KILLS = {"chimera": MOMENTS, "half": FEW}

HARNESS = """
import json, os, shutil, signal, sys, hashlib, threading
from pathlib import Path
import test_resume as tests
from surgery.stream import journal, save

folder, name = Path(sys.argv[1]), sys.argv[3]
parents, moments = json.loads(sys.argv[2]), json.loads(sys.argv[4])
overwrite = sys.argv[5] == "overwrite"
if name != "chimera":
    import torch

class Killer:
    def __init__(self, moment):
        kind, at = moment.split(":")
        self.what, self.when = kind.split("-")
        self.at, self.seen, self.lock = int(at), 0, threading.Lock()
    def around(self, what, real, half):
        def call(*args, **options):
            with self.lock:
                mine = what == self.what and self.seen == self.at
                self.seen += what == self.what
            if mine and self.when in ("before", "half", "torn"):
                if self.when != "before":
                    half(*args, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **options)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call

def torn(self, event):
    line = json.dumps(event).encode()
    self._file.write(line[: len(line) // 2])
    self._file.flush()

def arm(moment):
    killer = Killer(moment)
    pwrite, rename, text = os.pwrite, os.rename, save._write_bytes
    half = lambda path, data: path.write_bytes(data[: len(data) // 2])
    journal.Journal.append = killer.around("journal", journal.Journal.append, torn)
    os.rename = killer.around("rename", rename, None)
    os.pwrite = killer.around("pwrite", pwrite, lambda fd, data, at: pwrite(fd, data[: len(data) // 2], at))
    save._write_bytes = killer.around("text", text, half)

def fork(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]

def look(place):
    return {
        path.name: [path.stat().st_ino, path.stat().st_mtime_ns]
        for path in sorted(place.glob("*.safetensors"))
    } if place.is_dir() else {}

def hashes(place):
    return tests.file_hashes(place) if place.is_dir() else None

def journaled(work):
    lines = (work / journal.NAME).read_bytes().split(b"\\n")[:-1] if (work / journal.NAME).is_file() else []
    return sorted(event["shard"] for event in map(json.loads, lines) if event["event"] == "shard")

out = folder / "out"
work = folder / "out.partial"
parents = {label: Path(path) for label, path in parents.items()}
def run(moment=None):
    if moment:
        arm(moment)
    tests.child(parents, name).save(out, shard_bytes=tests.SHARD, threads=2, overwrite=overwrite)

def old():
    shutil.rmtree(out, ignore_errors=True)
    if overwrite:
        out.mkdir()
        (out / "old.txt").write_text("old")

for moment in moments:
    old()
    killed = fork(lambda: run(moment))
    found = {"moment": moment, "signal": killed & 0x7F, "out": hashes(out), "resumed": None}
    found["journaled"], found["before"] = journaled(work), look(work)
    found["again"] = fork(run)
    manifest = out / "surgery_manifest.json"
    if manifest.exists():
        found["resumed"] = json.loads(manifest.read_bytes())["run"]["resumed_shards"]
    found["after"], found["hashes"] = look(out), hashes(out)
    found["left"] = sorted(path.name for path in folder.iterdir())
    print(json.dumps(found), flush=True)
    shutil.rmtree(work, ignore_errors=True)
"""


def child(parents: dict[str, Path], name: str, **changes: Any) -> Checkpoint:
    opened = {label: open_checkpoint(path, label) for label, path in parents.items()}
    return AssemblyOfExperts(base="base", **{**MERGES[name], **changes}).apply(opened)


def killed_runs(
    parents: dict[str, Path], folder: Path, name: str, moments: list[str], mode: str = "new"
) -> dict[str, dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    listed = json.dumps({label: str(place) for label, place in parents.items()})
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(folder), listed, name, json.dumps(moments), mode],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {each["moment"]: each for each in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def whole(parents: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The hashes of runs that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    found = {}
    for name in MERGES:
        result = child(parents, name).save(folder / name, shard_bytes=SHARD)
        check_written(result.folder, child(parents, name).tensors)
        found[name] = file_hashes(result.folder)
    assert sum(file.endswith(".safetensors") for file in found["half"]) == SHARDS
    assert len(found["chimera"]) + 1 - SHARDS == TEXTS
    return found


@pytest.fixture(scope="module")
def killed(
    parents: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, dict[str, Any]]]:
    before = {label: file_hashes(path) for label, path in parents.items()}
    folder = tmp_path_factory.mktemp("killed")
    found = {name: killed_runs(parents, folder / name, name, moments) for name, moments in KILLS.items()}
    assert {label: file_hashes(path) for label, path in parents.items()} == before
    return found


@pytest.mark.parametrize(
    ("name", "moment"),
    [(name, moment) for name, moments in KILLS.items() for moment in moments if moment != LAST],
)
def test_killed_at_any_moment_the_same_call_finishes_with_equal_files(
    killed: dict[str, dict[str, dict[str, Any]]], whole: dict[str, dict[str, str]], name: str, moment: str
) -> None:
    found = killed[name][moment]
    assert found["signal"] == 9, "the moment never came"
    assert found["out"] is None, "something is under the output's name before it is whole"
    assert found["again"] == 0
    assert found["hashes"] == whole[name]
    assert found["left"] == ["out"]
    assert found["resumed"] == sorted(found["journaled"])
    for shard in found["journaled"]:
        assert found["after"][shard] == found["before"][shard], f"{shard} was written again"
    for shard in set(found["after"]) - set(found["journaled"]):
        assert found["after"][shard] != found["before"].get(shard), f"{shard} was not written again"


def test_kills_come_at_every_stage(killed: dict[str, dict[str, dict[str, Any]]]) -> None:
    counts = {len(found["journaled"]) for found in killed["chimera"].values()}
    assert counts == set(range(SHARDS + 1))


def test_killed_right_after_publishing_the_output_is_whole_and_clean(
    killed: dict[str, dict[str, dict[str, Any]]], whole: dict[str, dict[str, str]]
) -> None:
    found = killed["chimera"][LAST]
    assert found["signal"] == 9
    kept = {
        name: digest
        for name, digest in found["out"].items()
        if name not in ("surgery-journal.jsonl", "surgery-lock")
    }
    assert kept == whole["chimera"]
    assert found["hashes"] == whole["chimera"]


def test_an_output_that_is_replaced_is_whole_before_and_after(
    parents: dict[str, Path], whole: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    moments = [f"rename-{when}:{n}" for n in (SHARDS - 1, SHARDS, SHARDS + 1) for when in ("before", "after")]
    for moment, found in killed_runs(parents, tmp_path / "x", "chimera", moments, "overwrite").items():
        assert found["signal"] == 9, moment
        assert (
            found["out"] is None
            or set(found["out"]) == {"old.txt"}
            or set(whole["chimera"]) <= set(found["out"])
        )
        assert found["again"] == 0
        assert found["hashes"] == whole["chimera"], moment
        assert found["left"] == ["out"], moment


# What a resumed run must agree in, and what it may differ in


def unfinished(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, out: Path, **options: Any
) -> list[str]:
    """Stop a run when it has finished two shards; their names."""
    real = journal_module.Journal.append
    count = 0

    def append(self: Any, event: Any) -> None:
        nonlocal count
        real(self, event)
        count += event["event"] == "shard"
        if count == 2:
            raise CheckpointError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(journal_module.Journal, "append", append)
        with pytest.raises(CheckpointError, match="stopped"):
            checkpoint.save(out, **{"shard_bytes": SHARD, "threads": 1, **options})
    lines = (out.with_name(f"{out.name}.partial") / journal_module.NAME).read_bytes().splitlines()
    return sorted(event["shard"] for event in map(json.loads, lines) if event["event"] == "shard")


@pytest.mark.parametrize(
    "options", [{"threads": 3}, {"memory_bytes": 300_000_000}, {"progress": print}], ids=str
)
def test_threads_memory_and_progress_may_differ(
    parents: dict[str, Path], whole: dict[str, dict[str, str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any],
) -> None:  # fmt: skip
    done = unfinished(monkeypatch, child(parents, "half"), tmp_path / "out")
    result = child(parents, "half").save(tmp_path / "out", shard_bytes=SHARD, **options)
    assert result.manifest["run"]["resumed_shards"] == done
    assert file_hashes(result.folder) == whole["half"]


def test_a_resumed_manifest_is_equal_but_for_the_run(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(monkeypatch, child(parents, "half"), tmp_path / "first")
    manifests = [
        dict(child(parents, "half").save(tmp_path / name, shard_bytes=SHARD).manifest)
        for name in ("first", "second")
    ]
    runs = [manifest.pop("run") for manifest in manifests]
    assert manifests[0] == manifests[1]
    assert runs[0].keys() == runs[1].keys()


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(PlanError) as caught:
        call()
    assert caught.value.exit_code == 5
    assert "--fresh" in caught.value.hint
    for word in words:
        assert word in caught.value.message, caught.value.message


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"weights": {"reasoner": 0.25}}, {}, ["weights.reasoner", "0.5", "0.25"]),
        ({"select": ("routed_expert",)}, {}, ["select"]),
        ({"threshold": 0.1}, {}, ["threshold", "0.1"]),
        ({}, {"shard_bytes": SHARD + 1}, ["shard_bytes", str(SHARD)]),
        ({}, {"hash": False}, ["hash"]),
        ({}, {"allow_nonfinite": True}, ["allow_nonfinite"]),
        ({}, {"format": "bf16"}, ["format", "source", "bf16"]),
    ],
    ids=str,
)
def test_another_recipe_or_setting_is_refused_with_the_difference_and_fresh_starts_again(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], options: dict[str, Any], words: list[str],
) -> None:  # fmt: skip
    unfinished(monkeypatch, child(parents, "half"), tmp_path / "out")
    before = file_hashes(tmp_path / "out.partial")
    options = {"shard_bytes": SHARD, **options}
    refused(
        lambda: child(parents, "half", **changes).save(tmp_path / "out", **options), "out.partial", *words
    )
    assert file_hashes(tmp_path / "out.partial") == before
    result = child(parents, "half", **changes).save(tmp_path / "out", **options, fresh=True)
    assert result.manifest["run"]["resumed_shards"] == []
    assert not (tmp_path / "out.partial").exists()


def test_another_input_is_refused_with_the_difference(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = {label: shutil.copytree(path, tmp_path / label) for label, path in parents.items()}
    unfinished(monkeypatch, child(copies, "half"), tmp_path / "out")
    shard = sorted(copies["reasoner"].glob("*.safetensors"))[1]
    os.utime(shard, ns=(1, 1))
    refused(lambda: child(copies, "half").save(tmp_path / "out", shard_bytes=SHARD), shard.name, "mtime")
    shutil.rmtree(copies["reasoner"])
    shutil.copytree(parents["reasoner"], tmp_path / "elsewhere")
    elsewhere = {**copies, "reasoner": tmp_path / "elsewhere"}
    refused(lambda: child(elsewhere, "half").save(tmp_path / "out", shard_bytes=SHARD), "elsewhere")


def test_texts_of_a_resumed_run_are_those_of_today(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config and side files are small: they are written at the end, from what the base has then."""
    copies = {label: shutil.copytree(path, tmp_path / label) for label, path in parents.items()}
    unfinished(monkeypatch, child(copies, "half"), tmp_path / "out")
    change_config(copies["base"], rope_theta=20000.0)
    try:
        result = child(copies, "half").save(tmp_path / "out", shard_bytes=SHARD)
    except PlanError as error:
        assert "config.json" in error.message
        return
    assert json.loads((result.folder / "config.json").read_text())["rope_theta"] == 20000.0
    check_written(result.folder, child(copies, "half").tensors)


def test_a_copy_resumes_whatever_else_the_process_has_loaded(
    parents: dict[str, Path], whole: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Killed under the command line (no torch), resumed in a notebook (torch)."""
    listed = {label: str(path) for label, path in parents.items()}
    script = (
        "import os, sys\n"
        "from surgery.operators.merge.aoe import AssemblyOfExperts\n"
        "from surgery.stream.journal import Journal\n"
        "from surgery.stream.source import open_checkpoint\n"
        f"opened = {{label: open_checkpoint(path, label) for label, path in {listed!r}.items()}}\n"
        f"merge = AssemblyOfExperts(base='base', **{MERGES['chimera']!r}).apply(opened)\n"
        "real = Journal.append\n"
        "def append(self, event):\n"
        "    real(self, event)\n"
        "    if event['event'] == 'shard':\n"
        "        assert 'torch' not in sys.modules\n"
        "        os.kill(os.getpid(), 9)\n"
        "Journal.append = append\n"
        f"merge.save({str(tmp_path / 'out')!r}, shard_bytes={SHARD}, threads=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], timeout=60, check=False, capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == -9, done.stderr.decode()
    result = child(parents, "chimera").save(tmp_path / "out", shard_bytes=SHARD)
    # Others may have been journaled by their own threads before the signal came.
    assert len(result.manifest["run"]["resumed_shards"]) >= 1
    assert file_hashes(result.folder) == whole["chimera"]


# Damage to what a killed run has left


@pytest.mark.parametrize("damage", ["torn line", "torn start", "empty", "gone", "noise behind"])
def test_journals_with_damage_cost_shards_and_never_truth(
    parents: dict[str, Path], whole: dict[str, dict[str, str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, damage: str,
) -> None:  # fmt: skip
    done = unfinished(monkeypatch, child(parents, "half"), tmp_path / "out")
    path = tmp_path / "out.partial" / journal_module.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    expected = {"torn line": done[:1], "noise behind": done}.get(damage, [])
    match damage:
        case "torn line":
            path.write_bytes(b"".join(lines[:2]) + lines[2][:-10])
        case "torn start":
            path.write_bytes(lines[0][:50])
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
        case "noise behind":
            path.write_bytes(b"".join(lines) + b'{"event": "sha')
    result = child(parents, "half").save(tmp_path / "out", shard_bytes=SHARD)
    assert result.manifest["run"]["resumed_shards"] == expected
    assert file_hashes(result.folder) == whole["half"]


@pytest.mark.parametrize(
    "first", [b"3\n", b"[]\n", b"\0\0\0\0\n", b"{}\n", b'{"event": "start", "fingerprint": 3}\n']
)
def test_a_journal_that_is_none_is_refused_or_replaced(
    parents: dict[str, Path], tmp_path: Path, first: bytes
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / journal_module.NAME).write_bytes(first)
    try:
        child(parents, "chimera").save(tmp_path / "out")
    except PlanError as error:
        assert "--fresh" in error.hint


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_shards_that_have_suffered_are_written_again(
    parents: dict[str, Path], whole: dict[str, dict[str, str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, damage: str,
) -> None:  # fmt: skip
    done = unfinished(monkeypatch, child(parents, "half"), tmp_path / "out")
    shard = tmp_path / "out.partial" / done[0]
    if damage == "truncated":
        os.truncate(shard, 1000)
    else:
        shard.unlink()
    result = child(parents, "half").save(tmp_path / "out", shard_bytes=SHARD)
    assert result.manifest["run"]["resumed_shards"] == sorted(done[1:])
    assert file_hashes(result.folder) == whole["half"]


def test_a_run_that_ended_in_an_error_leaves_no_lock(parents: dict[str, Path], tmp_path: Path) -> None:
    """Within one process, as a notebook does it."""
    checkpoint = child(parents, "chimera")
    broken = checkpoint.replace(side_files={"x.txt": tmp_path / "absent"})
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(Exception, match="absent"):
            broken.save(tmp_path / "out", shard_bytes=SHARD)
    assert time.monotonic() - started < 20
