"""GPTQ against optimal brain surgery from its definition, whatever the groups, blocks and order."""

from __future__ import annotations

import pytest
import torch
from brain_surgery import brain_surgery, correlated_gram, damped, random_weights, relative
from torch import Tensor

from surgery.codecs.grid import fit_grid
from surgery.codecs.schemes import IntScheme
from surgery.operators.layerwise.hessian import factorize
from surgery.operators.layerwise.reconstruction import reconstruction_error
from surgery.operators.layerwise.sweep import column_blocks
from surgery.operators.quantize.gptq import gptq
from surgery.operators.quantize.rtn import rtn

Grid = tuple[Tensor, Tensor]


def grid_of(group: Tensor, scheme: IntScheme) -> Grid:
    """(scale, zero) of [R, any] values, from the formula."""
    low, high = group.amin(-1).clamp(max=0), group.amax(-1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    scale = (span / scheme.top).float().double()
    zero = torch.full_like(scale, scheme.middle) if scheme.symmetric else (-low / scale).round()
    return scale, zero


def never(costs: Tensor, weights: Tensor, c: int) -> None:
    return None


CASES = [
    (30, 6, 16),  # groups narrower than a block that they do not divide
    (32, 4, 8),
    (60, 20, 8),  # wider, no multiple
    (48, 24, 8),
    (26, 0, 8),  # one group a row
    (21, 7, 128),
    (18, 9, 1),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("cols", "group", "block"), CASES)
def test_codes_are_those_of_the_definition(
    cols: int, group: int, block: int, static: bool, symmetric: bool
) -> None:
    scheme = IntScheme(3, group, symmetric)
    width = scheme.width(cols)
    gram, weights = correlated_gram(2, cols, seed=cols), random_weights(2, 5, cols, seed=group)
    found = gptq(weights, factorize(gram, 0.01), scheme, static_groups=static, block_size=block)
    assert found.quantized is not None
    for b in range(2):
        grids: dict[int, Grid] = {}

        def rounded(
            now: Tensor, column: Tensor, c: int, b: int = b, grids: dict[int, Grid] = grids
        ) -> Tensor:
            first = c // width * width
            if c == first:
                source = weights[b] if static else now
                grids[first] = grid_of(source[:, first : first + width], scheme)
            scale, zero = grids[first]
            return ((column / scale).round() + zero).clamp(0, scheme.top).sub(zero) * scale

        expected, _ = brain_surgery(weights[b], damped(gram[b], 0.01), never, rounded)
        assert relative(found.values[b], expected) < 1e-6
        scales = torch.stack([grids[first][0] for first in sorted(grids)], 1)
        assert relative(found.quantized.scales[b], scales) < 1e-6
        zeros = torch.stack([grids[first][1] for first in sorted(grids)], 1)
        assert torch.equal(found.quantized.zeros[b].double(), zeros)
    assert torch.equal(found.quantized.values(), found.values.float())


@pytest.mark.parametrize("scheme", [IntScheme(4, 8, False), IntScheme(2, 0, True)])
def test_act_order_is_the_sweep_of_the_reordered_matrix(scheme: IntScheme) -> None:
    gram, weights = correlated_gram(2, 24, seed=1), random_weights(2, 6, 24, seed=2)
    factors = factorize(gram, 0.02, act_order=True)
    found = gptq(weights, factors, scheme, static_groups=True, block_size=8)
    assert found.quantized is not None
    width = scheme.width(24)
    for b in range(2):
        order = sorted(range(24), key=lambda c: -float(gram[b, c, c]))
        grids = [grid_of(weights[b, :, g : g + width], scheme) for g in range(0, 24, width)]

        def rounded(
            now: Tensor,
            column: Tensor,
            c: int,
            order: list[int] = order,
            grids: list[tuple[Tensor, Tensor]] = grids,
        ) -> Tensor:
            scale, zero = grids[order[c] // width]
            return ((column / scale).round() + zero).clamp(0, scheme.top).sub(zero) * scale

        hessian = damped(gram[b], 0.02)[order][:, order]
        swept, _ = brain_surgery(weights[b][:, order], hessian, never, rounded)
        expected = torch.empty_like(swept)
        expected[:, order] = swept
        assert relative(found.values[b], expected) < 1e-6
    assert torch.equal(found.quantized.values(), found.values.float())


def test_act_order_of_moving_groups_is_refused() -> None:
    gram, weights = correlated_gram(1, 8, seed=3), random_weights(1, 2, 8, seed=4)
    factors = factorize(gram, 0.01, act_order=True)
    with pytest.raises(ValueError, match="static groups"):
        gptq(weights, factors, IntScheme(4, 4))
    with pytest.raises(ValueError, match="do not divide"):
        gptq(weights, factorize(gram, 0.01), IntScheme(4, 3))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_sweep_loses_less_than_rounding_to_nearest(bits: int, act_order: bool) -> None:
    gram = correlated_gram(2, 96, seed=5).float()
    weights = random_weights(2, 48, 96, seed=6).float()
    scheme = IntScheme(bits, 32, False)
    found = gptq(weights, factorize(gram, 0.01, act_order=act_order), scheme, static_groups=act_order)
    nearest = reconstruction_error(weights, rtn(weights, scheme).values(), gram)
    assert (reconstruction_error(weights, found.values, gram).error < 0.6 * nearest.error).all()


def test_weights_of_inputs_that_never_occur_are_rounded() -> None:
    gram, weights = correlated_gram(1, 12, seed=7), random_weights(1, 4, 12, seed=8)
    gram[:, 3] = 0
    gram[:, :, 3] = 0
    scheme = IntScheme(4, 0)
    found = gptq(weights, factorize(gram, 0.01), scheme)
    assert relative(found.values[..., 3], rtn(weights, scheme).values()[..., 3]) < 1e-6


def test_a_matrix_at_fault_is_rounded_to_nearest_and_spoils_no_other() -> None:
    gram, weights = correlated_gram(3, 12, seed=9), random_weights(3, 4, 12, seed=10)
    weights[2] = 0
    gram[1] = torch.nan
    scheme = IntScheme(4, 6, False)
    found = gptq(weights, factorize(gram, 0.01), scheme, scale_dtype=torch.bfloat16)
    assert found.quantized is not None and found.values.isfinite().all()
    assert torch.equal(found.quantized.codes[1], rtn(weights[1], scheme, scale_dtype=torch.bfloat16).codes)
    assert torch.equal(found.quantized.scales, found.quantized.scales.bfloat16().float())
    assert not found.values[2].any()
    alone = gptq(weights[:1], factorize(gram[:1], 0.01), scheme, scale_dtype=torch.bfloat16)
    assert relative(found.values[0], alone.values[0]) < 1e-12


def test_zeros_stay_where_they_are_to() -> None:
    gram, weights = correlated_gram(1, 16, seed=11), random_weights(1, 8, 16, seed=12)
    weights[weights.abs() < 0.5] = 0
    factors, scheme = factorize(gram, 0.01), IntScheme(4, 8, False)
    found = gptq(weights, factors, scheme, keep_zeros=True)
    assert found.quantized is not None
    assert not found.values[weights == 0].any() and not found.quantized.values()[weights == 0].any()
    assert gptq(weights, factors, scheme).values[weights == 0].any()


def test_a_shrunk_grid_is_the_best_of_its_candidates() -> None:
    weights = random_weights(3, 2, 12, seed=13).pow(3)
    for scheme in (IntScheme(2, 4, True), IntScheme(3, 6, False)):
        found = fit_grid(weights, scheme, "mse")
        width, best = scheme.width(12), []
        for group in weights.reshape(-1, width):
            least: tuple[float, float, float] | None = None
            for i in range(80):
                scale, zero = grid_of(group[None] * (1 - i / 100), scheme)
                value = ((group / scale).round() + zero).clamp(0, scheme.top).sub(zero) * scale
                error = float(((value - group).abs() ** 2.4).sum())
                if least is None or error < least[0] - 1e-12:
                    least = (error, float(scale), float(zero))
            assert least is not None
            best.append(least[1:])
        expected = torch.tensor(best)
        assert relative(found.scales.flatten(), expected[:, 0]) < 1e-6
        assert torch.equal(found.zeros.flatten().float(), expected[:, 1])
        assert found.scales.shape == (3, 2, 12 // width)


def test_blocks_keep_groups_whole() -> None:
    assert column_blocks(300, 128, 100) == [(0, 100), (100, 200), (200, 300)]
    assert column_blocks(96, 64, 24) == [(0, 48), (48, 96)]
    assert column_blocks(400, 128, 200) == [(0, 128), (128, 200), (200, 328), (328, 400)]
    assert column_blocks(130, 64, 1) == [(0, 64), (64, 128), (128, 130)]
