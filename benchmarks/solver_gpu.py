"""Speed of the layer solvers on one GPU, stage by stage, against eager torch in the same run.

    python benchmarks/solver_gpu.py [--part check|matrices|layer|8b]... [--json FILE] [--small]

check      the column sweep against its torch form on the device, to the last bit; GPTQ's error against the
           baseline's, within 1e-3
matrices   three sizes of a single matrix: Hessian, factor, GPTQ and SparseGPT, and the sweep kernel alone
layer      256 experts of DeepSeek-V3, gate and up projection stacked (they share their Hessian) and down
           projection, in waves; the baseline on 8 experts, scaled to 256
8b         the matrices of one layer of Llama-3-8B, and 32 layers

The baseline is `solver_eager.py`. Data are random, weights float32, inputs bf16; int4 in groups of 128,
static. Times are by host clock around synchronized stages (`sweep alone`, `products alone`: replays of a CUDA
graph; the eager column loop: device events).
What is projected is arithmetic alone: no forward passes, no reading, no writing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import solver_eager as eager
import torch

from surgery.calibrate.inputs import InputSums
from surgery.codecs import column_sweep, ops
from surgery.codecs.column_sweep import BlockGrid, SweptBlock
from surgery.codecs.dispatch import library_for
from surgery.codecs.grid import absmax_grid
from surgery.codecs.schemes import IntScheme
from surgery.operators.layerwise.hessian import factorize
from surgery.operators.layerwise.reconstruction import output_squares
from surgery.operators.quantize.gptq import gptq
from surgery.operators.sparsify.sparsegpt import sparsegpt

SCHEME = IntScheme(4, 128)
DAMPING, BLOCK, MOE_LAYERS = 0.01, 128, 58
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class Stages:
    """Milliseconds by name, of parts of a run that do not wait for one another (device events)."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if CUDA else [0.0, 0.0]
        marks[0] = _mark(marks[0])
        yield
        marks[1] = _mark(marks[1])
        self._marks.append((name, *marks))

    def total(self, name: str) -> float:
        if CUDA:
            torch.cuda.synchronize()
            return sum(first.elapsed_time(last) for found, first, last in self._marks if found == name)
        return sum(1e3 * (last - first) for found, first, last in self._marks if found == name)


def _mark(event: Any) -> Any:
    if not CUDA:
        return time.perf_counter()
    event.record()
    return event


def clock(run: Callable[[], Any], repeat: int = 1, warm: int = 0) -> tuple[float, Any]:
    """(median milliseconds, the last result) of synchronized runs."""
    found, result = [], None
    for i in range(warm + repeat):
        result = None
        if CUDA:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = run()
        if CUDA:
            torch.cuda.synchronize()
        if i >= warm:
            found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found), result


def replayed(run: Callable[[], Any]) -> float:
    """Milliseconds of one run of launches, by replays of a CUDA graph."""
    run()
    if not CUDA:
        return clock(run)[0]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return clock(graph.replay, repeat=5, warm=1)[0]


def inputs(tokens: int, cols: int) -> torch.Tensor:
    """bf16 [tokens, cols] with columns of unequal size and some correlation."""
    sizes = torch.exp(torch.randn(cols, device=DEVICE) * 0.5)
    common = torch.randn(tokens, 1, device=DEVICE)
    return ((torch.randn(tokens, cols, device=DEVICE) + 0.3 * common) * sizes).bfloat16()


def some_weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE) * 0.02


# --- check


def same(found: SweptBlock, want: SweptBlock, what: str) -> None:
    for name, left, right in zip(found._fields, found, want, strict=True):
        if left is None or right is None:
            assert left is right, what
            continue
        if left.is_floating_point():
            assert torch.equal(left.isnan(), right.isnan()), f"{what}: NaN elsewhere in {name}"
            left, right = (each.nan_to_num(0.0).contiguous().view(torch.int32) for each in (left, right))
        assert torch.equal(left, right), f"{what}: {int((left != right).sum())} {name} differ"


def check_sweep() -> int:
    """Comparisons made; AssertionError at the first difference."""
    done = 0
    for shape in ((1, 4096, 128), (3, 333, 128), (2, 97, 96), (1, 5, 1), (2, 64, 127), (5, 31, 60)):
        batch, rows, cols = shape
        for magnitude in (0.02, 1.0, 1e-20, 1e-38, 1e-42, 1e30):
            weights = torch.randn(shape, device=DEVICE) * magnitude
            weights[0, 0, : cols // 2] = -0.0
            factor = torch.randn(batch, cols, cols, device=DEVICE) * 0.2
            factor.diagonal(dim1=1, dim2=2).copy_(torch.rand(batch, cols, device=DEVICE) + 0.5)
            scales = (torch.rand(batch, rows, 3, device=DEVICE) + 0.5) * magnitude / 5
            zeros = torch.randint(0, 16, scales.shape, device=DEVICE).to(torch.uint8)
            group = torch.randint(0, 3, (batch, cols), device=DEVICE).int()
            mask = (torch.rand(shape, device=DEVICE) < 0.5).to(torch.uint8)
            patterns = [each for each in ((2, 4), (1, 2), (4, 8), (2, 3), (7, 16)) if cols % each[1] == 0]
            for grid in (None, BlockGrid(scales, zeros, group, 15)):
                cases: list[dict[str, Any]] = [{}, {"mask": mask}, *({"pattern": p} for p in patterns)]
                for case in cases:
                    found = ops.sweep_block(weights, factor, grid=grid, **case)
                    want = column_sweep.sweep_block(weights, factor, grid=grid, **case)
                    same(found, want, f"{shape} {magnitude} grid {grid is not None} {list(case.items())[:1]}")
                    done += 1
    return done


def check_gptq(rows: int, cols: int) -> tuple[float, float]:
    """tr(D H Dᵀ) of ours and of the baseline."""
    sums = InputSums.zeros(cols, torch.device(DEVICE), gram=True)
    sums.add(inputs(4 * cols, cols))
    assert sums.gram is not None
    weights = some_weights(rows, cols)
    factors = factorize(sums.gram[None], DAMPING)
    ours = gptq(weights[None], factors, SCHEME, static_groups=True).values
    grid = absmax_grid(weights, SCHEME)
    theirs = eager.gptq(
        weights, eager.inverse_factor(sums.gram, DAMPING), grid.scales, grid.zeros.float(), 15
    )
    made = [float(output_squares(weights[None] - new, sums.gram[None]).sum()) for new in (ours, theirs[None])]
    return made[0], made[1]


def check_gram() -> float:
    """The relative error of a Gram matrix of bf16 inputs against float64."""
    x = inputs(10000, 640)
    sums = InputSums.zeros(640, torch.device(DEVICE), gram=True)
    sums.add(x)
    assert sums.gram is not None
    want = x.double().t() @ x.double()
    return float((sums.gram - want).norm() / want.norm())


def part_check(small: bool) -> dict[str, Any]:
    done, gram = check_sweep(), check_gram()
    ours, theirs = check_gptq(*((96, 256) if small else (1024, 2048)))
    ratio = ours / theirs
    print(f"{done} sweeps equal to the torch form; GPTQ's error {ratio:.6f} of the baseline's", flush=True)
    print(f"Gram matrix of bf16 inputs within {gram:.1e} of float64", flush=True)
    assert abs(ratio - 1) < 1e-3, (ours, theirs)
    assert gram < 1e-4, gram
    return {"sweeps": done, "error_ratio": ratio, "gram_error": gram}


# --- matrices


def hessians(cols: int, sequences: int, length: int) -> tuple[dict[str, float], torch.Tensor]:
    """Times of the accumulation by our sums, by the product alone, and in float32; and the Gram matrix."""
    parts = [inputs(length, cols) for _ in range(4)]
    device = torch.device(DEVICE)

    def ours() -> torch.Tensor:
        sums = InputSums.zeros(cols, device, gram=True)
        for i in range(sequences):
            sums.add(parts[i % 4])
        assert sums.gram is not None
        return sums.gram

    def product() -> None:
        total = torch.zeros(cols, cols, device=device)
        for i in range(sequences):
            x = parts[i % 4]
            if CUDA:
                torch.addmm(total, x.t(), x, out_dtype=torch.float32, out=total)
            else:
                total.addmm_(x.t().float(), x.float())

    def theirs() -> None:
        total, tokens = torch.zeros(cols, cols, device=device), 0
        for i in range(sequences):
            tokens = eager.accumulate(total, parts[i % 4], tokens)

    for part in parts[:1]:
        eager.accumulate(torch.zeros(cols, cols, device=device), part, 0)
    gram_ms, gram = clock(ours, warm=1)
    return {"hessian": gram_ms, "product": clock(product)[0], "eager hessian": clock(theirs)[0]}, gram


def alone(weights: torch.Tensor, upper: torch.Tensor) -> dict[str, float]:
    """The sweep kernel over all blocks, and the products behind them, without one another."""
    batch, _, cols = weights.shape
    now, out, grid = weights.clone(), torch.empty_like(weights), absmax_grid(weights, SCHEME)
    errors = torch.empty_like(weights[..., :BLOCK])
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=DEVICE)
    group = (torch.arange(cols, device=DEVICE) // BLOCK).int().expand(batch, cols)

    def sweeps(gridded: bool, pattern: tuple[int, int] | None) -> None:
        for first in range(0, cols, BLOCK):
            cut = slice(first, first + BLOCK)
            place = BlockGrid(grid.scales, grid.zeros, group[:, cut], SCHEME.top) if gridded else None
            into = SweptBlock(out[..., cut], errors, codes[..., cut] if gridded else None)
            ops.sweep_block(now[..., cut], upper[:, cut, cut], grid=place, pattern=pattern, into=into)

    def products() -> None:
        for first in range(0, cols - BLOCK, BLOCK):
            last = first + BLOCK
            now[..., last:].baddbmm_(errors, upper[:, first:last, last:], alpha=-1)

    found = {
        "sweep alone": replayed(partial(sweeps, True, None)),
        "2:4 sweep alone": replayed(partial(sweeps, False, (2, 4))),
    }
    errors.normal_(std=1e-6)
    return {**found, "products alone": replayed(products)}


def part_matrices(small: bool) -> list[dict[str, Any]]:
    sizes = [(4096, 4096, 2048), (14336, 4096, 4096), (7168, 18432, 4096)]
    sequences = 128
    if small:
        sizes, sequences = [(64, 256, 128), (32, 384, 128)], 4
    found = []
    for rows, cols, length in sizes:
        row: dict[str, Any] = {"rows": rows, "cols": cols, "tokens": sequences * length}
        times, gram = hessians(cols, sequences, length)
        row |= times
        weights = some_weights(1, rows, cols)
        row["factor"], factors = clock(lambda g=gram: factorize(g[None], DAMPING), repeat=3, warm=1)
        row |= alone(weights, factors.upper)

        def ours(
            run: Callable[..., Any], *rest: Any, w: Any = weights, f: Any = factors, **options: Any
        ) -> Any:
            return clock(lambda: run(w, f, *rest, **options), repeat=3, warm=1)[0]

        row["gptq"] = ours(gptq, SCHEME, static_groups=True)
        row["sparsegpt 0.5"] = ours(sparsegpt, 0.5)
        row["sparsegpt 2:4"] = ours(sparsegpt, (2, 4))
        row["eager factor"], factor = clock(lambda g=gram: eager.inverse_factor(g, DAMPING), repeat=2, warm=1)
        grid = absmax_grid(weights[0], SCHEME)
        stages = Stages()
        eager.gptq(weights[0, :64, :256], factor[:256, :256], grid.scales[:64], grid.zeros[:64].float(), 15)
        row["eager gptq"], _ = clock(
            lambda w=weights, f=factor, g=grid, s=stages: eager.gptq(
                w[0], f, g.scales, g.zeros.float(), 15, s
            )
        )
        row["eager columns"] = stages.total("columns")
        row["eager sparsegpt 0.5"], _ = clock(lambda w=weights, f=factor: eager.sparsegpt(w[0], f, 0.5))
        found.append(row)
        print(f"{rows} x {cols}: { ({k: round(v, 2) for k, v in row.items()}) }", flush=True)
        del gram, factors, factor, weights
    return found


# --- layer and 8b


def solve(rows: int, cols: int, batch: int, tokens: int, times: dict[str, float], prefix: str) -> None:
    """Hessians, factors and GPTQ of a batch of matrices that each have inputs of their own."""
    weights = some_weights(batch, rows, cols)
    gram = torch.zeros(batch, cols, cols, device=DEVICE)
    device = torch.device(DEVICE)
    for one in gram:
        x = inputs(tokens, cols)
        sums = InputSums.zeros(cols, device, gram=False)
        sums.gram = one
        ms, _ = clock(lambda s=sums, x=x: s.add(x))
        times[f"{prefix} hessian"] = times.get(f"{prefix} hessian", 0.0) + ms
    ms, factors = clock(partial(factorize, gram, DAMPING))
    times[f"{prefix} factor"] = times.get(f"{prefix} factor", 0.0) + ms
    del gram
    ms, _ = clock(lambda: gptq(weights, factors, SCHEME, static_groups=True))
    times[f"{prefix} gptq"] = times.get(f"{prefix} gptq", 0.0) + ms


def solve_eagerly(rows: int, cols: int, tokens: int, times: dict[str, float]) -> None:
    """One matrix by the baseline."""
    weights, x = some_weights(rows, cols), inputs(tokens, cols)

    def accumulate() -> torch.Tensor:
        hessian, seen = torch.zeros(cols, cols, device=DEVICE), 0
        for piece in x.split(4096):
            seen = eager.accumulate(hessian, piece, seen)
        return hessian

    ms, hessian = clock(accumulate)
    times["hessian"] = times.get("hessian", 0.0) + ms
    ms, factor = clock(lambda: eager.inverse_factor(hessian, DAMPING))
    times["factor"] = times.get("factor", 0.0) + ms
    grid = absmax_grid(weights, SCHEME)
    ms, _ = clock(lambda: eager.gptq(weights, factor, grid.scales, grid.zeros.float(), SCHEME.top))
    times["gptq"] = times.get("gptq", 0.0) + ms


def part_layer(small: bool) -> dict[str, Any]:
    experts, wave, hidden, inner, sampled, tokens = 256, 32, 7168, 2048, 8, 16384
    if small:
        experts, wave, hidden, inner, sampled, tokens = 4, 2, 256, 128, 1, 512
    warm: dict[str, float] = {}
    solve(inner, hidden, 1, tokens, warm, "")
    solve_eagerly(inner, inner, tokens, warm)
    times: dict[str, float] = {}
    for _ in range(experts // wave):
        solve(2 * inner, hidden, wave, tokens, times, "gate+up")
        solve(hidden, inner, wave, tokens, times, "down")
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
    if CUDA:
        torch.cuda.empty_cache()
    theirs: dict[str, float] = {}
    for _ in range(sampled):
        for rows, cols in ((inner, hidden), (inner, hidden), (hidden, inner)):
            solve_eagerly(rows, cols, tokens, theirs)
    theirs = {name: ms * experts / sampled for name, ms in theirs.items()}
    print(f"layer: {times}; peak {peak:.1f} GB; eager, {sampled} experts scaled: {theirs}", flush=True)
    sizes = {"experts": experts, "wave": wave, "tokens_per_expert": tokens, "sampled": sampled}
    return {**sizes, "peak_gb": peak, "ours": times, "eager": theirs}


def part_8b(small: bool) -> dict[str, Any]:
    hidden, inner, tokens = (256, 384, 512) if small else (4096, 14336, 128 * 2048)
    kv = hidden // 4
    times: dict[str, float] = {}
    theirs: dict[str, float] = {}
    solve(kv, hidden, 1, 512, {}, "")
    # An eighth of the tokens, so that they fit into memory; Hessians take eight times as long as measured.
    part = tokens // 8
    for name, rows, cols in (
        ("q, k, v", hidden + 2 * kv, hidden),
        ("o", hidden, hidden),
        ("gate, up", 2 * inner, hidden),
        ("down", hidden, inner),
    ):
        solve(rows, cols, 1, part, times, name)
        times[f"{name} hessian"] *= 8
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden),
              (inner, hidden), (inner, hidden), (hidden, inner)]  # fmt: skip
    for rows, cols in shapes:
        solve_eagerly(rows, cols, part, theirs)
    theirs["hessian"] *= 8
    print(f"8b: {times}; eager: {theirs}", flush=True)
    return {"tokens": tokens, "ours": times, "eager": theirs}


# --- table


def table(found: dict[str, Any]) -> str:
    """Markdown for benchmarks/README.md."""
    lines: list[str] = []

    def add(*cells: object) -> None:
        lines.append("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")

    if rows := found.get("matrices"):
        add("matrix (rows × columns), ms", *(f"{r['rows']} × {r['cols']}" for r in rows))
        add("---", *("---:" for _ in rows))
        names = ("hessian", "product", "eager hessian", "factor", "eager factor", "sweep alone",
                 "2:4 sweep alone", "products alone", "gptq", "eager columns", "eager gptq",
                 "sparsegpt 0.5", "eager sparsegpt 0.5", "sparsegpt 2:4")  # fmt: skip
        for name in names:
            add(name, *(r[name] for r in rows))
        add("sweep of 128 columns, µs", *(1e3 * r["sweep alone"] / (r["cols"] / BLOCK) for r in rows))
        for what, mine, theirs in (
            ("column loop", ["sweep alone"], ["eager columns"]),
            ("factor and GPTQ", ["factor", "gptq"], ["eager factor", "eager gptq"]),
            ("all", ["hessian", "factor", "gptq"], ["eager hessian", "eager factor", "eager gptq"]),
        ):
            ratios = [sum(r[name] for name in theirs) / sum(r[name] for name in mine) for r in rows]
            add(f"{what}, eager to ours", *(f"{ratio:.1f} ×" for ratio in ratios))
        lines.append("")
    for name, title, count, what in (
        ("layer", "one layer of 256 experts", MOE_LAYERS, f"{MOE_LAYERS} MoE layers"),
        ("8b", "one layer of Llama-3-8B", 32, "32 layers"),
    ):
        if part := found.get(name):
            ours, theirs = part["ours"], part["eager"]
            add(f"{title}, s", "ours", "eager", "ratio")
            add("---", "---:", "---:", "---:")
            for stage in ("hessian", "factor", "gptq"):
                mine = sum(ms for key, ms in ours.items() if key.endswith(stage)) / 1e3
                add(stage, mine, theirs[stage] / 1e3, f"{theirs[stage] / 1e3 / mine:.1f} ×")
            whole, other = sum(ours.values()) / 1e3, sum(theirs.values()) / 1e3
            add("sum", whole, other, f"{other / whole:.1f} ×")
            add(f"{what}, projected, minutes", whole * count / 60, other * count / 60, "")
            lines.append("")
    return "\n".join(lines)


PARTS: dict[str, Callable[[bool], Any]] = {
    "check": part_check,
    "matrices": part_matrices,
    "layer": part_layer,
    "8b": part_8b,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=tuple(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script itself")
    options = parser.parse_args()
    seed = int(time.time())
    torch.manual_seed(seed)
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    kernels = library_for(torch.empty(0, device=DEVICE))
    print(f"{device}, torch {torch.__version__}, kernels {kernels.path} {kernels.reason}, seed {seed}")
    print(f"built in {time.perf_counter() - start:.1f} s", flush=True)
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "kernels": kernels.path}
    for name in options.part or PARTS:
        found[name] = PARTS[name](options.small)
        print(f"{name} after {time.perf_counter() - start:.1f} s", flush=True)
        if CUDA:
            torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    print(f"\n{device}, torch {torch.__version__}, kernels {kernels.path}\n\n{table(found)}")


if __name__ == "__main__":
    main()
