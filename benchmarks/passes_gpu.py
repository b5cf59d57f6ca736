"""Passes of merge methods in `kernels_gpu.py`: beyond 2^31 weights, and what is timed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from packed_gpu import Case, same

from surgery.codecs import merges
from surgery.codecs.merges import Kept, Sum, Thin
from surgery.codecs.ops import Operand
from surgery.operators.merge.passes import keep_between, weighted_deltas
from surgery.operators.merge.selection import Selector

INFINITE = float("inf")


def check_beyond(rows: int = 65544, cols: int = 32776) -> int:
    """Two FP8 parents of more than 2^31 weights: their last rows come out as they do alone."""
    shape = (-(-rows // 128), -(-cols // 128))
    pair = [
        Operand(
            torch.randint(0, 120, (rows, cols), dtype=torch.uint8, device="cuda"),
            torch.rand(shape, device="cuda") + 0.5,
        )
        for _ in range(2)
    ]
    start = rows // 128 * 128 - 256
    tail = [Operand(each.values[start:], each.scales[start // 128 :]) for each in pair]
    weights, done = torch.rand(rows, device="cuda"), 0
    counts = merges.count_sizes(pair, None)
    assert int(counts.sum()) == rows * cols, "numbers are lost beyond 2^31"
    same(merges.row_divergence(*pair)[start:], merges.row_divergence(*tail), "divergence beyond 2^31")
    whole = merges.merge_fusion(*pair, weights, 0.1, torch.uint8, ue8m0=False)
    part = merges.merge_fusion(*tail, weights[start:].contiguous(), 0.1, torch.uint8, ue8m0=False)
    blocks = part[1].shape[0]
    same(whole[0].values[start:], part[0].values, "codes beyond 2^31")
    same(whole[0].scales[start // 128 :], part[0].scales, "scales beyond 2^31")
    assert torch.equal(whole[1][-blocks:], part[1]), "sums beyond 2^31"
    del whole, part
    states = torch.randint(-(2**62), 2**62, (shape[0], 4))
    thins = [
        Thin(Kept.DRAWN, density=0.5, divide=True, states=each) for each in (states, states[start // 128 :])
    ]
    how = Sum([0.7], True, True, 1.0)
    whole = merges.merge_tasks(pair, thins[:1], how, torch.uint8, ue8m0=False)[0]
    part = merges.merge_tasks(tail, thins[1:], how, torch.uint8, ue8m0=False)[0]
    same(whole.values[start:], part.values, "drawn codes beyond 2^31")
    done += 6
    return done


def small() -> None:
    """One launch of each, for compute-sanitizer."""
    for shape in ((1, 300), (129, 127), (300, 144)):
        values = [torch.randn(shape, device="cuda") for _ in range(4)]
        operands = [Operand(values[0].bfloat16()), Operand(values[1]), *map(Operand, values[2:])]
        for group in (operands, operands[1:]):
            merges.products(group, offset=True)
            upper = merges.count_sizes(group, None)
            merges.count_sizes(group, upper.topk(2).indices.tolist())
            weights = merges.row_divergence(*group[:2])
            states = torch.randint(-(2**62), 2**62, (-(-shape[0] // 128), 4))
            thins = [Thin(Kept.DRAWN, density=0.5, states=states), Thin(), Thin(Kept.BETWEEN, high=1.0)]
            for dtype in (torch.uint8, torch.bfloat16):
                merges.merge_fusion(*group[:2], weights, 0.1, dtype, ue8m0=False)
                for count in (2, 3, len(group)):
                    some, how = thins[: count - 1], Sum([0.5] * (count - 1), True, True, 1.0)
                    merges.task_sizes(group[:count], some)
                    merges.merge_tasks(group[:count], some, how, dtype, ue8m0=False)


def selected(pair: Sequence[Operand], rank: int) -> float:
    """A magnitude by its rank, in two readings."""
    selector = Selector([rank])
    selector.add(merges.count_sizes(pair, None)[0].cpu())
    selector.next_round()
    selector.add(merges.count_sizes(pair, [selector.digits])[0].cpu())
    return selector.values()[0]


def cases(base: torch.Tensor, second: torch.Tensor) -> list[Case]:
    """Of bf16 matrices; eager forms on an eighth, which is what their copies leave room for."""
    models = [base + 0.1 * second, base - 0.1 * second]
    operands = [Operand(each) for each in (base, *models)]
    pair, rank = operands[:2], base.numel() // 2
    few = [each[: len(base) // 8] for each in (base, *models)]
    few_rank = few[0].numel() // 2
    threshold = selected([Operand(each) for each in few[:2]], few_rank)
    gaps = (few[1].float() - few[0].float()).abs().view(-1)
    assert threshold == float(gaps.kthvalue(few_rank + 1).values), "another k-th magnitude"
    del gaps
    weights = merges.row_divergence(*pair)
    thin = [Thin(Kept.BETWEEN, threshold, INFINITE)] * 2
    how = Sum([0.5, 0.5], elect=True, divide=True, scale=1.0)
    mode = int(merges.count_sizes(pair, None)[0].argmax())
    states = torch.randint(-(2**62), 2**62, (-(-len(base) // 128), 4))
    drawn = [Thin(Kept.DRAWN, density=0.5, divide=True, states=states)] * 2
    write = {"dtype": torch.bfloat16, "ue8m0": False}

    def eager_divergence(dtype: torch.dtype) -> torch.Tensor:
        p, q = (each.to(dtype).softmax(-1) + 1e-8 for each in (few[1], few[0]))
        return p.mul_((p / q).log_()).sum(-1)

    def eager_fusion() -> torch.Tensor:
        start = few[0].float()
        delta = few[1].float().sub_(start)
        kept = delta.abs().mul_(weights[: len(few[0]), None]) >= 1e-9
        return delta.mul_(kept).add_(start).bfloat16()

    def eager_ties() -> torch.Tensor:
        start = few[0].float()
        deltas = [keep_between(each.float().sub_(start), threshold, INFINITE) for each in few[1:]]
        return weighted_deltas(deltas, [0.5, 0.5], consensus=True, normalize=True).add_(start).bfloat16()

    return [
        ("counts of differences, upper 16 bits", 4, partial(merges.count_sizes, pair, None)),
        ("counts of differences, lower 16 bits", 4, partial(merges.count_sizes, pair, [[mode, mode + 1]])),
        ("k-th difference of bf16", 8, partial(selected, pair, rank)),
        ("divergence of rows", 4, partial(merges.row_divergence, *pair)),
        ("dot products of two differences", 6, partial(merges.products, operands, offset=True)),
        ("fusion, masked write", 6, partial(merges.merge_fusion, *pair, weights, 1e-9, **write)),
        ("ties of two, masked write", 8, partial(merges.merge_tasks, operands, thin, how, **write)),
        ("dare of two, masked write", 8, partial(merges.merge_tasks, operands, drawn, how, **write)),
        ("k-th difference of bf16, eager", 8 / 8,
         lambda: (few[1].float() - few[0].float()).abs_().view(-1).kthvalue(few_rank + 1)),
        ("divergence of rows, eager float64", 4 / 8, partial(eager_divergence, torch.float64)),
        ("divergence of rows, eager float32", 4 / 8, partial(eager_divergence, torch.float32)),
        ("fusion, eager", 6 / 8, eager_fusion),
        ("ties of two, eager", 8 / 8, eager_ties),
    ]  # fmt: skip
