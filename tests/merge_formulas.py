"""The formulas of the merge methods in float64, written from the papers and sharing nothing with the
package."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Tensor = torch.Tensor


def linear(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(w * m for w, m in zip(weights, models, strict=True)) / sum(weights)  # type: ignore[return-value]


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    u, v = a.flatten(), b.flatten()
    cosine = float(u @ v / (u.norm() * v.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def row_slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    if a.ndim < 2:
        return slerp(a, b, t)
    return torch.stack([slerp(x, y, t) for x, y in zip(a, b, strict=True)])


def karcher(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    share = [w / sum(weights) for w in weights]
    norms = [m.norm() for m in models]
    units = [m / n for m, n in zip(models, norms, strict=True)]
    mean = sum(w * u for w, u in zip(share, units, strict=True))
    mean = mean / mean.norm()  # type: ignore[union-attr]
    for _ in range(500):
        step = torch.zeros_like(mean)
        for w, u in zip(share, units, strict=True):
            cosine = (u * mean).sum().clamp(-1, 1)
            tangent = u - cosine * mean
            if tangent.norm() > 1e-15:
                step += w * torch.acos(cosine) * tangent / tangent.norm()
        size = step.norm()
        if size < 1e-15:
            break
        mean = torch.cos(size) * mean + torch.sin(size) * step / size
    return mean * sum(w * n for w, n in zip(share, norms, strict=True))


def model_stock(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    deltas = [(m - base).flatten() for m in models]
    count = len(deltas)
    pairs = [
        float(deltas[i] @ deltas[j] / (deltas[i].norm() * deltas[j].norm()))
        for i in range(count) for j in range(count) if i < j
    ]  # fmt: skip
    cosine = max(0.0, sum(pairs) / len(pairs))
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * torch.stack(list(models)).mean(0) + (1 - t) * base


def trimmed(delta: Tensor, density: float, gamma: float = 0.0) -> Tensor:
    """The largest after the very largest: by sorting, which the package does not do."""
    n = delta.numel()
    order = delta.abs().flatten().sort(descending=True).values
    top = int(gamma * n)
    count = min(int(density * n), n - top)
    if not count:
        return torch.zeros_like(delta)
    high, low = order[top], order[top + count - 1]
    return torch.where((delta.abs() <= high) & (delta.abs() >= low), delta, 0.0)


def task_sum(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], scale: float = 1.0) -> Tensor:
    return base + scale * sum(w * d for w, d in zip(weights, deltas, strict=True))


def elected(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], *, divide: bool) -> Tensor:
    """Entry by entry."""
    out = base.clone().flatten()
    flat = [d.flatten() for d in deltas]
    for k in range(out.numel()):
        terms = [w * float(d[k]) for w, d in zip(weights, flat, strict=True)]
        sign = 1 if sum(terms) >= 0 else -1
        taking = [i for i, term in enumerate(terms) if term * sign > 0]
        if taking:
            total = sum(terms[i] for i in taking)
            out[k] += total / sum(weights[i] for i in taking) if divide else total
    return out.view(base.shape)


def sce(base: Tensor, models: Sequence[Tensor], topk: float) -> Tensor:
    deltas = torch.stack([m - base for m in models])
    variance = deltas.var(0, unbiased=False)
    count = int(topk * base.numel())
    if topk < 1:
        border = variance.flatten().sort(descending=True).values[count - 1]
        deltas = torch.where(variance >= border, deltas, 0.0)
    weights = deltas.square().flatten(1).mean(1)
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = (deltas.sign() == sign).double()
    shaped = weights.view(-1, *[1] * base.ndim)
    divisor = (shaped * agree).sum(0)
    return base + (shaped * agree * deltas).sum(0) / torch.where(divisor == 0, 1.0, divisor)


def fusion(base: Tensor, model: Tensor) -> Tensor:
    p, q = torch.softmax(model, -1) + 1e-8, torch.softmax(base, -1) + 1e-8
    divergence = (p * (p / q).log()).sum(-1, keepdim=True).clamp(min=0)
    importance = (model - base).abs() * divergence
    ordered = importance.flatten().sort().values
    q1, q2, q3 = (ordered[int(share * (ordered.numel() - 1))] for share in (0.25, 0.5, 0.75))
    return base + (model - base) * (importance >= q2 + 1.5 * (q3 - q1))
