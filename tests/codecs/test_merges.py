"""The merge kernels against the torch reference and float64: instruction sets, stored forms, ragged edges."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from broken_rows import BROKEN, broken_rows

from surgery.codecs import merge_reference as reference
from surgery.codecs import merges, native
from surgery.codecs import reference as blocks
from surgery.codecs.merges import Kept, Sum, Thin
from surgery.codecs.ops import Operand
from surgery.errors import UsageError

SHAPES = [(1, 1), (1, 300), (129, 127), (256, 256), (300, 130)]
SETS = ("portable", "avx2", "avx512")
CALLS = ("tasks", "sizes", "fusion", "products", "counting", "divergence")
kernels = pytest.mark.skipif(
    native.cpu().library is None, reason=f"no kernels: {native.cpu().reason or 'off'}"
)


@pytest.fixture(params=SETS)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the library use one instruction set, where this processor has it."""
    best = native.cpu().path.removeprefix("cpu ")
    if best not in SETS or SETS.index(request.param) > SETS.index(best):
        pytest.skip(f"this processor has no {request.param}")
    library = native.cpu().library
    chosen = ctypes.addressof(ctypes.c_char.in_dll(library, f"surgery_merge_{request.param}"))

    def pinned(name: str) -> object:
        call = getattr(library, f"surgery_cpu_{name}")
        return staticmethod(lambda _, *rest: call(chosen, *rest))

    held = type("Pinned", (), {f"surgery_cpu_{name}": pinned(name) for name in CALLS})
    monkeypatch.setattr(merges, "library_for", lambda _: native.Native(held, "pinned"))


def operands(shape: tuple[int, int], seed: int = 0, apart: float = 0.1) -> list[Operand]:
    """An FP8, a bf16 and a float32 parent near each other, and another bf16 one."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=random)
    near = [base + apart * torch.randn(shape, generator=random) for _ in range(3)]
    fp8 = Operand(*blocks.encode_fp8_block(base, ue8m0=False))
    return [fp8, Operand(near[0].bfloat16()), Operand(near[1]), Operand(near[2].bfloat16())]


def tiles(parents: list[Operand]) -> list[torch.Tensor]:
    return [parent.decoded() for parent in parents]


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_the_references(loops: None, shape: tuple[int, int]) -> None:
    parents = operands(shape)
    base, *others = values = tiles(parents)
    deltas = [other - base for other in others]
    assert torch.equal(merges.products(parents, offset=False), reference.products(values))
    assert torch.equal(merges.products(parents, offset=True), reference.products(deltas))
    assert torch.equal(merges.task_sums(parents), reference.task_sums(base, others))
    found = merges.row_divergence(parents[0], parents[1])
    assert torch.equal(found, reference.row_divergence(base, others[0]))
    upper = merges.count_sizes(parents, None)
    assert torch.equal(upper, torch.stack([reference.upper_counts(delta.abs()) for delta in deltas]))
    digits = [[int(each.argmax()), int(each.argmax()) + 1] for each in upper]
    lower = merges.count_sizes(parents, digits, found)
    weighted = [delta.abs() * found.unsqueeze(-1) for delta in deltas]
    for rows, size, mine in zip(lower, weighted, digits, strict=True):
        assert torch.equal(rows, torch.stack([reference.lower_counts(size, digit) for digit in mine]))


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l1_norms_are_those_of_float64(loops: None, shape: tuple[int, int]) -> None:
    parents = operands(shape)
    base, *others = tiles(parents)
    thins = [Thin(), Thin(Kept.NOTHING), Thin(Kept.BETWEEN, low=0.02, high=0.1)]
    deltas = [(other - base).double() for other in others]
    size = deltas[2].abs()
    stays = size * ((size >= torch.tensor(0.02)) & (size <= torch.tensor(0.1)))
    want = [*(delta.abs().sum() for delta in deltas), deltas[0].abs().sum(), size.sum() * 0, stays.sum()]
    torch.testing.assert_close(
        merges.task_sizes(parents, thins).sum(0), torch.stack(want), rtol=1e-13, atol=0.0
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_float64(shape: tuple[int, int]) -> None:
    parents = operands(shape, seed=1)
    base, *others = tiles(parents)
    deltas = [(other - base).double() for other in others]
    want = [base.double().square().sum(), *(delta.square().sum() for delta in deltas)]
    want += [(deltas[i] * deltas[j]).sum() for i in range(3) for j in range(i)]
    scale = max(float(each.square().sum()) for each in deltas)
    found = merges.task_sums(parents).sum(0)
    torch.testing.assert_close(found, torch.stack(want), rtol=1e-13, atol=1e-13 * scale)


def test_exp_and_log_are_right() -> None:
    x = torch.cat([-torch.rand(4000, dtype=torch.float64) * 600, torch.tensor([0.0, -1e-12, -700.0])])
    torch.testing.assert_close(reference.exp_of_negative(x), x.exp(), rtol=2e-11, atol=0.0)
    assert float(reference.exp_of_negative(torch.tensor([-math.inf], dtype=torch.float64))) > 0.0
    y = torch.cat([torch.rand(4000, dtype=torch.float64) * 3, 10 ** (16 * torch.rand(999).double() - 8)])
    torch.testing.assert_close(reference.log_of_positive(y), y.log(), rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("apart", [1e-3, 0.3, 30.0])
def test_divergences_are_those_of_float64(apart: float) -> None:
    base, model, *_ = operands((37, 513), seed=2, apart=apart)
    p, q = (each.decoded().double().softmax(-1) + 1e-8 for each in (model, base))
    want = (p * (p / q).log()).sum(-1)
    found = merges.row_divergence(base, model).double()
    assert float((found - want).norm() / want.norm()) < 1e-6


@kernels
@pytest.mark.parametrize("size", [1e-3, 0.02, 0.1, 3.0, 800.0])
@pytest.mark.parametrize("apart", [1e-3, 0.3])
def test_divergences_of_small_and_large_numbers_are_the_references(
    loops: None, size: float, apart: float
) -> None:
    """Rows within reach of the series alone, rows beyond it, and rows with a single far entry."""
    base = torch.randn(9, 300) * size
    model = base * (1 + apart * torch.randn(9, 300))
    base[3, 7], model[4, 299] = 30.0, -2.0
    found = merges.row_divergence(Operand(base), Operand(model.bfloat16()))
    assert torch.equal(found, reference.row_divergence(base, model.bfloat16().float()))
    p, q = (each.double().softmax(-1) + 1e-8 for each in (model.bfloat16(), base))
    want = (p * (p / q).log()).sum(-1)
    assert float((found.double() - want).norm()) < 1e-6 * float(want.norm()) + 1e-12


@kernels
@pytest.mark.parametrize("name", BROKEN)
def test_divergences_of_rows_with_what_is_no_number_are_the_references(loops: None, name: str) -> None:
    base, model = broken_rows(name)
    found = merges.row_divergence(Operand(base), Operand(model))
    assert torch.equal(found, reference.row_divergence(base, model))


@kernels
def test_numbers_that_are_none_are_counted_at_the_end(loops: None) -> None:
    base, model = torch.zeros(2, 200), torch.zeros(2, 200)
    model[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    base[0, 1] = math.inf
    for row_weights in (None, torch.tensor([0.0, -math.nan])):
        counts = merges.count_sizes([Operand(base), Operand(model)], None, row_weights)
        assert int(counts.sum()) == 400 and int(counts[0, 0x7F80:].sum()) >= 2


@kernels
def test_threads_do_not_change_a_bit() -> None:
    parents = operands((700, 650))
    states = torch.arange(1, 25).view(6, 4)
    thins = [Thin(Kept.DRAWN, density=0.5, states=states), Thin(), Thin(Kept.BETWEEN, low=0.05, high=1.0)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 64):
            torch.set_num_threads(threads)
            result, sums = merges.merge_tasks(
                parents, thins, Sum([0.5, 0.3, 0.2], True, True, 0.7), torch.uint8, ue8m0=False
            )
            divergence = merges.row_divergence(parents[0], parents[1])
            found.append((result.values, result.scales, sums, divergence, merges.task_sizes(parents, thins)))
    finally:
        torch.set_num_threads(before)
    for others in zip(*found, strict=True):
        assert all(torch.equal(each, others[0]) for each in others)


@kernels
def test_what_does_not_fit_is_refused() -> None:
    parents = operands((130, 40))
    drawn = Thin(Kept.DRAWN, density=0.5, states=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(UsageError, match="2 blocks"):
        merges.task_sizes(parents, [drawn, Thin(), Thin()])
    for density in (0.0, 1e-46, 1.5, math.nan):
        with pytest.raises(UsageError, match="density"):
            states = torch.zeros(2, 4, dtype=torch.int64)
            merges.task_sizes(parents, [Thin(Kept.DRAWN, density=density, states=states), Thin(), Thin()])
    with pytest.raises(UsageError, match="int64"):
        states = torch.zeros(2, 4, dtype=torch.int32)
        merges.task_sizes(parents, [Thin(Kept.DRAWN, density=0.5, states=states), Thin(), Thin()])
    for digits in ([[]] * 3, [[1], [2], [3, 4]], [[1], [2]], [[1 << 15]] * 3):
        with pytest.raises(UsageError, match="digit"):
            merges.count_sizes(parents, digits)
    with pytest.raises(UsageError, match="no model"):
        merges.merge_tasks(parents[:1], [], Sum([], False, False, 1.0), torch.float32, ue8m0=False)
    with pytest.raises(UsageError, match="no kernels"):
        merges.task_sizes([Operand(torch.zeros(0, 3))] * 2, [Thin()])
    with pytest.raises(UsageError, match="row weights"):
        merges.count_sizes(parents, None, torch.zeros(3))
    with pytest.raises(UsageError, match="one shape"):
        merges.products([parents[0], Operand(torch.zeros(2, 2))], offset=False)
