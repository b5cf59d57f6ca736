"""The reference for many small tensors: read two safetensors folders, average, write one file.

    python benchmarks/plain_loop.py A B OUT

Prints the seconds from the first read to the file written and synced, without Python's and torch's start.
The fastest form found: whole shards at once, one `lerp` a tensor (float32 inside, rounded once), one thread,
since the tensors are smaller than what a second thread costs.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def main() -> None:
    a, b, out = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    start = time.perf_counter()
    left, right = read(a), read(b)
    child = {name: torch.lerp(tensor, right[name], 0.5) for name, tensor in left.items()}
    out.mkdir()
    save_file(child, out / "model.safetensors", metadata={"format": "pt"})
    with (out / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
