"""Speed and memory of merging, each figure a ratio to a reference measured in the same run.

    python benchmarks/merge.py [--case NAME]... [--repeat N] [--work DIR] [--keep] [--json]

    chimera     byte copy of the routed experts, with and without hashing    against `cp` + sync of as much
    half        lambda = 0.5 on every tensor of two FP8 parents              weights per second, against `cp`
    many-small  lambda = 0.5 on 18,867 small bf16 tensors                    against plain_loop.py
    plan-full   `plan` of two whole DeepSeek-V3 parents                      seconds and memory
    memory      lambda = 0.5 with a 1.5 GB tensor, --memory 256MB            peak memory

Times are medians and include the sync of what was written; start-up, measured as `surgery plan` of the same
recipe, is taken out where the table says "net". Memory is the largest peak RSS of the process. The page cache
is warm: the parents are read before anything is timed. Everything runs on two cores and needs at most 20 GB
of disk, and 12 GB of memory for the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MB = 1_000_000
BUDGET_MB, ALLOWANCE_MB = 256, 320


@dataclass(frozen=True)
class Usage:
    """One finished process: wall seconds, peak RSS, what it printed."""

    seconds: float
    peak_bytes: int
    stdout: str


@dataclass(frozen=True)
class Row:
    """One line of the table; `target` is an upper bound, None where the figure is only reported."""

    case: str
    figure: str
    value: float
    unit: str
    target: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """Where to work and how often to repeat."""

    work: Path
    repeat: int

    def parents(self, case: str, gb: float | None = None) -> Path:
        """Folder with `base` and `other`, written on first use, read into the page cache unless sparse."""
        folder = self.work / (case if gb is None else f"{case}-{gb:g}")
        if not folder.exists():
            say(f"writing {folder.name}")
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            size = () if gb is None else ("--gb", str(gb))
            measure([sys.executable, str(HERE / "synthetic.py"), case, str(part), *size])
            part.rename(folder)
        if case != "v3-full":
            for path in folder.rglob("*.safetensors"):
                with path.open("rb", buffering=0) as file:
                    while file.read(16 * MB):
                        pass
        return folder

    def recipe(self, parents: Path, weight: float, select: str) -> Path:
        """The recipe of a two-parent merge, as a file."""
        path = self.work / f"{parents.name}-{weight}.yaml"
        step = {"op": "merge.aoe", "base": "base", "weights": {"other": weight}, "select": [select]}
        recipe = {
            "parents": {name: str(parents / name) for name in ("base", "other")},
            "steps": [step],
            "output": {"format": "source"},
        }
        path.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
        return path

    def plans(self, recipe: Path) -> list[Usage]:
        return [surgery("plan", str(recipe), "--json") for _ in range(self.repeat)]

    def run(self, recipe: Path, out: Path, *options: str) -> Usage:
        """`surgery run` into a fresh folder, until the child is on disk."""
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        usage = surgery("run", str(recipe), "-o", str(out), "--quiet", *options)
        sync(out)
        return Usage(time.perf_counter() - start, usage.peak_bytes, usage.stdout)

    def copy(self, parent: Path, out: Path) -> float:
        """Seconds of `cp` + sync of a parent, which has as many bytes as the child.

        Not of the child: copying what was just written was measured at up to three times the time, which
        would flatter us. Like `run`, it writes where a folder of the same size has just been removed.
        """
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        measure(["cp", "-R", str(parent), str(out)])
        sync(out)
        return time.perf_counter() - start


def chimera(bench: Bench) -> list[Row]:
    parents, out = bench.parents("v3-sample"), bench.work / "child"
    recipe = bench.recipe(parents, 1.0, "routed_expert")
    plan = median(bench.plans(recipe))
    bench.copy(parents / "base", out)  # not timed: the first large write to a disk may be much slower
    plain: list[Usage] = []
    hashed: list[Usage] = []
    copies: list[float] = []
    for _ in range(bench.repeat):
        # Interleaved, so that a slow minute of the disk meets all three.
        copies.append(bench.copy(parents / "base", out))
        plain.append(bench.run(recipe, out, "--no-hash"))
        hashed.append(bench.run(recipe, out))
    copy = statistics.median(copies)
    size = f"child of {weight_files(out)[0] / 1e9:.2f} GB"
    shutil.rmtree(out)
    return [
        Row("chimera", "cp + sync", copy, "s", note=size),
        Row("chimera", "plan", plan, "s"),
        Row("chimera", "run --no-hash", median(plain), "s"),
        Row("chimera", "run", median(hashed), "s"),
        Row("chimera", "run --no-hash, net, to cp", (median(plain) - plan) / copy, "x", 1.25),
        Row("chimera", "run, net, to cp", (median(hashed) - plan) / copy, "x", 1.6),
        Row("chimera", "peak RSS", peak([*plain, *hashed]) / MB, "MB", 300),
    ]


def half(bench: Bench) -> list[Row]:
    parents, out = bench.parents("v3-sample"), bench.work / "child"
    recipe = bench.recipe(parents, 0.5, "all")
    plan = median(bench.plans(recipe))
    bench.copy(parents / "base", out)
    runs: list[Usage] = []
    copies: list[float] = []
    for _ in range(bench.repeat):
        copies.append(bench.copy(parents / "base", out))
        runs.append(bench.run(recipe, out, "--no-hash"))
    copy, net = statistics.median(copies), median(runs) - plan
    size, weights = weight_files(out)
    shutil.rmtree(out)
    return [
        Row("half", "cp + sync", copy, "s", note=f"child of {size / 1e9:.2f} GB"),
        Row("half", "plan", plan, "s"),
        Row("half", "run --no-hash", median(runs), "s"),
        Row("half", "weights per second, net", weights / net / 1e9, "Gweights/s"),
        Row("half", "run --no-hash, net, to cp", net / copy, "x"),
        Row("half", "peak RSS", peak(runs) / MB, "MB"),
    ]


def many_small(bench: Bench) -> list[Row]:
    parents = bench.parents("many-small")
    recipe = bench.recipe(parents, 0.5, "all")
    out, loop_out = bench.work / "child", bench.work / "loop"
    plan = median(bench.plans(recipe))
    runs: list[Usage] = []
    loops: list[float] = []
    for _ in range(bench.repeat):
        runs.append(bench.run(recipe, out))
        os.sync()
        folders = [str(parents / "base"), str(parents / "other"), str(loop_out)]
        loops.append(float(measure([sys.executable, str(HERE / "plain_loop.py"), *folders]).stdout))
        shutil.rmtree(loop_out)
    loop = statistics.median(loops)
    shutil.rmtree(out)
    return [
        Row("many-small", "plain loop", loop, "s", note="without the start of Python and torch"),
        Row("many-small", "plan", plan, "s"),
        Row("many-small", "run", median(runs), "s"),
        Row("many-small", "run, net, to the plain loop", (median(runs) - plan) / loop, "x", 3.0),
        Row("many-small", "peak RSS", peak(runs) / MB, "MB"),
    ]


def plan_full(bench: Bench) -> list[Row]:
    plans = bench.plans(bench.recipe(bench.parents("v3-full"), 1.0, "routed_expert"))
    return [
        Row("plan-full", "plan", median(plans), "s", 5.0),
        Row("plan-full", "peak RSS", peak(plans) / MB, "MB", 500),
    ]


def memory(bench: Bench) -> list[Row]:
    recipe = bench.recipe(bench.parents("one-big"), 0.5, "all")
    out = bench.work / "child"
    runs = [bench.run(recipe, out, "--memory", f"{BUDGET_MB}MB", "--no-hash") for _ in range(bench.repeat)]
    size = f"child of {weight_files(out)[0] / 1e9:.2f} GB"
    shutil.rmtree(out)
    return [
        Row("memory", f"run --memory {BUDGET_MB}MB --no-hash", median(runs), "s", note=size),
        Row("memory", "peak RSS", peak(runs) / MB, "MB", BUDGET_MB + ALLOWANCE_MB),
    ]


CASES: dict[str, Callable[[Bench], list[Row]]] = {
    "chimera": chimera,
    "half": half,
    "many-small": many_small,
    "plan-full": plan_full,
    "memory": memory,
}


def surgery(*arguments: str) -> Usage:
    return measure([sys.executable, "-m", "surgery", *arguments])


def measure(command: Sequence[str]) -> Usage:
    """Run to the end; the peak is the process's own.

    On Linux a child's peak starts at its parent's size, so this script imports no torch and no numpy.
    """
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.wait()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode != 0:
            raise SystemExit(
                f"{' '.join(command)}\nexited with {process.returncode}:\n{stderr.read()[-3000:]}"
            )
        unit = 1 if sys.platform == "darwin" else 1024
        return Usage(seconds, usage.ru_maxrss * unit, stdout.read())


def sync(folder: Path) -> None:
    """Wait until the folder's files are on disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def weight_files(folder: Path) -> tuple[int, int]:
    """Bytes of the folder's safetensors files, and the weights in them (scales are not weights)."""
    size = weights = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        size += path.stat().st_size
        weights += sum(prod(entry["shape"]) for name, entry in header.items() if is_weight(name))
    return size, weights


def is_weight(name: str) -> bool:
    return name != "__metadata__" and not name.endswith("_scale_inv")


def median(usages: Sequence[Usage]) -> float:
    return statistics.median(usage.seconds for usage in usages)


def peak(usages: Sequence[Usage]) -> int:
    return max(usage.peak_bytes for usage in usages)


def machine() -> dict[str, str]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return {
        "cpu": model,
        "cores": str(cores()),
        "memory": f"{gigabytes:.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hold_to_two_cores() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])


def verdict(row: Row) -> str:
    if row.target is None:
        return ""
    return "met" if row.value <= row.target else "missed"


def markdown(rows: Sequence[Row], where: dict[str, str], date: str, repeat: int) -> str:
    about = f"{where['cpu']}, {where['cores']} cores, {where['memory']}, {where['system']}"
    lines = [
        f"{date}. {about}; Python {where['python']}, torch {where['torch']}. Repetitions: {repeat}.",
        "",
        "| case | figure | measured | target | | note |",
        "|---|---|---:|---:|---|---|",
    ]
    for row in rows:
        target = "" if row.target is None else f"≤ {row.target:g} {row.unit}"
        cells = [row.case, row.figure, f"{row.value:.3g} {row.unit}", target, verdict(row), row.note]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Speed and memory of merging, against references of the same run."
    )
    parser.add_argument(
        "--case", action="append", choices=list(CASES), help="repeat for several; default: all"
    )
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each measurement")
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="scratch folder")
    parser.add_argument("--keep", action="store_true", help="keep the parents for the next run")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    arguments = parser.parse_args()
    hold_to_two_cores()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.work.resolve(), arguments.repeat)
    before = set(bench.work.iterdir())
    rows: list[Row] = []
    try:
        for case in arguments.case or list(CASES):
            say(f"measuring {case}")
            rows += CASES[case](bench)
    finally:
        if not arguments.keep:
            for path in set(bench.work.iterdir()) - before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    where, date = machine(), datetime.now(UTC).strftime("%Y-%m-%d")
    if arguments.json:
        lines: list[dict[str, Any]] = [asdict(row) | {"verdict": verdict(row)} for row in rows]
        print(
            json.dumps({"date": date, "machine": where, "repeat": arguments.repeat, "rows": lines}, indent=2)
        )
    else:
        print(markdown(rows, where, date, arguments.repeat))


if __name__ == "__main__":
    main()
