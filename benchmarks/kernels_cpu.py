"""Speed of the CPU kernels against eager torch and a memory copy of the same run.

    python benchmarks/kernels_cpu.py [--size N] [--repeat R] [--json]

One object per operation: `gweights_per_s`, `ratio_to_eager` (the best eager form found, below) and
`of_copy` (bytes that must move, against an in-place copy of a float32 matrix of that size).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from surgery.codecs import (
    awq,
    bitstream,
    column_sweep,
    encode_ops,
    merges,
    native,
    ops,
    packed_ops,
    reference,
)
from surgery.codecs.column_sweep import BlockGrid
from surgery.codecs.grid import Quantized, absmax_grid, quantize
from surgery.codecs.nf4 import LEVELS
from surgery.codecs.nf4 import encode_nf4 as eager_nf4
from surgery.codecs.ops import Operand
from surgery.codecs.schemes import IntScheme
from surgery.operators.merge.passes import keep_between, weighted_deltas
from surgery.operators.merge.selection import Selector


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


def pass_cases(base: torch.Tensor, models: list[torch.Tensor]) -> list[Case]:
    """The passes of TIES and Arcee Fusion over bf16 matrices; eager forms on the same."""
    operands = [Operand(base), *map(Operand, models)]
    pair, rank = operands[:2], base.numel() // 2
    threshold = float((models[0].float() - base.float()).abs().view(-1).kthvalue(rank + 1).values)
    weights = merges.row_divergence(*pair)
    cut = float(((models[0].float() - base.float()).abs() * weights[:, None]).median())
    thin = [merges.Thin(merges.Kept.BETWEEN, threshold, float("inf"))] * 2
    how = merges.Sum([0.5, 0.5], elect=True, divide=True, scale=1.0)

    rows, threads = base.shape[0], torch.get_num_threads()
    cuts = [rows * i // threads // 128 * 128 for i in range(threads)] + [rows]
    tiles = [[Operand(each.values[i:j]) for each in pair] for i, j in pairwise(cuts)]

    def selected() -> float:
        """Tiles on threads of their own, as the stream has them."""
        selector = Selector([rank])
        with ThreadPoolExecutor(threads) as pool:
            for upper in pool.map(lambda tile: merges.count_sizes(tile, None), tiles):
                selector.add(upper[0])
            selector.next_round()
            for lower in pool.map(lambda tile: merges.count_sizes(tile, [selector.digits]), tiles):
                selector.add(lower[0])
        return selector.values()[0]

    def eager_divergence(dtype: torch.dtype) -> torch.Tensor:
        p, q = (each.to(dtype).softmax(-1) + 1e-8 for each in (models[0], base))
        return p.mul_((p / q).log_()).sum(-1)

    def eager_fusion() -> torch.Tensor:
        start = base.float()
        delta = models[0].float().sub_(start)
        kept = delta.abs().mul_(weights[:, None]) >= cut
        return delta.mul_(kept).add_(start).bfloat16()

    def eager_ties() -> torch.Tensor:
        start = base.float()
        deltas = [keep_between(each.float().sub_(start), threshold, float("inf")) for each in models]
        return weighted_deltas(deltas, [0.5, 0.5], consensus=True, normalize=True).add_(start).bfloat16()

    assert selected() == threshold
    return [
        ("k-th |difference| of bf16", 8, selected,
         lambda: (models[0].float() - base.float()).abs_().view(-1).kthvalue(rank + 1)),
        ("row KL of bf16 (eager: float64)", 4, lambda: merges.row_divergence(*pair),
         partial(eager_divergence, torch.float64)),
        ("row KL of bf16 (eager: float32)", 4, lambda: merges.row_divergence(*pair),
         partial(eager_divergence, torch.float32)),
        ("fusion, masked write", 6,
         lambda: merges.merge_fusion(*pair, weights, cut, torch.bfloat16, ue8m0=False), eager_fusion),
        ("ties of two, masked write", 8,
         lambda: merges.merge_tasks(operands, thin, how, torch.bfloat16, ue8m0=False), eager_ties),
    ]  # fmt: skip


def keep_memory() -> None:
    """Let the allocator keep what is freed, for ours and eager torch alike.

    Fresh pages for every result, as those beyond 32 MB get by default, cost more than most kernels; tiles of
    the stream are small, and reused.
    """
    trim_threshold, mmap_threshold = -1, -3
    for option in (trim_threshold, mmap_threshold):
        ctypes.CDLL(None).mallopt(option, 1 << 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keep_memory()
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
    cases += pass_cases(values[0].bfloat16(), [(values[0] + 0.1 * each).bfloat16() for each in values])
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
