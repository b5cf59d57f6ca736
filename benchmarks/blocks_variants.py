"""Build, check and time variants of kernels/cuda/blocks.cu side by side, on a machine with a CUDA GPU.

    python benchmarks/blocks_variants.py [--size N] [--only NAME ...]

Each variant is a build with other constants, checked against the torch reference to the last bit (sums of
squares to 1e-12) and timed in a process of its own, so that one that fails leaves the others. Temporary: it
goes once the choice is made.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton

from surgery.codecs import native, ops, reference
from surgery.codecs.compile import NVCC_FLAGS, find_compiler
from surgery.codecs.ops import Operand

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "512x2, 3 slots": "THREADS=512",
    "512x2, 2 slots": "THREADS=512 SLOTS=2",
    "512x2, one block each": "THREADS=512 DIRECT=1",
    "512x1, 3 slots": "THREADS=512 RESIDENT=1",
    "256x2, 3 slots": "THREADS=256",
    "256x2, 2 slots": "THREADS=256 SLOTS=2",
    "256x3, 2 slots": "THREADS=256 RESIDENT=3 SLOTS=2",
    "256x3, one block each": "THREADS=256 RESIDENT=3 DIRECT=1",
    "512x2, squares x2": "THREADS=512 SQUARES_RESIDENT=2",
    "256x2, squares x2": "THREADS=256 SQUARES_RESIDENT=2",
    "512x2, squares x2, widen 2": "THREADS=512 SQUARES_RESIDENT=2 WIDEN=2",
    "256x2, squares x2, widen 2": "THREADS=256 SQUARES_RESIDENT=2 WIDEN=2",
    "512x2, widen 4": "THREADS=512 WIDEN=4",
}
SHAPES = [(129, 127), (300, 144), (1000, 1040)]


def build(settings: str, into: Path) -> str:
    major, minor = torch.cuda.get_device_capability()
    target = f"{major}{minor}" + ("a" if major in (9, 10) else "")
    defines = [f"-DSURGERY_{each}" for each in settings.split()]
    sources = [str(ROOT / "kernels" / "cuda" / name) for name in ("blocks.cu", "decode.cu")]
    flags = (*NVCC_FLAGS, f"-gencode=arch=compute_{target},code=sm_{target}", *defines)
    command = (find_compiler("cuda"), *flags, "-shared", "-cudart=static", *sources, "-o", str(into))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.stderr if done.returncode else ""


def use(path: str) -> None:
    library = ctypes.CDLL(path)
    library.surgery_cuda_combine.argtypes = (ctypes.POINTER(native.Combine), ctypes.c_void_p)
    library.surgery_cuda_error.restype = ctypes.c_char_p
    found = native.Native(library, "cuda variant")
    ops.library_for = lambda tensor: found if tensor.is_cuda else native.Native(None, "reference")


def same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    a, b = a.cpu(), b.cpu()
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan()), f"{what}: NaN elsewhere"
        ints = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.dtype]
        a, b = a.nan_to_num(0.0).view(ints), b.nan_to_num(0.0).view(ints)
    assert torch.equal(a, b), f"{what}: {int((a != b).sum())} of {a.numel()} differ"


def check() -> int:
    done = 0
    for shape in SHAPES:
        for magnitude in (1.0, 1e30, 1e-42):
            for broken in (False, True):
                values = [torch.randn(shape) * magnitude for _ in range(3)]
                values[0].view(-1)[0] = -0.0
                if broken:
                    values[0].view(-1)[-1] = torch.nan
                    values[0].view(-1)[values[0].numel() // 2] = torch.inf
                ue8m0 = magnitude == 1e30
                for each in (*values, values[1].bfloat16()):
                    found = ops.encode_fp8_block(each.cuda(), ue8m0=ue8m0)
                    want = reference.encode_fp8_block(each, ue8m0=ue8m0)
                    same(found[0], want[0], f"encode {shape} {magnitude} {each.dtype}")
                    same(found[1], want[1], f"scales {shape} {magnitude} {each.dtype}")
                    done += 1
                fp8 = [Operand(*reference.encode_fp8_block(v, ue8m0=False)) for v in values]
                bf16 = [Operand(v.bfloat16()) for v in values]
                plain = [Operand(v) for v in values]
                mixed = [fp8[0], bf16[1], plain[2]]
                for group in (fp8[:2], bf16[:2], fp8, bf16, plain[:2], mixed[:2], mixed):
                    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
                        weights = [0.5, 0.3, 0.2] if done % 3 else [0.0, 0.3, 0.7]
                        done += check_sum(group, weights[: len(group)], dtype, broken)
    return done


def check_sum(group: list[Operand], weights: list[float], dtype: torch.dtype, broken: bool) -> int:
    there = [Operand(p.values.cuda(), None if p.scales is None else p.scales.cuda()) for p in group]
    for squares in (False, True):
        got, sums = ops.assemble(there, weights, dtype, squares=squares, ue8m0=False)
        want, wanted = ops._assemble_by_reference(group, weights, dtype, squares, False)
        what = f"{tuple(group[0].values.shape)} {[p.values.dtype for p in group]} {weights} {dtype} {squares}"
        same(got.values, want.values, what)
        if got.scales is not None and want.scales is not None:
            same(got.scales, want.scales, what)
        if sums is not None and not broken:
            torch.testing.assert_close(sums.cpu(), wanted, rtol=1e-12, atol=0)
    return 2


def check_large(size: int) -> int:
    """Against the reference on the device: many scales, many blocks of each thread block."""
    a, b = (torch.randn(size, size + 16, device="cuda") * 0.02 for _ in range(2))
    fp8 = []
    for each in (a, b):
        got, want = ops.encode_fp8_block(each), reference.encode_fp8_block(each, ue8m0=False)
        same(got[0], want[0], "large encode")
        same(got[1], want[1], "large scales")
        fp8.append(Operand(*want))
    wide = [reference.decode_fp8_block(p.values, p.scales, torch.float32) for p in fp8]
    want_codes, want_scales = reference.encode_fp8_block(
        reference.weighted_sum(wide, [0.3, 0.7]), ue8m0=False
    )
    sums = reference.block_squares(wide[0], wide[1:])
    for squares in (False, True):
        got, found = ops.assemble(fp8, [0.3, 0.7], torch.uint8, squares=squares, ue8m0=False)
        same(got.values, want_codes, "large sum")
        same(got.scales, want_scales, "scales of the large sum")
        if squares:
            torch.testing.assert_close(found, sums, rtol=1e-12, atol=0)
    return 4


def median_ms(run: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(run, warmup=20, rep=80, return_mode="median"))


def copy_gbps(size: int) -> float:
    big = torch.empty(size, dtype=torch.uint8, device="cuda").random_(0, 255)
    into = torch.empty_like(big)
    return 2 * size / median_ms(lambda: into.copy_(big)) / 1e6


def bench(size: int) -> dict[str, float]:
    """Share of the copy of the same run, by operation."""
    weights = size * size
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(2))
    wide = a[: size // 2].float()
    copy = copy_gbps(weights * 4)
    fa, fb = (Operand(*ops.encode_fp8_block(each)) for each in (a, b))
    pa, pb = Operand(a), Operand(b)
    third, two_thirds = 1 / 3, 2 / 3
    plain: dict[str, Any] = {"squares": False, "ue8m0": False}
    squares: dict[str, Any] = {"squares": True, "ue8m0": False}
    two = [third, two_thirds]
    runs: dict[str, tuple[float, Callable[[], Any]]] = {
        "bf16>fp8": (3, lambda: ops.encode_fp8_block(a)),
        "f32>fp8": (2.5, lambda: ops.encode_fp8_block(wide)),
        "2fp8>fp8": (3, lambda: ops.assemble([fa, fb], two, torch.uint8, **plain)),
        "+squares": (3, lambda: ops.assemble([fa, fb], two, torch.uint8, **squares)),
        "3fp8>fp8": (4, lambda: ops.assemble([fa, fb, fa], [*two, 0.1], torch.uint8, **plain)),
        "2bf16>fp8": (5, lambda: ops.assemble([pa, pb], two, torch.uint8, **plain)),
        "fp8+bf16>fp8": (4, lambda: ops.assemble([fa, pb], two, torch.uint8, **plain)),
        "2bf16>bf16": (6, lambda: ops.assemble([pa, pb], two, torch.bfloat16, **plain)),
        "2fp8>bf16": (4, lambda: ops.assemble([fa, fb], two, torch.bfloat16, **plain)),
        "3 squares": (3, lambda: ops.assemble([fa, fb, fa], [*two, 0.1], torch.uint8, **squares)),
    }
    shares = {"copy": copy}
    for name, (size_of, run) in runs.items():
        shares[name] = size_of * weights / min(median_ms(run) for _ in range(2)) / 1e6 / copy
    return shares


def child(path: str, size: int) -> None:
    use(path)
    torch.set_num_threads(4)
    torch.manual_seed(int(time.time()))
    done = check() + check_large(min(size, 8192))
    print(json.dumps({"equal": done, **bench(size)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32768)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        child(options.child, options.size)
        return
    start = time.perf_counter()
    print(torch.cuda.get_device_name(), torch.__version__)
    with tempfile.TemporaryDirectory() as scratch:
        places = {name: Path(scratch) / f"{i}.so" for i, name in enumerate(options.only)}
        with ThreadPoolExecutor(len(places)) as pool:
            words = list(pool.map(lambda name: build(VARIANTS[name], places[name]), places))
        print(f"built in {time.perf_counter() - start:.1f} s", [each for each in words if each], flush=True)
        head = False
        for name, path in places.items():
            command = (sys.executable, __file__, "--child", str(path), "--size", str(options.size))
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
            except subprocess.TimeoutExpired:
                print(f"{name:28} timed out", flush=True)
                continue
            if done.returncode:
                print(f"{name:28} FAILED {done.stderr.strip()[-600:]}", flush=True)
                continue
            row = json.loads(done.stdout.strip().splitlines()[-1])
            if not head:
                print(" " * 28, "equal  copy", *(key for key in list(row)[2:]), "(% of the copy)")
                head = True
            shares = " ".join(f"{100 * row[key]:{max(len(key), 4)}.1f}" for key in list(row)[2:])
            told = f"{name:28} {row['equal']:5} {row['copy']:5.0f} {shares}"
            print(told, f" {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
