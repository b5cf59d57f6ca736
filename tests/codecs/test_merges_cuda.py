"""The merge kernels on CUDA against the CPU's, bit for bit: stored forms, ragged edges, many models."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from broken_rows import BROKEN, broken_rows

from surgery.codecs import merges, native
from surgery.codecs import reference as blocks
from surgery.codecs.merges import Kept, Sum, Thin
from surgery.codecs.ops import Operand
from surgery.errors import UsageError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(native.cpu().library is None, reason=f"no kernels: {native.cpu().reason}"),
]
SHAPES = [(1, 1), (1, 300), (3, 40), (129, 127), (256, 256), (300, 136), (385, 1032)]
FORMS = ["fp8", "bf16", "fp32", "mixed"]


def parents(shape: tuple[int, int], form: str, count: int, apart: float = 0.1) -> list[Operand]:
    base = torch.randn(shape) * 0.05
    near = [base, *(base + apart * 0.05 * torch.randn(shape) for _ in range(count - 1))]
    if form == "mixed":
        forms = ["fp8", "bf16", "fp32", "bf16"]
        return [stored(each, forms[i % 4]) for i, each in enumerate(near)]
    return [stored(each, form) for each in near]


def stored(values: torch.Tensor, form: str) -> Operand:
    if form == "fp8":
        return Operand(*blocks.encode_fp8_block(values, ue8m0=False))
    return Operand(values.bfloat16() if form == "bf16" else values)


def there(operands: Sequence[Operand]) -> list[Operand]:
    return [Operand(o.values.cuda(), None if o.scales is None else o.scales.cuda()) for o in operands]


def same(found: Operand | torch.Tensor, want: Operand | torch.Tensor) -> None:
    if isinstance(found, Operand) and isinstance(want, Operand):
        same(found.values, want.values)
        assert (found.scales is None) == (want.scales is None)
        if found.scales is not None and want.scales is not None:
            same(found.scales, want.scales)
        return
    assert isinstance(found, torch.Tensor) and isinstance(want, torch.Tensor)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
    assert torch.equal(found.cpu().view(whole), want.view(whole))


def states(rows: int, count: int) -> list[torch.Tensor]:
    return [torch.randint(-(2**62), 2**62, (-(-rows // 128), 4)) for _ in range(count)]


def thinnings(rows: int, models: int) -> list[list[Thin]]:
    drawn = [
        Thin(Kept.DRAWN, density=0.3, divide=i % 2 == 0, states=each, factor=1.0 if i else 0.7)
        for i, each in enumerate(states(rows, models))
    ]
    kinds = [Thin(), Thin(Kept.NOTHING), Thin(Kept.BETWEEN, low=0.002, high=0.01, factor=1.3), drawn[0]]
    return [[Thin()] * models, drawn, [kinds[i % 4] for i in range(1, models + 1)]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(shape: tuple[int, int], form: str) -> None:
    for count in (1, 2, 3, 4, 5, 8):
        here = parents(shape, form, count)
        for offset in (False, True)[: min(count, 2)]:
            found = merges.products(there(here), offset=offset)
            assert found.is_cuda
            same(found, merges.products(here, offset=offset))
        if count == 1:
            continue
        same(merges.task_sums(there(here)), merges.task_sums(here))
        for thins in thinnings(shape[0], count - 1):
            same(merges.task_sizes(there(here), thins), merges.task_sizes(here, thins))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70000)], ids=str)
def test_divergences(shape: tuple[int, int], form: str) -> None:
    for apart in (1e-3, 0.3, 300.0):
        here = parents(shape, form, 2, apart)
        same(merges.row_divergence(*there(here)), merges.row_divergence(*here))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts(shape: tuple[int, int], form: str) -> None:
    for count, apart in ((2, 0.1), (4, 1e-30), (2, 0.0), (3, 1e15)):
        here = parents(shape, form, count, apart)
        for weights in (None, torch.rand(shape[0]), torch.zeros(shape[0])):
            upper = merges.count_sizes(here, None, weights)
            same(merges.count_sizes(there(here), None, weights), upper)
            top = [[int(d) for d in each.topk(9).indices] for each in upper]
            lower = merges.count_sizes(here, top, weights)
            same(merges.count_sizes(there(here), top, weights), lower)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results(shape: tuple[int, int], form: str, dtype: torch.dtype) -> None:
    for count in (2, 3, 4, 8):
        here = parents(shape, form, count)
        weights = [0.5, -0.3, 0.9, 0.2, 0.0, 1.1, 0.4][: count - 1]
        for thins in thinnings(shape[0], count - 1):
            for elect, divide in ((False, False), (False, True), (True, False), (True, True)):
                how = Sum(weights, elect, divide, 0.8)
                for ue8m0 in (False, True):
                    found = merges.merge_tasks(there(here), thins, how, dtype, ue8m0=ue8m0)
                    want = merges.merge_tasks(here, thins, how, dtype, ue8m0=ue8m0)
                    same(found[0], want[0])
                    same(found[1], want[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fusions(shape: tuple[int, int], form: str, dtype: torch.dtype) -> None:
    here = parents(shape, form, 2)
    weights = torch.rand(shape[0])
    for threshold in (0.0, 0.002, 1e9):
        found = merges.merge_fusion(*there(here), weights, threshold, dtype, ue8m0=False)
        want = merges.merge_fusion(*here, weights, threshold, dtype, ue8m0=False)
        same(found[0], want[0])
        same(found[1], want[1])


@pytest.mark.parametrize("name", BROKEN)
def test_divergences_of_rows_with_what_is_no_number(name: str) -> None:
    here = [Operand(each) for each in broken_rows(name)]
    same(merges.row_divergence(*there(here)), merges.row_divergence(*here))


def test_more_blocks_than_run_at_once() -> None:
    """Each thread block takes several."""
    here = parents((128 * 3000 + 5, 8), "bf16", 2)
    upper = merges.count_sizes(here, None)
    same(merges.count_sizes(there(here), None), upper)
    top = [[int(each.argmax()), 0] for each in upper]
    same(merges.count_sizes(there(here), top), merges.count_sizes(here, top))


def test_more_operands_than_a_kernel_takes_are_refused() -> None:
    far = there(parents((3, 40), "bf16", 17))
    with pytest.raises(UsageError, match="16 operands at most, not 17"):
        merges.task_sums(far)


def test_without_kernels_the_reference_counts_there(monkeypatch: pytest.MonkeyPatch) -> None:
    here = parents((130, 40), "mixed", 3)
    want = (merges.products(here, offset=True), merges.task_sums(here), merges.count_sizes(here, None))
    monkeypatch.setattr(merges, "library_for", lambda _: native.Native(None, "reference"))
    far = there(here)
    found = (merges.products(far, offset=True), merges.task_sums(far), merges.count_sizes(far, None))
    for one, other in zip(found, want, strict=True):
        same(one, other)
    same(merges.row_divergence(*far[:2]), merges.row_divergence(*here[:2]))
