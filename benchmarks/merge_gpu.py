"""Merging on a machine with a GPU: lambda = 0.5 on all tensors of FP8 parents, by --device cpu and cuda.

    python benchmarks/merge_gpu.py [--repeat N] [--work DIR]

Pairs of two sizes are merged, so that what they differ by is free of the start of Python, torch and CUDA.
Times are medians and include the sync of what was written; the page cache is warm. Needs 40 GB of disk.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from merge import Bench, Row, machine, markdown, weight_files


def compare(bench: Bench) -> list[Row]:
    small, large = bench.parents("v3-half"), bench.parents("v3-sample", gb=8)
    recipes = {parents: bench.recipe(parents, 0.5, "all") for parents in (small, large)}
    out, sizes = bench.work / "child", {}
    times: dict[tuple[Path, str], list[float]] = {}
    for _ in range(bench.repeat):
        for parents, recipe in recipes.items():
            times.setdefault((parents, "cp"), []).append(bench.copy(parents / "base", out))
            for device in ("cpu", "cuda"):
                found = bench.run(recipe, out, "--no-hash", "--device", device)
                times.setdefault((parents, device), []).append(found.seconds)
            sizes[parents] = weight_files(out)[1]
    shutil.rmtree(out)
    weights = sizes[large] - sizes[small]
    net = {
        way: statistics.median(times[large, way]) - statistics.median(times[small, way])
        for way in ("cp", "cpu", "cuda")
    }
    rows = [Row("gpu", "cp + sync, net", net["cp"], "s", note=f"{weights / 1e9:.2f} Gweights")]
    for device in ("cpu", "cuda"):
        rows += [
            Row("gpu", f"run --no-hash, {device}", statistics.median(times[large, device]), "s"),
            Row("gpu", f"weights per second, net, {device}", weights / net[device] / 1e9, "Gweights/s"),
            Row("gpu", f"net, to cp, {device}", net[device] / net["cp"], "x"),
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        rows = compare(Bench(Path(work), arguments.repeat))
    print(torch.cuda.get_device_name())
    print(markdown(rows, machine(), datetime.now(UTC).date().isoformat(), arguments.repeat))


if __name__ == "__main__":
    main()
