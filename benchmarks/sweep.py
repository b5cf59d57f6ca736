"""What a sweep costs beside one run: eleven children, λ = 0 to 1, evaluation aside.

    python benchmarks/sweep.py [--repeat N] [--work DIR] [--model FOLDER FOLDER]

    one run     λ = 0.5, until it is on disk, start-up included
    sweep       the eleven children in one command, on all tensors and on the routed experts
    runs        the same children by eleven commands
    cp          `cp` + sync of as many bytes as the sweep on all tensors writes

The parents are a pair of 0.69 GB (`v3-half` of synthetic.py) or those that are given. Point --work at a
folder in memory (/dev/shm) to take the disk out. Needs 10 GB there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from merge import Bench, Row, hold_to_two_cores, machine, markdown, measure, surgery, sync

CHILDREN = 11


def timed(work: Callable[[], object], out: Path) -> float:
    """Seconds of the work and of the sync of what it left in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    work()
    sync(out)
    return time.perf_counter() - start


def sweep(recipe: Path, out: Path, select: str) -> None:
    over = ("--over", "steps.0.weights.other=0:1:0.1", "--select-over", select)
    surgery("sweep", str(recipe), "-o", str(out), "--quiet", *over)


def runs(recipe: Path, out: Path) -> None:
    for tenth in range(CHILDREN):
        weight = f"steps.0.weights.other={tenth / 10}"
        surgery("run", str(recipe), "-o", str(out / str(tenth)), "--quiet", "--set", weight)


def copies(parent: Path, out: Path) -> None:
    out.mkdir()
    for number in range(CHILDREN):
        measure(["cp", "-R", str(parent), str(out / str(number))])


def compare(bench: Bench, parents: Path, name: str) -> list[Row]:
    recipe = bench.recipe(parents, 0.5, "all")
    out = bench.work / "out"
    work: dict[str, Callable[[], object]] = {
        "one run": lambda: surgery("run", str(recipe), "-o", str(out), "--quiet"),
        "sweep, all tensors": lambda: sweep(recipe, out, "all"),
        "sweep, routed experts": lambda: sweep(recipe, out, "routed"),
        "eleven runs": lambda: runs(recipe, out),
        "eleven cp + sync": lambda: copies(parents / "base", out),
    }
    seconds: dict[str, list[float]] = {key: [] for key in work}
    for _ in range(bench.repeat):
        for key, each in work.items():  # interleaved, so that a slow minute meets all
            seconds[key].append(timed(each, out))
    shutil.rmtree(out)
    found = {key: statistics.median(times) for key, times in seconds.items()}
    rows = [Row(name, key, value, "s") for key, value in found.items()]
    for key in ("sweep, all tensors", "sweep, routed experts"):
        rows.append(Row(name, f"{key}, to one run", found[key] / found["one run"], "x", 4.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a sweep of eleven children against one run.")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--model", type=Path, nargs=2, metavar="FOLDER", help="a base and another parent")
    arguments = parser.parse_args()
    hold_to_two_cores()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="sweep-") as work:
        bench = Bench(Path(work), arguments.repeat)
        if arguments.model:
            parents = bench.work / "given"
            parents.mkdir()
            for name, model in zip(("base", "other"), arguments.model, strict=True):
                shutil.copytree(model, parents / name)
        else:
            parents = bench.parents("v3-half")
        rows = compare(bench, parents, parents.name)
    print(markdown(rows, machine(), datetime.now(UTC).date().isoformat(), arguments.repeat))


if __name__ == "__main__":
    main()
