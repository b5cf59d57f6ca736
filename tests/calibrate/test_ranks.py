"""Two processes at one walk: the same bits as one, and only the first one writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import factories
import pytest
from folders import MANIFEST, file_hashes
from walk_models import Families, demos

import surgery
from surgery.calibrate.ranks import ONE_RANK, Ranks, started_ranks
from surgery.cli.app import main
from surgery.recipe import run as run_module


def test_who_this_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert started_ranks() == ONE_RANK and ONE_RANK.leads
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert started_ranks() == Ranks(1, 4) and not started_ranks().leads


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "surgery", "prune", str(model), "-o", str(out), "--calibration", str(data),
        "--set", "keep=0.5", "--threads", "1", "--quiet", *more,
    ]  # fmt: skip


def start(arguments: list[str], **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **env}
    )


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def run_together(model: Path, data: Path, out: Path, *more: str) -> list[tuple[int, str, str]]:
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return finish([start(command(model, data, out, *more), RANK=str(rank), **env) for rank in range(2)])


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit codes and what was said; none is left behind."""
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *each) for process, each in zip(processes, said, strict=True)]


def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    model = factories.deepseek_v3(tmp_path / "m", 2)
    data = demos(tmp_path / "d.jsonl")
    assert main(command(model, data, tmp_path / "one")[3:]) == 0
    said = run_together(model, data, tmp_path / "two")
    assert [code for code, *_ in said] == [0, 0], said
    assert said[1][1] == said[1][2] == ""
    one, two = (file_hashes(tmp_path / name) for name in ("one", "two"))
    differing = {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
    assert differing <= {"surgery_report.html", "SHA256SUMS", "README.md"}
    assert one["surgery_experts.json"] == two["surgery_experts.json"]
    manifests = [json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("one", "two")]
    assert manifests[0]["steps"][-1]["decision"] == manifests[1]["steps"][-1]["decision"]
    left = {path.name for path in tmp_path.iterdir()} - {"m"}
    assert left == {"one", "two", "d.jsonl"}


KILLED_AND_RESUMED = """
import sys
from pathlib import Path
import torch
from surgery.operators.protocol import RunContext
from surgery.recipe.load import recipe_from_dict
from surgery.recipe.run import follow_recipe, run_recipe
from surgery.calibrate.ranks import started_ranks
from surgery.stream.save import SaveOptions

torch.set_num_threads(1)
model, data, out, killed = sys.argv[1:]
step = {"op": "experts.easy_ep", "keep": 0.5, "calibration": data}
loaded = recipe_from_dict({"parents": {"model": model}, "steps": [step]})
run = run_recipe if started_ranks().leads else follow_recipe
told = []

def kill(stage, done, total):
    told.append(done)
    if len(told) == 3:
        raise KeyboardInterrupt

progress = kill if killed == "killed" else lambda stage, done, total: stage == "walk" and told.append(done)
try:
    run(loaded, Path(out), SaveOptions(threads=1, progress=progress), RunContext(snapshot_seconds=0))
except KeyboardInterrupt:
    assert not Path(out).exists()
print(len(told))
"""


def test_two_processes_resume_together(tiny: Families, tmp_path: Path) -> None:
    """Killed in front of the last of three layers, and started again: one layer is left to walk."""
    model, data = tiny("deepseek_v3"), demos(tmp_path / "d.jsonl")
    recipe = {"op": "experts.easy_ep", "keep": 0.5, "calibration": str(data)}
    surgery.run({"parents": {"model": str(model)}, "steps": [recipe]}, tmp_path / "one", threads=1)
    arguments = [sys.executable, "-c", KILLED_AND_RESUMED, str(model), str(data), str(tmp_path / "two")]
    for fate, told in (("killed", "3"), ("resumed", "2")):
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        said = finish([start([*arguments, fate], RANK=str(rank), **env) for rank in range(2)])
        assert [(code, out.strip()) for code, out, _ in said] == [(0, told)] * 2, said
    one, two = (file_hashes(tmp_path / name) for name in ("one", "two"))
    for name in ("model.safetensors", "config.json", "surgery_experts.json", "surgery_keep.json"):
        assert one[name] == two[name], name


def test_a_process_that_comes_late_finds_the_decision(
    tiny: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between walk and output, then started together, the second one long after the first."""
    model, data, out = tiny("mixtral"), demos(tmp_path / "d.jsonl"), tmp_path / "out"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save", stop)
        assert main(command(model, data, out)[3:]) == 130
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first = start(command(model, data, out), RANK="0", **env)
    time.sleep(3)
    said = finish([first, start(command(model, data, out), RANK="1", **env)])
    assert [code for code, *_ in said] == [0, 0], said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "out"]
