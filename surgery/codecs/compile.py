"""Build the native kernels on first use, into a cache keyed by sources, flags, compiler and target.

CPU: one library holding three builds of the same loops (portable, AVX2, AVX-512), so that a cache on a
shared disk serves every machine. CUDA: one library per architecture, or one for all six with PTX. A
build goes to a temporary name and is renamed, so that concurrent processes only repeat work.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.resources import kernel_folder

CUDA_TARGETS = ("80", "86", "89", "90a", "100a", "120")
CXX_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC")
SETS = {
    "portable": (),
    "avx2": ("-mavx2",),
    "avx512": (
        "-mavx2",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mprefer-vector-width=512",
    ),
}
LOOPS = ("blocks", "sweep", "packed", "awq", "encode", "merge", "magnitude")
"""Sources that are built once for each instruction set."""
ENTRIES = ("entry", "merge_entry")
TIMEOUT_S = 600


def cache_folder() -> Path:
    """Where built libraries lie: $XDG_CACHE_HOME (~/.cache) / llm-surgery / kernels."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "llm-surgery" / "kernels"


def find_compiler(kind: str) -> str:
    """Path of the C++ compiler ("cpu": $CXX, g++, clang++) or of nvcc ("cuda"). Raises SurgeryError."""
    names = (os.environ.get("CXX") or "g++", "clang++") if kind == "cpu" else ("nvcc",)
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None and kind == "cuda" and Path("/usr/local/cuda/bin/nvcc").is_file():
        found = "/usr/local/cuda/bin/nvcc"
    if found is None:
        raise SurgeryError(f"no {' or '.join(names)} in PATH", hint="install one for native kernels")
    return found


def compiler_version(compiler: str) -> str:
    """Last line of nvcc's, first line of other compilers' `--version`."""
    lines = _run((compiler, "--version")).strip().splitlines()
    return lines[-1] if Path(compiler).name == "nvcc" else lines[0]


def cpu_library() -> Path:
    """The CPU library, built where the cache lacks it. Raises SurgeryError with the compiler's words."""
    compiler = find_compiler("cpu")
    source = kernel_folder() / "cpu"
    sets = tuple(SETS) if platform.machine() in ("x86_64", "AMD64") else ("portable",)
    target = _place("cpu", compiler, (*CXX_FLAGS, *(flag for name in sets for flag in SETS[name])))
    if target.is_file():
        return target
    with _workspace() as scratch:
        work = Path(scratch)
        commands = []
        for name in sets:
            defines = (f"-DSURGERY_SET={name}", f"-DSURGERY_MERGE=surgery_merge_{name}")
            for loops in LOOPS:
                unit = (str(source / f"{loops}.cpp"), "-o", str(work / f"{loops}-{name}.o"))
                commands.append((compiler, *CXX_FLAGS, *SETS[name], *defines, "-c", *unit))
        for entry in ENTRIES:
            unit = (str(source / f"{entry}.cpp"), "-o", str(work / f"{entry}.o"))
            commands.append((compiler, *CXX_FLAGS, "-c", *unit))
        _run_all(commands)
        objects = [str(path) for path in sorted(work.glob("*.o"))]
        _run((compiler, "-shared", "-pthread", *objects, "-o", str(work / target.name)))
        (work / target.name).replace(target)
    return target


def cuda_library(targets: Sequence[str] = CUDA_TARGETS) -> Path:
    """The CUDA library for these architectures (with PTX of the oldest, where all are asked for)."""
    compiler = find_compiler("cuda")
    codes = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in targets]
    if len(targets) > 1:
        codes.append(f"-gencode=arch=compute_{targets[0]},code=compute_{targets[0]}")
    flags = (*NVCC_FLAGS, *codes)
    target = _place("cuda", compiler, flags)
    if target.is_file():
        return target
    with _workspace() as scratch:
        work = Path(scratch)
        objects = {path: str(work / f"{path.stem}.o") for path in (kernel_folder() / "cuda").glob("*.cu")}
        _run_all([(compiler, *flags, "-c", str(path), "-o", each) for path, each in objects.items()])
        link = ("-shared", "-cudart=static", *sorted(objects.values()), "-o", str(work / target.name))
        _run((compiler, *flags, *link))
        (work / target.name).replace(target)
    return target


def _workspace() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="build-", dir=cache_folder())


def _place(kind: str, compiler: str, flags: Sequence[str]) -> Path:
    digest = hashlib.sha256()
    folder = kernel_folder()
    for path in sorted(p for sub in {"core", "cpu", kind} for p in (folder / sub).iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update("\0".join((*flags, compiler_version(compiler), platform.machine())).encode())
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SurgeryError(f"cannot make {cache_folder()}: {error.strerror}") from error
    return cache_folder() / f"{kind}-{digest.hexdigest()[:16]}.so"


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    """Side by side, as many as there are processors. Raises the error of the first that fails."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(_run, commands):
            pass


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SurgeryError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise SurgeryError(f"{command[0]} failed: {words[0] if words else f'exit code {done.returncode}'}")
    return done.stdout
