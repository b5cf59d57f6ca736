"""The column sweep: the torch form against float64 and a plain loop, the kernels against the torch form."""

from __future__ import annotations

import pytest
import torch
from kernel_sets import SETS, device, kernels, pinned

from surgery.codecs import column_sweep, ops
from surgery.codecs.column_sweep import BlockGrid, SweptBlock
from surgery.errors import UsageError

SHAPES = [(1, 1, 1), (1, 33, 7), (3, 17, 96), (1, 70, 127), (2, 40, 128)]
PATTERNS = [(1, 1), (1, 2), (2, 4), (1, 3), (3, 5), (4, 8), (2, 12), (7, 16)]


def factors(batch: int, cols: int) -> torch.Tensor:
    """Upper factors, with what a sweep must not read below the diagonal."""
    upper = torch.randn(batch, cols, cols) * 0.3
    upper.diagonal(dim1=1, dim2=2).copy_(torch.rand(batch, cols) + 0.5)
    return upper


def grids(batch: int, rows: int, cols: int, groups: int, top: int, magnitude: float = 1.0) -> BlockGrid:
    """Columns in groups in no order."""
    scales = (torch.rand(batch, rows, groups) + 0.5) * (3 * magnitude / top)
    zeros = torch.randint(0, top + 1, scales.shape).to(torch.uint8)
    return BlockGrid(scales, zeros, torch.randint(0, groups, (batch, cols)).int(), top)


def moved(grid: BlockGrid | None, device: str) -> BlockGrid | None:
    return grid and BlockGrid(grid.scales.to(device), grid.zeros.to(device), grid.group.to(device), grid.top)


def same(found: SweptBlock, want: SweptBlock) -> None:
    assert (found.codes is None) == (want.codes is None)
    for left, right in zip(found, want, strict=True):
        if left is None or right is None:
            continue
        assert left.dtype == right.dtype and left.shape == right.shape
        left, right = left.cpu().contiguous(), right.cpu().contiguous()
        if left.is_floating_point():
            assert torch.equal(left.isnan(), right.isnan())
            left, right = (each.nan_to_num(0.0, 9e37, -9e37).view(torch.int32) for each in (left, right))
        assert torch.equal(left, right), f"{int((left != right).sum())} of {left.numel()} differ"


def compare(device: str, weights: torch.Tensor, factor: torch.Tensor, **options: object) -> SweptBlock:
    grid = options.pop("grid", None)
    mask = options.pop("mask", None)
    assert grid is None or isinstance(grid, BlockGrid)
    assert mask is None or isinstance(mask, torch.Tensor)
    want = column_sweep.sweep_block(weights, factor, mask=mask, grid=grid, **options)  # type: ignore[arg-type]
    there = None if mask is None else mask.to(device)
    found = ops.sweep_block(
        weights.to(device),
        factor.to(device),
        mask=there,
        grid=moved(grid, device),
        **options,  # type: ignore[arg-type]
    )
    same(found, want)
    return want


def test_the_torch_form_is_the_formula_in_float64() -> None:
    """The values that stay and e, by back substitution over the whole block: (w − q) = E · U."""
    weights, factor = torch.randn(2, 30, 24), torch.triu(factors(2, 24))
    mask = (torch.rand(2, 30, 24) < 0.5).to(torch.uint8)
    for grid in (None, grids(2, 30, 24, 3, 15)):
        swept = column_sweep.sweep_block(weights, factor, mask=mask, grid=grid)
        gap = (weights - swept.values).double()
        made = swept.errors.double() @ factor.double()
        assert (gap - made).norm() / gap.norm() < 1e-5
        assert (swept.values[mask.bool()] == 0).all()
        if grid is not None and swept.codes is not None:
            group = grid.group[:, None].long().expand_as(weights)
            points = swept.codes.float() - grid.zeros.float().gather(-1, group)
            torch.testing.assert_close(swept.values, points * grid.scales.gather(-1, group), rtol=0, atol=0)


def test_a_pattern_prunes_the_smallest_at_their_turn() -> None:
    """Against a loop over rows in float64, where ties and rounding decide nothing."""
    weights, factor = torch.randn(1, 20, 16).double(), factors(1, 16).double()
    found = column_sweep.sweep_block(weights.float(), factor.float(), pattern=(2, 4))
    for row in range(20):
        w, kept = weights[0, row].clone(), torch.zeros(16, dtype=torch.bool)
        for c in range(16):
            if c % 4 == 0:
                score = (w[c : c + 4] / factor[0].diagonal()[c : c + 4]) ** 2
                kept[c : c + 4] = score >= score.sort().values[2]
            error = torch.zeros(()) if kept[c] else w[c] / factor[0, c, c]
            w[c + 1 :] -= error * factor[0, c, c + 1 :]
            w[c] = w[c] if kept[c] else 0.0
        assert (found.values[0, row] - w).norm() / w.norm() < 1e-4


@device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groups", [0, 1, 5])
def test_masks_and_grids_are_the_torch_forms(device: str, shape: tuple[int, int, int], groups: int) -> None:
    batch, rows, cols = shape
    for top in (3, 15, 255) if groups else (0,):
        weights, factor = torch.randn(shape), factors(batch, cols)
        grid = grids(batch, rows, cols, groups, top) if groups else None
        compare(device, weights, factor, grid=grid)
        compare(device, weights, factor, grid=grid, mask=(torch.rand(shape) < 0.5).to(torch.uint8))


@device
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_are_the_torch_forms(device: str, pattern: tuple[int, int]) -> None:
    n, m = pattern
    for cols in (m, 128 // m * m, (60 // m) * m):
        if not cols:
            continue
        weights, factor = torch.randn(2, 37, cols), factors(2, cols)
        weights[0, ::2] = weights[0, ::2].round()
        factor[0].diagonal().fill_(0.5)
        swept = compare(device, weights, factor, pattern=pattern)
        gone = (swept.values == 0).view(2, 37, -1, m).sum(-1)
        assert int(gone.min()) >= n
        compare(device, weights, factor, pattern=pattern, grid=grids(2, 37, cols, 3, 15))


@device
@pytest.mark.parametrize("magnitude", [1e-43, 1e-38, 1e-20, 1e10, 1e37])
def test_very_small_and_large_values(device: str, magnitude: float) -> None:
    """Denormals, and sums that overflow: the division proper takes over where a reciprocal would not do."""
    weights, factor = torch.randn(1, 50, 64) * magnitude, factors(1, 64)
    weights[0, 0, ::3], weights[0, 1, ::2] = -0.0, 0.0
    for spread in (1.0, magnitude):
        grid = grids(1, 50, 64, 4, 15, magnitude * spread)
        for scaled in (factor, factor * spread):
            compare(device, weights, scaled, grid=grid)
            compare(device, weights, scaled, grid=grid, mask=(torch.rand(1, 50, 64) < 0.5))
            compare(device, weights, scaled, pattern=(2, 4))


@device
def test_ties_and_broken_values(device: str) -> None:
    """Halves between two codes; NaN and infinities spoil their row alone, and go last in a pattern."""
    weights = torch.arange(-64, 64).float().repeat(1, 6, 1) / 4
    factor = torch.eye(128)[None]
    grid = BlockGrid(torch.full((1, 6, 1), 0.5), torch.full((1, 6, 1), 8).to(torch.uint8),
                     torch.zeros(1, 128, dtype=torch.int32), 15)  # fmt: skip
    compare(device, weights, factor, grid=grid)
    weights[0, 1, 9], weights[0, 2, 30], weights[0, 3, 64] = torch.nan, torch.inf, -torch.inf
    for options in ({}, {"pattern": (2, 4)}, {"pattern": (3, 8)}):
        swept = compare(device, weights, factors(1, 128), **options)
        assert swept.values[0, [0, 4, 5]].isfinite().all()


@device
def test_operands_and_results_may_be_slices(device: str) -> None:
    whole, upper = torch.randn(2, 41, 300).to(device), factors(2, 300).to(device)
    grid = moved(grids(2, 41, 300, 7, 15), device)
    assert grid is not None
    codes = torch.full((2, 41, 300), 77, dtype=torch.uint8, device=device)
    for first, last in ((0, 128), (128, 256), (256, 300), (3, 70)):
        cut = slice(first, last)
        grid_there = grid._replace(group=grid.group[:, cut])
        want = column_sweep.sweep_block(whole[..., cut].cpu(), upper[:, cut, cut].cpu(),
                                        grid=moved(grid_there, "cpu"))  # fmt: skip
        before = whole.clone()
        errors = torch.empty(2, 41, 400, device=device)[..., 100 : 100 + last - first]
        into = SweptBlock(whole[..., cut], errors, codes[..., cut])
        found = ops.sweep_block(whole[..., cut], upper[:, cut, cut], grid=grid_there, into=into)
        same(found, want)
        same(SweptBlock(whole[..., cut], errors, codes[..., cut]), want)
        assert torch.equal(whole[..., :first], before[..., :first])
        assert torch.equal(whole[..., last:], before[..., last:])


@device
def test_one_factor_may_serve_a_batch(device: str) -> None:
    weights, factor = torch.randn(3, 20, 64), factors(1, 64).expand(3, 64, 64)
    want = column_sweep.sweep_block(weights, factor, pattern=(2, 4))
    one = factor[:1].to(device).expand(3, 64, 64)
    same(ops.sweep_block(weights.to(device), one, pattern=(2, 4)), want)


@kernels
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_gives_equal_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = pinned(name)
    monkeypatch.setattr(ops, "library_for", lambda _: held)
    weights, factor = torch.randn(1, 45, 120), factors(1, 120)
    for options in ({"grid": grids(1, 45, 120, 3, 7)}, {"pattern": (2, 4)}, {"pattern": (5, 12)}):
        compare("cpu", weights, factor, **options)


@kernels
def test_threads_do_not_change_a_bit() -> None:
    weights, factor = torch.randn(2, 90, 64), factors(2, 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 64):
            torch.set_num_threads(threads)
            compare("cpu", weights, factor, grid=grids(2, 90, 64, 2, 15))
    finally:
        torch.set_num_threads(before)


def test_without_kernels_the_torch_form_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_KERNELS", "reference")
    compare("cpu", torch.randn(2, 9, 20), factors(2, 20), grid=grids(2, 9, 20, 2, 15))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (1, 3, 200)], ids=str)
def test_empty_and_wide_blocks(shape: tuple[int, int, int]) -> None:
    compare("cpu", torch.randn(shape), factors(shape[0], shape[2]))


def test_float64_takes_the_torch_form() -> None:
    weights, factor = torch.randn(2, 5, 8).double(), factors(2, 8).double()
    found = ops.sweep_block(weights, factor, pattern=(2, 4))
    want = column_sweep.sweep_block(weights, factor, pattern=(2, 4))
    assert torch.equal(found.values, want.values) and torch.equal(found.errors, want.errors)


def test_operands_that_do_not_fit_are_refused() -> None:
    weights, factor = torch.randn(2, 5, 12), factors(2, 12)
    grid = grids(2, 5, 12, 3, 15)
    for bad in (factor[:1], factor[..., :8], factor.double()):
        with pytest.raises(UsageError, match="factor"):
            ops.sweep_block(weights, bad)
    with pytest.raises(UsageError, match="float32"):
        ops.sweep_block(weights[0], factor)
    with pytest.raises(UsageError, match="5:4"):
        ops.sweep_block(weights, factor, pattern=(5, 4))
    with pytest.raises(UsageError, match="2:8"):
        ops.sweep_block(weights, factor, pattern=(2, 8))
    with pytest.raises(UsageError, match="mask"):
        ops.sweep_block(weights, factor, mask=torch.ones(2, 5, 12))
    for bad_grid in (grid._replace(group=grid.group + 3), grid._replace(group=grid.group - 1)):
        with pytest.raises(UsageError, match="groups"):
            ops.sweep_block(weights, factor, grid=bad_grid)
    with pytest.raises(UsageError, match="256"):
        ops.sweep_block(weights, factor, grid=grid._replace(top=256))
    into = SweptBlock(weights.clone(), weights.clone(), None)
    with pytest.raises(UsageError, match="codes"):
        ops.sweep_block(weights, factor, grid=grid, into=into)
    with pytest.raises(UsageError, match="contiguous"):
        ops.sweep_block(weights, factor, into=into._replace(errors=torch.empty(2, 12, 5).mT))
