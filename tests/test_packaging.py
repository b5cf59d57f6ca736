"""The wheel: one top-level package, recipes and kernels inside it, and a command that works elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"surgery"}
    for needed in (
        "surgery/_recipes/chimera.yaml",
        "surgery/_recipes/demo/problems.jsonl",
        "surgery/_kernels/README.md",
        "surgery/stream/architectures/deepseek.yaml",
        "surgery/report/report.html.j2",
    ):
        assert needed in names


def test_the_installed_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    here = tmp_path / "elsewhere"
    here.mkdir()

    def surgery(*arguments: str) -> str:
        command = [sys.executable, "-m", "surgery", *arguments]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    place = [sys.executable, "-c", "import surgery; print(surgery.__file__)"]
    found = subprocess.run(place, cwd=here, env=environment, capture_output=True, text=True, check=True)
    assert str(site) in found.stdout
    assert "chimera" in surgery("recipes", "ls")
    surgery("run", "demo/chimera", "-o", "child", "--quiet")
    assert "routed_expert" in surgery("inspect", "child")
