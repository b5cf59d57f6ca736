"""What a plan says a tile needs is at least what it takes, with kernels and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_writer import encode_fp8
from merge_methods import ALL, write

from surgery.codecs import native

NAME = "model.layers.0.mlp.up_proj.weight"
SMALL = "model.layers.0.mlp.down_proj.weight"
SHAPE = (512, 2048)
SLACK = 3 << 20
"""Python objects, small tensors and libraries' own buffers; a float32 tile is 4 MiB."""
SCRIPT = """
import json, sys
import torch
sys.path.insert(0, "tests")
from merge_methods import ALL, child
from surgery.stream.checkpoint import ReadContext
from surgery.stream.jobs import encode
from surgery.stream.source import open_checkpoint
from surgery.stream.workspace import tile_bytes

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))

torch.set_num_threads(1)
inputs = {label: open_checkpoint(f"{sys.argv[1]}/{label}", label) for label in ("base", "a", "b", "c")}
found = {}
for op, params in ALL.items():
    tensors = child(inputs, op, **params).tensors
    for name in sys.argv[2:]:  # a small one first, which loads libraries
        ref = tensors[name]
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = memory("VmRSS")
        encode(ref, 0, ref.rows, ReadContext())
        found[op] = [memory("VmHWM") - before, tile_bytes(ref, ref.rows)]
print(json.dumps(found))
"""


def stored(values: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    small = {SMALL: values[:128, :128].bfloat16()}
    if form == "fp8":
        codes, scales = encode_fp8(values)
        return {NAME: codes, f"{NAME}_scale_inv": scales, **small}
    return {NAME: values.bfloat16(), **small}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(("kernels", "form"), [("cpu", "bf16"), ("reference", "fp8")])
def test_tiles_take_no_more_than_planned(kernels: str, form: str, tmp_path: Path) -> None:
    if kernels == "cpu" and native.cpu().library is None:
        pytest.skip("no kernels")
    base = 0.02 * torch.randn(SHAPE)
    for label in ("base", "a", "b", "c"):
        write(tmp_path / label, stored(base + (label != "base") * 0.01 * torch.randn(SHAPE), form))
    # Blocks from 64 KiB on go back to the system when they are freed, so that the peak is that of live ones.
    settings = {**os.environ, "SURGERY_KERNELS": kernels, "MALLOC_MMAP_THRESHOLD_": "65536"}
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), SMALL, NAME],
        cwd=root, env={**settings, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found.keys() == ALL.keys()
    over = {op: pair for op, pair in found.items() if pair[0] > pair[1] + SLACK}
    assert not over
    if kernels == "reference":
        assert all(planned < 4 * taken + SLACK for taken, planned in found.values()), found
