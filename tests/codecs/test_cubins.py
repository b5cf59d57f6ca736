"""What nvcc makes of the CUDA kernels: no spills where none are claimed, and 16-byte accesses to memory."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from surgery.codecs.compile import NVCC_FLAGS, find_compiler
from surgery.errors import SurgeryError
from surgery.resources import kernel_folder

pytestmark = pytest.mark.slow
FREE = (
    "awq", "blocks", "counting", "decode", "divergence", "draw", "encode", "fp8_encode", "fp8_sums",
    "magnitude", "nibbles", "packed", "statistics", "sweep",
)  # fmt: skip
"""Sources whose kernels are said to spill nothing at sm_90a (kernels/README.md)."""
WIDE = {
    "awq": ("LDG.E.EF.128", "STG.E.EF.128"),
    "blocks": ("LDG.E.EF.128", "STG.E.EF.128"),
    "decode": ("STG.E.EF.128",),
    "encode": ("LDG.E.EF.128",),
    "fp8_encode": ("LDG.E.EF.128",),
    "fp8_sums": ("LDGSTS.E.BYPASS.128", "STG.E.EF.128"),
    "magnitude": ("LDG.E.EF.128", "STG.E.EF.128"),
    "nibbles": ("LDG.E.EF.128",),
    "packed": ("STG.E.EF.128",),
    "sweep": ("LDG.E.128", "STG.E.128"),
}
"""Accesses to global memory that every kernel of a source makes at sm_90a, where its rows are aligned. Passes
of merge methods are not here: eight neighbours in FP8 are eight bytes, and sums go down four columns."""

CONVERTED = {
    "decode": (2, 0), "blocks": (12, 8), "fp8_encode": (0, 2), "fp8_sums": (5, 4), "merge": (12, 9),
    "counting": (4, 0), "statistics": (8, 0),
}  # fmt: skip
"""Kernels of a source that read e4m3 codes, and those that make them: of FP8 parents or any, to FP8."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, str]]:
    """From a source and a target to the code and what ptxas says of it, each built once."""
    try:
        nvcc = find_compiler("cuda")
        find_compiler("cpu")  # which nvcc calls
    except SurgeryError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cubins")

    @cache
    def build(source: str, target: str) -> tuple[Path, str]:
        into = folder / f"{source}-{target}.cubin"
        code = f"-gencode=arch=compute_{target},code=sm_{target}"
        text = str(kernel_folder() / "cuda" / f"{source}.cu")
        command = (nvcc, *NVCC_FLAGS, code, "-cubin", "-Xptxas", "-v", text, "-o", str(into))
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return into, done.stderr

    return build


def spills(told: str) -> dict[str, int]:
    """Bytes stored and loaded again, by kernel, functions that it calls included."""
    found: dict[str, int] = {}
    for piece in told.split("Compiling entry function '")[1:]:
        counts = re.findall(r"(\d+) bytes spill (?:stores|loads)", piece)
        assert counts, piece
        found[piece.split("'")[0]] = sum(map(int, counts))
    return found


def cuobjdump() -> str | None:
    """CUDA's own, or the one that triton brings along."""
    spec = importlib.util.find_spec("triton")
    folders = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    brought = [folder / "backends" / "nvidia" / "bin" / "cuobjdump" for folder in folders]
    return shutil.which("cuobjdump") or next((str(path) for path in brought if path.is_file()), None)


def accesses(tool: str, cubin: Path) -> dict[str, set[str]]:
    """Instructions that access memory, by kernel."""
    done = subprocess.run(
        (tool, "-sass", str(cubin)), capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        pytest.skip(f"{tool} fails: {done.stderr.strip()[:200]}")
    found: dict[str, set[str]] = {}
    for piece in done.stdout.split("Function : ")[1:]:
        found[piece.split()[0]] = set(re.findall(r"\b(?:LD|ST)[A-Z]+(?:\.[A-Z0-9]+)*", piece))
    return found


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *((source, "90a") for source in FREE),
        *((source, "80") for source in ("packed", "fp8_sums", "encode", "nibbles")),
    ],
)
def test_nothing_spills(compiled: Callable[[str, str], tuple[Path, str]], source: str, target: str) -> None:
    found = spills(compiled(source, target)[1])
    assert found, "no kernel"
    assert not {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("source", WIDE)
def test_memory_is_accessed_16_bytes_at_a_time(
    compiled: Callable[[str, str], tuple[Path, str]], source: str
) -> None:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump, in PATH or with triton")
    found = accesses(tool, compiled(source, "90a")[0])
    assert found, "no kernel"
    for name, used in found.items():
        assert used.issuperset(WIDE[source]), f"{name}: {sorted(used)}"
        if source in FREE:
            assert not [each for each in used if each.startswith(("LDL", "STL"))], name


@pytest.mark.parametrize("target", ["89", "90a"])
@pytest.mark.parametrize("source", CONVERTED)
def test_codes_are_converted_by_the_hardware(source: str, target: str, tmp_path: Path) -> None:
    """From sm_89 on it has instructions for that, which PTX names."""
    try:
        nvcc = find_compiler("cuda")
        find_compiler("cpu")
    except SurgeryError as error:
        pytest.skip(str(error))
    into, code = tmp_path / "code.ptx", f"-gencode=arch=compute_{target},code=compute_{target}"
    text = str(kernel_folder() / "cuda" / f"{source}.cu")
    command = (nvcc, *NVCC_FLAGS, code, "-ptx", text, "-o", str(into))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kernels = into.read_text().split(".entry ")[1:]
    reads = sum("cvt.rn.f16x2.e4m3x2" in each for each in kernels)
    writes = sum("cvt.rn.satfinite.e4m3x2.f32" in each for each in kernels)
    assert (reads, writes) == CONVERTED[source]
