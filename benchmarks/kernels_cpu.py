"""Speed of the CPU kernels against eager torch and a memory copy of the same run.

    python benchmarks/kernels_cpu.py [--size N] [--repeat R] [--json]

One object per operation: `gweights_per_s`, `ratio_to_eager` (the best eager form found, below) and
`of_copy` (bytes that must move, against an in-place copy of a float32 matrix of that size).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from surgery.codecs import awq, bitstream, column_sweep, encode_ops, native, ops, packed_ops, reference
from surgery.codecs.column_sweep import BlockGrid
from surgery.codecs.grid import Quantized, absmax_grid, quantize
from surgery.codecs.nf4 import LEVELS
from surgery.codecs.nf4 import encode_nf4 as eager_nf4
from surgery.codecs.ops import Operand
from surgery.codecs.schemes import IntScheme


def eager_decode(each: Operand) -> torch.Tensor:
    """torch's own cast, then one multiplication over the blocks."""
    assert each.scales is not None
    return reference.scale_blocks(each.values.view(torch.float8_e4m3fn).to(torch.float32), each.scales)


Case = tuple[str, float, Callable[[], Any], Callable[[], Any]]
"""A name, the bytes that must move for a weight, ours, and the eager form."""


def packed_cases(size: int) -> list[Case]:
    scales = torch.rand(size, size // 128)
    found: list[Case] = []
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 2**bits, (size, size)).to(torch.uint8)
        words, zeros = (
            bitstream.pack(codes, bits),
            torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8),
        )
        found.append(
            (
                f"int{bits} g128 -> fp32",
                bits / 8 + 4 + 4 / 128,
                partial(packed_ops.decode_stream, words, bits, size, scales, 2 ** (bits - 1)),
                lambda w=words, b=bits, z=zeros: Quantized(bitstream.unpack(w, b, size), scales, z).values(),
            )
        )
    packed = torch.randint(0, 256, (size * size // 2,)).to(torch.uint8)
    given = (packed, torch.tensor(LEVELS), torch.rand(size * size // 64))
    ours = partial(packed_ops.decode_nibbles, *given, size * size, block=64, high_first=True)
    eager = partial(packed_ops._nibbles_by_reference, *given, size * size, 64, True)
    found.append(("nf4 -> fp32", 4.5 + 4 / 64, ours, eager))
    words, points = (torch.randint(-(2**31), 2**31, (n, size // 8)).int() for n in (size, size // 128))
    stored = (words, points, torch.rand(size // 128, size).half())
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found.append(
            (
                f"awq g128 -> {name}",
                0.5 + dtype.itemsize,
                partial(packed_ops.decode_awq, *stored, dtype),
                lambda d=dtype: awq.unpacked(*stored).values().to(d),
            )
        )
    return found


def encode_cases(size: int) -> list[Case]:
    values, found = torch.randn(size, size), []

    def eager(scheme: IntScheme) -> torch.Tensor:
        grid = absmax_grid(values, scheme, torch.bfloat16)
        return bitstream.pack(quantize(values, grid, scheme).codes, scheme.bits)

    for scheme in (IntScheme(4, 128), IntScheme(3, 128), IntScheme(4, 128, symmetric=False), IntScheme(8)):
        found.append(
            (
                f"fp32 -> {scheme}",
                4 + scheme.bits / 8,
                partial(encode_ops.encode_stream, values, scheme, torch.bfloat16),
                partial(eager, scheme),
            )
        )
    flat = values.view(-1)
    return [
        *found,
        ("fp32 -> nf4", 4.5, partial(encode_ops.encode_nf4, flat), partial(eager_nf4, flat)),
    ]


def sweep_cases(size: int) -> list[Case]:
    """Blocks of 128 columns of a square matrix, all of them as one batch."""
    batch = size // 128
    weights, upper = torch.randn(batch, size, 128), torch.triu(torch.randn(batch, 128, 128) * 0.02)
    upper += torch.eye(128)
    grid = BlockGrid(torch.rand(batch, size, 1) + 0.1, torch.full((batch, size, 1), 8).to(torch.uint8),
                     torch.zeros(batch, 128, dtype=torch.int32), 15)  # fmt: skip
    found: list[Case] = []
    for name, how in (("sweep int4", {"grid": grid}), ("sweep 2:4", {"pattern": (2, 4)})):
        ours = partial(ops.sweep_block, weights, upper, **how)
        found.append((name, 13, ours, partial(column_sweep.sweep_block, weights, upper, **how)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    count = options.size**2

    def seconds(run: Callable[[], Any]) -> float:
        run()
        times = []
        for _ in range(options.repeat):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    wide = torch.randn(options.size, options.size)
    into = torch.empty_like(wide)
    copy = 8 * count / seconds(lambda: into.copy_(wide))
    values = [torch.randn(options.size, options.size) * 0.02 for _ in range(2)]
    a, b = (Operand(*reference.encode_fp8_block(each, ue8m0=False)) for each in values)
    pa, pb = (Operand(each.bfloat16()) for each in values)
    plain: dict[str, Any] = {"squares": False, "ue8m0": False}
    half = (0.5, 0.5)
    cases: list[Case] = [
        ("fp8 -> bf16", 3, lambda: ops.decode_fp8_block(a.values, a.scales, torch.bfloat16),
         lambda: eager_decode(a).bfloat16()),
        ("fp8 -> fp32", 5, lambda: ops.decode_fp8_block(a.values, a.scales, torch.float32),
         lambda: eager_decode(a)),
        ("fp32 -> fp8", 5, lambda: ops.encode_fp8_block(values[0]),
         lambda: reference.encode_fp8_block(values[0], ue8m0=False)),
        ("aoe 2 fp8", 3, lambda: ops.assemble([a, b], half, torch.uint8, **plain),
         lambda: reference.encode_fp8_block(eager_decode(a).lerp_(eager_decode(b), 0.5), ue8m0=False)),
        ("aoe 2 fp8 + squares", 3,
         lambda: ops.assemble([a, b], half, torch.uint8, squares=True, ue8m0=False),
         lambda: ops._assemble_by_reference([a, b], half, torch.uint8, True, False)),
        ("lerp bf16", 6, lambda: ops.assemble([pa, pb], half, torch.bfloat16, **plain),
         lambda: torch.lerp(pa.values, pb.values, 0.5)),
    ]  # fmt: skip
    cases += packed_cases(options.size) + encode_cases(options.size) + sweep_cases(options.size)
    found = native.cpu()
    if not options.json:
        print(
            f"{found.path}, {found.compiler}, {torch.get_num_threads()} threads, copy {copy / 1e9:.1f} GB/s"
        )
    for op, nbytes, run, eager in cases:
        ours, theirs = seconds(run), seconds(eager)
        row = {
            "op": op,
            "gweights_per_s": round(count / ours / 1e9, 3),
            "ratio_to_eager": round(theirs / ours, 2),
            "of_copy": round(nbytes * count / ours / copy, 3),
        }
        print(json.dumps(row) if options.json else "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
