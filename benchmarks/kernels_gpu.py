"""Build, check and time the CUDA kernels in one command, on a machine with a CUDA GPU.

    python benchmarks/kernels_gpu.py [--size N] [--json FILE] [--small]

Checks each kernel against the CPU kernels and the torch reference to the last bit (sums of squares to
1e-12), on random, ragged and extreme inputs and on all codes; times them on [N, N] matrices, several times
the L2, against a device copy of the same run, eager torch, a Triton kernel and bitsandbytes where it is there
(forms of few bits are in `packed_gpu.py`, passes of merge methods in `passes_gpu.py` and checked by
tests/codecs/test_merges_cuda.py, column sweeps are timed by `solver_gpu.py`); then runs itself under
compute-sanitizer where that is there (`--small` is what it runs).

Times are medians by device events; GB/s are bytes that must move.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import packed_gpu
import passes_gpu
import torch
import triton
import triton.language as tl
from packed_gpu import same

from surgery.codecs import native, ops, reference
from surgery.codecs.column_sweep import BlockGrid
from surgery.codecs.magnitude import largest_magnitude
from surgery.codecs.ops import Operand

SHAPES = [(1, 1), (1, 300), (128, 128), (129, 127), (192, 256), (300, 144), (640, 384), (1000, 1040)]
MAGNITUDES = (1.0, 0.02, 1e-30, 1e30, 1e-38, 1e-42)


@triton.jit
def triton_decode(codes, scales, out, cols, across, BLOCK: tl.constexpr):
    row, col = tl.program_id(1), tl.program_id(0)
    r = row * BLOCK + tl.arange(0, BLOCK)
    c = col * BLOCK + tl.arange(0, BLOCK)
    at = r.to(tl.int64)[:, None] * cols + c[None, :]
    scale = tl.load(scales + row * across + col)
    values = tl.load(codes + at).to(tl.float32) * scale
    tl.store(out + at, values.to(tl.bfloat16))


def check_sums(
    values: list[torch.Tensor], coded: list[tuple[torch.Tensor, torch.Tensor]], ue8m0: bool, broken: bool
) -> int:
    """Weighted sums of three and two FP8, of mixed and of bf16 parents."""
    done = 0
    parents = [Operand(*each) for each in coded]
    mixed = [parents[0], Operand(values[1].bfloat16()), Operand(values[2])]
    plain = [Operand(v.bfloat16()) for v in values]
    for group in (parents, parents[:2], mixed, plain):
        host = [Operand(p.values.cpu(), None if p.scales is None else p.scales.cpu()) for p in group]
        for dtype in (torch.uint8, torch.bfloat16, torch.float32):
            for weights in ([0.5, 0.3, 0.2], [0.0, 0.3, 0.7]):
                for squares in (False, True):
                    options = {"squares": squares, "ue8m0": ue8m0}
                    part = weights[: len(group)]
                    got, sums = ops.assemble(group, part, dtype, **options)
                    want_out, want_sums = ops.assemble(host, part, dtype, **options)
                    what = f"assemble {len(group)} {tuple(values[0].shape)} {dtype}"
                    same(got.values, want_out.values, what)
                    if got.scales is not None:
                        same(got.scales, want_out.scales, f"{what}, scales")
                    if squares and not broken:
                        torch.testing.assert_close(sums.cpu(), want_sums, rtol=1e-12, atol=0)
                    done += 1
    return done


def check() -> int:
    """Raises AssertionError at the first difference; returns the number of comparisons."""
    done = 0
    for shape in SHAPES:
        for magnitude in MAGNITUDES:
            values = [torch.randn(shape, device="cuda") * magnitude for _ in range(3)]
            values[0].view(-1)[0] = -0.0
            for broken in (False, True):
                if broken:
                    flat = values[0].view(-1)
                    flat[-1] = torch.nan
                    flat[flat.numel() // 2] = torch.inf
                for ue8m0 in (False, True):
                    coded = [ops.encode_fp8_block(v, ue8m0=ue8m0) for v in values]
                    for v, (codes, scales) in zip(values, coded, strict=True):
                        want = reference.encode_fp8_block(v.cpu(), ue8m0=ue8m0)
                        same(codes, want[0], f"encode {shape} {magnitude} {ue8m0}")
                        same(scales, want[1], f"scales {shape} {magnitude} {ue8m0}")
                        narrow = v.bfloat16()
                        got = ops.encode_fp8_block(narrow, ue8m0=ue8m0)
                        want = reference.encode_fp8_block(narrow.cpu(), ue8m0=ue8m0)
                        same(got[0], want[0], f"encode bf16 {shape} {magnitude} {ue8m0}")
                        same(got[1], want[1], f"bf16 scales {shape} {magnitude} {ue8m0}")
                        for dtype in (torch.float32, torch.bfloat16):
                            found = ops.decode_fp8_block(codes, scales, dtype)
                            same(
                                found, reference.decode_fp8_block(codes.cpu(), scales.cpu(), dtype), "decode"
                            )
                        done += 6
                    done += check_sums(values, coded, ue8m0, broken)
    return done


def check_all_codes() -> int:
    """Every code and every bf16 value, at scales of all sizes."""
    done = 0
    codes = torch.arange(256, dtype=torch.uint8).repeat(128, 1)[:, :128].contiguous()
    codes = torch.cat([codes, 128 + codes], dim=1)
    for scale in (1.0, 0.1, 2.0**-120, 3e-42, 1e35):
        scales = torch.full((1, 2), scale)
        for dtype in (torch.float32, torch.bfloat16):
            found = ops.decode_fp8_block(codes.cuda(), scales.cuda(), dtype)
            same(found, reference.decode_fp8_block(codes, scales, dtype), "all codes")
            done += 1
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(512, 128)
    for factor in (1.0, 1e-3, 7.7, 1e-30):
        wide = every.float() * factor
        got, want = ops.encode_fp8_block(wide.cuda()), reference.encode_fp8_block(wide, ue8m0=False)
        same(got[0], want[0], "all bf16"), same(got[1], want[1], "all bf16 scales")
        done += 2
    for exponent in range(-100, 100):  # scales from 2^-109 to 2^91, so that all ways to divide are taken
        wide = torch.randn(256, 272).bfloat16() * 2.0**exponent
        got, want = ops.encode_fp8_block(wide.cuda()), reference.encode_fp8_block(wide, ue8m0=False)
        same(got[0], want[0], f"bf16 at 2^{exponent}"), same(got[1], want[1], f"scales at 2^{exponent}")
        done += 2
    return done


def check_large(size: int = 8192) -> int:
    """FP8 parents against the reference on the device: many blocks of each thread block."""
    done = 0
    wide = [torch.randn(size, size + 16, device="cuda") * 0.02 for _ in range(3)]
    parents = [Operand(*reference.encode_fp8_block(each, ue8m0=False)) for each in wide]
    wide = [each.decoded() for each in parents]
    for count, weights in ((2, [0.3, 0.7]), (3, [0.2, 0.3, 0.5])):
        total = reference.weighted_sum(wide[:count], weights)
        narrow = total.bfloat16()
        codes, scales = reference.encode_fp8_block(total, ue8m0=False)
        sums = reference.block_squares(wide[0], wide[1:count])
        for squares in (False, True):
            options = {"squares": squares, "ue8m0": False}
            got, found = ops.assemble(parents[:count], weights, torch.uint8, **options)
            same(got.values, codes, f"large sum of {count}")
            same(got.scales, scales, f"scales of the large sum of {count}")
            if squares:
                torch.testing.assert_close(found, sums, rtol=1e-12, atol=0)
            done += 2 + squares
        got, _ = ops.assemble(parents[:count], weights, torch.bfloat16, squares=False, ue8m0=False)
        same(got.values, narrow, f"large sum of {count} to bf16")
        done += 1
    return done


def small_sweeps() -> None:
    """One launch of each column sweep, on ragged slices."""
    weights, upper = torch.randn(2, 45, 300, device="cuda"), torch.randn(2, 300, 300, device="cuda")
    scales = torch.rand(2, 45, 3, device="cuda") + 0.5
    zeros = torch.randint(0, 16, scales.shape, device="cuda").to(torch.uint8)
    for first, last in ((0, 128), (3, 67), (180, 300)):
        cut = slice(first, last)
        group = torch.randint(0, 3, (2, last - first), device="cuda").int()
        for grid in (None, BlockGrid(scales, zeros, group, 15)):
            for pattern in (None, (2, 4), (3, 8)):
                ops.sweep_block(weights[..., cut], upper[:, cut, cut], pattern=pattern, grid=grid)


def median_ms(run: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(run, warmup=30, rep=150, return_mode="median"))


def bench(size: int) -> list[dict[str, Any]]:
    weights = size * size
    device = "cuda"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) * 0.02 for _ in range(2))
    big = torch.empty(weights * 4, dtype=torch.uint8, device=device).random_(0, 255)
    into = torch.empty_like(big)
    copy = 2 * big.numel() / median_ms(lambda: into.copy_(big)) / 1e6
    fa, fb = (Operand(*ops.encode_fp8_block(each)) for each in (a, b))
    fc = Operand(fa.values.flip(0), fa.scales.flip(0))
    pa, pb = Operand(a), Operand(b)
    rows: list[dict[str, Any]] = [{"op": "copy", "gbps": copy, "of_copy": 1.0}]

    def row(op: str, nbytes: float, run: Callable[[], Any]) -> None:
        run()
        ms = [median_ms(run) for _ in range(2)]
        gbps = nbytes * weights / min(ms) / 1e6
        rows.append(
            {
                "op": op,
                "ms": ms,
                "gbps": gbps,
                "of_copy": gbps / copy,
                "gweights_per_s": weights / min(ms) / 1e6,
            }
        )

    out = torch.empty_like(a)
    wide = into.view(torch.float32).view(size, size)
    wide.normal_()
    half, thirds = [0.5, 0.5], [0.2, 0.3, 0.5]
    plain = {"squares": False, "ue8m0": False}
    squares = {"squares": True, "ue8m0": False}
    row("fp8 -> bf16", 3, lambda: ops.decode_fp8_block(fa.values, fa.scales, torch.bfloat16))
    row("fp8 -> fp32", 5, lambda: ops.decode_fp8_block(fa.values, fa.scales, torch.float32))
    row("bf16 -> fp8", 3, lambda: ops.encode_fp8_block(a))
    row("fp32 -> fp8", 5, lambda: ops.encode_fp8_block(wide))
    row("largest magnitude", 1, lambda: largest_magnitude(fa.values))
    row("copy with the largest magnitude, bf16", 4, lambda: largest_magnitude(a, out))
    row("2 fp8 -> fp8", 3, lambda: ops.assemble([fa, fb], half, torch.uint8, **plain))
    row("2 fp8 -> fp8 + squares", 3, lambda: ops.assemble([fa, fb], half, torch.uint8, **squares))
    row("3 fp8 -> fp8", 4, lambda: ops.assemble([fa, fb, fc], thirds, torch.uint8, **plain))
    row("3 fp8 -> fp8 + squares", 4, lambda: ops.assemble([fa, fb, fc], thirds, torch.uint8, **squares))
    row("2 fp8 -> bf16", 4, lambda: ops.assemble([fa, fb], half, torch.bfloat16, **plain))
    row("fp8 + bf16 -> fp8", 4, lambda: ops.assemble([fa, pb], half, torch.uint8, **plain))
    row("lerp bf16", 6, lambda: ops.assemble([pa, pb], half, torch.bfloat16, **plain))
    grid = (size // 128, size // 128)
    e4m3 = fa.values.view(torch.float8_e4m3fn)
    row(
        "fp8 -> bf16, Triton",
        3,
        lambda: triton_decode[grid](e4m3, fa.scales, out, size, size // 128, BLOCK=128),
    )

    def eager(each: Operand) -> torch.Tensor:
        wide = each.values.view(torch.float8_e4m3fn).to(torch.float32)
        return reference.scale_blocks(wide, each.scales)

    for name, nbytes, run in packed_gpu.decoding(big, size) + packed_gpu.encoding(a) + packed_gpu.peers(a):
        row(name, nbytes, run)
    row("fp8 -> bf16, eager", 3, lambda: eager(fa).bfloat16())
    row("bf16 -> fp8, eager", 3, lambda: reference.encode_fp8_block(a, ue8m0=False))
    row("2 fp8 -> fp8, eager", 3,
        lambda: reference.encode_fp8_block(eager(fa).lerp_(eager(fb), 0.5), ue8m0=False))  # fmt: skip
    row("lerp bf16, eager", 6, lambda: torch.lerp(a, b, 0.5))
    for name, nbytes, run in passes_gpu.cases(a, b):
        row(name, nbytes, run)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32768)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true", help="a few launches only, for compute-sanitizer")
    options = parser.parse_args()
    torch.manual_seed(int(time.time()))
    start = time.perf_counter()
    found = native.cuda(torch.cuda.get_device_capability())
    print(
        torch.cuda.get_device_name(),
        torch.__version__,
        found.path,
        found.compiler,
        found.reason,
        native.cpu(),
    )
    print(f"built in {time.perf_counter() - start:.1f} s", flush=True)
    assert found.library is not None, found.reason
    if options.small:
        for shape in SHAPES:
            values = torch.randn(shape, device="cuda")
            coded = Operand(*ops.encode_fp8_block(values))
            ops.decode_fp8_block(coded.values, coded.scales, torch.bfloat16)
            for parents in ([coded, Operand(values)], [coded] * 2, [coded] * 3):
                for dtype in (torch.uint8, torch.bfloat16):
                    for squares in (False, True):
                        weights = [0.5] * len(parents)
                        ops.assemble(parents, weights, dtype, squares=squares, ue8m0=False)
        packed_gpu.check(widths=(3, 4, 8))
        small_sweeps()
        passes_gpu.small()
        torch.cuda.synchronize()
        return
    done = check() + check_large() + check_all_codes() + packed_gpu.check()
    done += passes_gpu.check_beyond()
    print(
        f"{done} comparisons equal after {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    rows = bench(options.size)
    for each in rows:
        ms = " ".join(f"{m:8.3f}" for m in each.get("ms", ()))
        print(
            f"{each['op']:24} {each['gbps']:8.0f} GB/s  {100 * each['of_copy']:5.1f} % of the copy  {ms} ms"
        )
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(sanitizer).is_file():
        command = [sanitizer, "--error-exitcode=9", sys.executable, __file__, "--small"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        print("compute-sanitizer:", done.returncode, (done.stdout + done.stderr)[-300:])
    print(f"all in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
