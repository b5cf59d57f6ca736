"""Statistics of one full-size DeepSeek-V3 MoE layer on a GPU, against its floor.

    python benchmarks/experts_gpu.py [--tokens 32768] [--experts 256]

256 experts of 7168×2048 with random FP8 weights, 8 of them for each of 32,768 tokens of random hidden states,
the routing drawn by a random gate. Timed with device events, medians of several runs after warm-up:

    resident   experts kept on the device in FP8: decode, run the routed tokens, take all sums
    host       the same with the experts in page-locked host memory, copied while others compute
    dense      every expert on every token, as observers that hook whole modules do; the same decoding

The floor of `resident` is the decode's traffic (3.0002 bytes a weight) at the copy bandwidth plus the routed
tokens' operations at the rate of a large bf16 product, both measured in the same run; that of `host` is the
transfer of the stored weights, measured too. Sums are checked against float64 on the same routing first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from surgery.calibrate.carried import StoredForm
from surgery.calibrate.experts import ExpertBank, RoutedExperts, sort_routing
from surgery.calibrate.ranks import ONE_RANK
from surgery.calibrate.statistics import FIELDS, LayerStatistics, token_contributions
from surgery.stream.roles import ExpertRules

HIDDEN, INNER, TOP_K = 7168, 2048, 8
RULES = ExpertRules("n_routed_experts", "num_experts_per_tok", ("gate", "up", "down"), "norm", None)


class Module:
    """What the bank asks of transformers' experts module."""

    is_concatenated, is_transposed, has_bias = True, False, False

    def __init__(self, experts: int) -> None:
        self.num_experts = experts

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


class RandomBank(ExpertBank):
    """Experts that are made, not read: the same bytes for the same expert."""

    def form(self, expert: int, projection: str) -> StoredForm:
        rows, cols = (HIDDEN, INNER) if projection == "down" else (INNER, HIDDEN)
        generator = torch.Generator(self.device).manual_seed(7 * expert + len(projection))
        made = {"device": self.device, "generator": generator}
        codes = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, **made)
        codes[(codes & 0x7F) == 0x7F] = 0x38  # no NaN
        scales = torch.rand(rows // 128, cols // 128, **made) * 2e-4 + 1e-4
        return StoredForm(codes.cpu(), scales.cpu(), None)

    def _form(self, expert: int, projection: str) -> StoredForm:
        return self.form(expert, projection)


def milliseconds(run: Callable[[], Any], repeat: int, warm: int = 1) -> list[float]:
    """Device time of each of `repeat` runs."""
    for _ in range(warm):
        run()
    found = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return found


def ceilings(device: torch.device) -> tuple[float, float, float]:
    """Bytes a second of a device copy (read and written), operations a second of bf16, host to device."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / statistics.median(milliseconds(lambda: target.copy_(source), 9)) * 1e3
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / statistics.median(milliseconds(lambda: a @ b, 9)) * 1e3
    host = torch.empty(1 << 31, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device=device)
    link = (
        host.numel() / statistics.median(milliseconds(lambda: there.copy_(host, non_blocking=True), 5)) * 1e3
    )
    return copy, product, link


def check(device: torch.device) -> float:
    """Largest relative error of the sums against float64, on few tokens and experts."""
    experts, tokens = 4, 96
    bank = RandomBank(Module(experts), {}, RULES, device, torch.float32, 1 << 34)
    hidden = torch.randn(tokens, HIDDEN, device=device)
    index = torch.rand(tokens, experts, device=device).topk(2).indices
    weights = torch.rand(tokens, 2, device=device)
    taking = LayerStatistics(0, experts, 1, "norm", ONE_RANK)
    taking._residual = residual = torch.randn(tokens, HIDDEN, device=device)
    RoutedExperts(bank, (taking,))(hidden, index, weights)
    outputs = torch.zeros(tokens, 2, HIDDEN, dtype=torch.float64, device=device)
    for expert in range(experts):
        gate, up, down = (
            bank.form(expert, name).to(device).values(torch.float32).double() for name in RULES.projections
        )
        x = hidden.double()
        out = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
        for rank in range(2):
            chosen = index[:, rank] == expert
            outputs[chosen, rank] = out[chosen]
    g, norm = weights.double(), outputs.norm(dim=-1)
    after = residual.double() + (g[..., None] * outputs).sum(dim=1)
    s = (1 - torch.nn.functional.cosine_similarity(residual.double(), after, dim=-1)).clamp(min=0)
    columns = {"count": torch.ones_like(g), "gate": g, "gate_sq": g**2, "norm": norm, "norm_sq": norm**2,
               "gate_norm": g * norm, "gate_norm_token": g * norm * s[:, None]}  # fmt: skip
    worst = 0.0
    for name, values in columns.items():
        expected = torch.zeros(experts, dtype=torch.float64, device=device)
        expected.index_add_(0, index.flatten(), values.flatten())
        found = torch.tensor(taking.sums[0][FIELDS.index(name)], device=device)
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=7)
    given = parser.parse_args()
    device = torch.device("cuda")
    torch.manual_seed(0)
    error = check(device)
    copy, product, link = ceilings(device)
    hidden = torch.randn(given.tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    residual = torch.randn(given.tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    scores = torch.rand(given.tokens, given.experts, device=device)
    weights, index = scores.topk(TOP_K)
    weights = weights / weights.sum(dim=-1, keepdim=True) * 2.5
    taking = LayerStatistics(3, given.experts, 1, "norm", ONE_RANK)
    taking._residual = residual
    begun = time.time()
    host = RandomBank(Module(given.experts), {}, RULES, device, torch.bfloat16, 1 << 40, keep="host")
    for _ in host.stream(list(range(given.experts))):
        pass
    made = time.time() - begun
    resident = RandomBank(Module(given.experts), {}, RULES, device, torch.bfloat16, 1 << 40, keep="device")
    resident._kept = {e: carried.move(lambda form: form.to(device)) for e, carried in host._kept.items()}
    torch.cuda.synchronize()
    stored = sum(carried.nbytes for carried in host._kept.values())
    rows: dict[str, float] = {}

    def run(bank: ExpertBank, observers: tuple[Any, ...]) -> Callable[[], torch.Tensor]:
        return lambda: RoutedExperts(bank, observers)(hidden, index, weights)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rows["resident"] = statistics.median(milliseconds(run(resident, (taking,)), given.repeat))
    peak = torch.cuda.max_memory_allocated() - before
    rows["resident without sums"] = statistics.median(milliseconds(run(resident, ()), given.repeat))
    rows["decode alone"] = statistics.median(
        milliseconds(lambda: [None for _ in resident.stream(list(range(given.experts)))], given.repeat)
    )
    rows["token weights alone"] = statistics.median(
        milliseconds(lambda: token_contributions(residual, hidden), given.repeat)
    )
    rows["sorting alone"] = statistics.median(
        milliseconds(lambda: sort_routing(index, weights, given.experts), given.repeat)
    )
    rows["host"] = statistics.median(milliseconds(run(host, (taking,)), given.repeat))
    pinned = [carried.move(lambda form: form) for carried in host._kept.values()]
    rows["transfer"] = statistics.median(
        milliseconds(lambda: [each.move(lambda form: form.to(device)) for each in pinned], 3)
    )

    def dense() -> None:
        for _, each in resident.stream(list(range(given.experts))):
            for part in hidden.split(8192):
                inner = resident.module._apply_gate(part @ each.gate_up.t())
                torch.linalg.vector_norm(inner @ each.down.t(), dim=-1, dtype=torch.float32)

    rows["dense"] = statistics.median(milliseconds(dense, 2))
    parameters = given.experts * 3 * HIDDEN * INNER
    decode = parameters * 3.0002 / copy * 1e3
    compute = given.tokens * TOP_K * 3 * 2 * HIDDEN * INNER / product * 1e3
    rows["floor"] = decode + compute
    figures = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": given.tokens,
        "experts": given.experts, "error": error, "copy_GB_s": copy / 1e9, "bf16_TFLOP_s": product / 1e12,
        "link_GB_s": link / 1e9, "stored_GB": stored / 1e9, "peak_extra_GB": peak / 1e9, "made_s": made,
        "floor_decode_ms": decode, "floor_compute_ms": compute, **{f"{k}_ms": v for k, v in rows.items()},
        "resident_to_floor": rows["resident"] / rows["floor"],
        "host_to_transfer": rows["host"] / rows["transfer"],
        "dense_to_resident": rows["dense"] / rows["resident"],
    }  # fmt: skip
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
