"""AWQ's search against loops over the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from brain_surgery import random_weights, relative
from torch import Tensor

from surgery.codecs.schemes import IntScheme
from surgery.operators.quantize.awq import (
    awq,
    candidate_scales,
    clip,
    clip_limits,
    scaling_loss,
    weight_means,
)
from surgery.operators.quantize.rtn import rtn

SCHEME = IntScheme(3, 4, False)


def nearest(values: list[float], top: int) -> list[float]:
    """Asymmetric rounding of one group, one number after another."""
    low, high = min(0.0, *values), max(0.0, *values)
    scale = float(torch.tensor((high - low) / top, dtype=torch.float64).float()) or 1.0
    zero = round(-low / scale)
    return [(min(max(round(value / scale) + zero, 0), top) - zero) * scale for value in values]


def by_groups(weights: Tensor) -> Tensor:
    rounded = [nearest(group, 7) for group in weights.view(-1, 4).tolist()]
    return torch.tensor(rounded, dtype=torch.float64).view_as(weights)


def inputs_and_weights() -> tuple[Tensor, Tensor]:
    inputs = random_weights(2, 12, 50, seed=1) * torch.linspace(0.05, 3, 12, dtype=torch.float64)[:, None]
    return inputs, random_weights(2, 7, 12, seed=2)


def test_the_best_ratio_is_that_of_the_loop() -> None:
    inputs, weights = inputs_and_weights()
    found = awq(weights, inputs @ inputs.mT, inputs.abs().mean(-1), SCHEME)
    for b in range(2):
        largest = weights[b].abs().view(7, 3, 4).amax(-1).repeat_interleave(4, 1) + 1e-6
        x, w = inputs[b].abs().mean(-1), (weights[b].abs() / largest).mean(0)
        losses, scales = [], []
        for i in range(-1, 20):
            s = torch.ones(12, dtype=torch.float64)
            if i >= 0:
                s = (x ** (i / 20) / (w ** (1 - i / 20) + 1e-4)).clamp(min=1e-4)
                s = s / (s.max() * s.min()) ** 0.5
            lost = by_groups(weights[b] * s) / s - weights[b]
            losses.append(float(((lost @ inputs[b]) ** 2).sum()))
            scales.append(s)
        best = losses.index(min(losses))
        assert relative(found.losses[:, b], torch.tensor(losses)) < 1e-5
        assert found.ratios[b] == (None if best == 0 else (best - 1) / 20)
        assert relative(found.scales[b], scales[best]) < 1e-12
    assert found.ratios[0] is not None and found.ratios[1] is None, "both kinds take part"


def test_a_matrix_does_not_depend_on_its_batch() -> None:
    inputs, weights = inputs_and_weights()
    gram, means = inputs @ inputs.mT, inputs.abs().mean(-1)
    both, alone = awq(weights, gram, means, SCHEME), awq(weights[1:], gram[1:], means[1:], SCHEME)
    assert both.ratios[1] == alone.ratios[0] and relative(both.scales[1], alone.scales[0]) < 1e-12


@pytest.mark.parametrize("scheme", [SCHEME, IntScheme(3, 0, False)])
def test_limits_are_those_of_the_loop_and_lose_less(scheme: IntScheme) -> None:
    inputs, weights = inputs_and_weights()
    weights = weights.pow(3)
    gram = inputs @ inputs.mT
    limits = clip_limits(weights, gram, scheme)
    width = scheme.width(12)
    for b in range(2):
        for r in range(7):
            for g in range(12 // width):
                group = weights[b, r, g * width : (g + 1) * width]
                block = inputs[b, g * width : (g + 1) * width]
                losses = []
                for i in range(10):
                    most = float(group.abs().max()) * (1 - i / 20)
                    clipped = torch.tensor(nearest(group.clamp(-most, most).tolist(), 7), dtype=torch.float64)
                    losses.append(float((((clipped - group) @ block) ** 2).sum()))
                expected = float(group.abs().max()) * (1 - losses.index(min(losses)) / 20)
                assert float(limits[b, r, g]) == pytest.approx(expected)
    kept = clip(weights, limits)
    spread = limits.repeat_interleave(width, -1)
    assert torch.equal(kept, torch.minimum(torch.maximum(weights, -spread), spread))


def test_losses_are_those_of_rounding_without_scales() -> None:
    inputs, weights = inputs_and_weights()
    ones = torch.ones(2, 12, dtype=torch.float64)
    found = scaling_loss(weights, inputs @ inputs.mT, ones, SCHEME)
    lost = rtn(weights, SCHEME).values() - weights
    assert relative(found, ((lost @ inputs) ** 2).sum((1, 2))) < 1e-6


def test_candidates_are_measured_with_their_clipping() -> None:
    inputs, weights = inputs_and_weights()
    weights = weights.pow(3)
    gram, means = inputs @ inputs.mT, inputs.abs().mean(-1)
    candidates = candidate_scales(means, weight_means(weights, SCHEME))
    found = awq(weights, gram, means, SCHEME, max_shrink=0.5)
    for index, scales in enumerate(candidates):
        scaled, reached = weights * scales[:, None], inputs / scales[..., None]
        limits = clip_limits(scaled, reached @ reached.mT, SCHEME)
        rounded = torch.stack([by_groups(each) for each in clip(scaled, limits)])
        lost = ((rounded @ reached - weights @ inputs) ** 2).sum((1, 2))
        assert relative(found.losses[index], lost) < 1e-5
    assert (found.losses < awq(weights, gram, means, SCHEME).losses).any(), "there is something to clip"
