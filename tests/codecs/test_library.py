"""Codec operations as torch operators: torch's own checks of them, and the same results as the functions."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_sets import kernels

from surgery.codecs import bitstream, encode_ops, library, magnitude, merge_library, merges, ops, packed_ops
from surgery.codecs.column_sweep import BlockGrid
from surgery.codecs.ops import Operand
from surgery.codecs.schemes import IntScheme
from surgery.errors import UsageError

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def check(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any] | None = None) -> None:
    torch.library.opcheck(operator, arguments, options or {}, test_utils=CHECKS)


def same(found: Any, want: Any) -> None:
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (129, 127), (200, 260)])
def test_fp8_blocks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.randn(shape).to(dtype)
    check(library.encode_fp8_block, (values,), {"ue8m0": True})
    codes, scales = torch.ops.surgery.encode_fp8_block(values)
    same((codes, scales), ops.encode_fp8_block(values))
    check(library.decode_fp8_block, (codes, scales, dtype))
    same([library.decode_fp8_block(codes, scales, dtype)], [ops.decode_fp8_block(codes, scales, dtype)])


@DTYPES
@pytest.mark.parametrize("shared", [True, False])
def test_streams(dtype: torch.dtype, shared: bool) -> None:
    words = bitstream.pack(torch.randint(0, 8, (5, 33)).to(torch.uint8), 3)
    scales, zeros = torch.randn(5, 3), None if shared else torch.randint(0, 8, (5, 3)).to(torch.uint8)
    arguments = (words, 3, 33, scales, zeros, 4, dtype)
    check(library.decode_stream, arguments)
    points = 4 if zeros is None else zeros
    want = packed_ops.decode_stream(words, 3, 33, scales, points, dtype)
    same([library.decode_stream(*arguments)], [want])


@DTYPES
def test_nibbles(dtype: torch.dtype) -> None:
    packed = torch.randint(0, 256, (51,)).to(torch.uint8)
    arguments = (packed, torch.randn(16), torch.randn(7), 101)
    options = {"block": 16, "high_first": True, "dtype": dtype}
    check(library.decode_nibbles, arguments, options)
    want = packed_ops.decode_nibbles(*arguments, block=16, high_first=True, dtype=dtype)
    same([library.decode_nibbles(*arguments, **options)], [want])


@DTYPES
def test_awq_words(dtype: torch.dtype) -> None:
    words, zeros = (torch.randint(-(2**31), 2**31, (n, 3)).to(torch.int32) for n in (20, 5))
    arguments = (words, zeros, torch.randn(5, 24).half(), dtype)
    check(library.decode_awq, arguments)
    same([library.decode_awq(*arguments)], [packed_ops.decode_awq(*arguments)])


@DTYPES
@pytest.mark.parametrize(("group", "symmetric"), [(0, True), (11, False)])
def test_grids(dtype: torch.dtype, group: int, symmetric: bool) -> None:
    values = torch.randn(5, 33).to(dtype)
    check(library.encode_stream, (values, 3, group, symmetric, torch.bfloat16))
    found = library.encode_stream(values, 3, group, symmetric, torch.bfloat16)
    same(found, encode_ops.encode_stream(values, IntScheme(3, group, symmetric), torch.bfloat16))


@DTYPES
def test_nf4(dtype: torch.dtype) -> None:
    values = torch.randn(101).to(dtype)
    check(library.encode_nf4, (values, 32))
    same(library.encode_nf4(values, 32), encode_ops.encode_nf4(values, 32))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("squares", [True, False])
def test_weighted_sums(dtype: torch.dtype, squares: bool) -> None:
    fp8 = Operand(*ops.encode_fp8_block(torch.randn(130, 70)))
    wide = Operand(torch.randn(130, 70))
    arguments = ([fp8.values, wide.values], [fp8.scales, None], [0.3, 0.7], dtype)
    check(merge_library.assemble, arguments, {"squares": squares})
    values, scales, sums = merge_library.assemble(*arguments, squares=squares)
    want, wanted = ops.assemble([fp8, wide], [0.3, 0.7], dtype, squares=squares, ue8m0=False)
    same([values], [want.values])
    assert (scales.numel() == 0) == (want.scales is None) and (sums.numel() == 0) == (wanted is None)
    if want.scales is not None:
        same([scales], [want.scales])
    if wanted is not None:
        same([sums], [wanted])


@DTYPES
def test_magnitudes_and_divergences(dtype: torch.dtype) -> None:
    base, model = (torch.randn(5, 300).to(dtype) for _ in range(2))
    check(library.largest_magnitude, (base,))
    same([library.largest_magnitude(base)], [magnitude.largest_magnitude(base)])
    check(merge_library.row_divergence, (base, None, model, None))
    want = merges.row_divergence(Operand(base), Operand(model))
    same([merge_library.row_divergence(base, None, model, None)], [want])


@pytest.mark.parametrize("digits", [[], [5, 6, 7, 5]])
@pytest.mark.parametrize("weighted", [True, False])
def test_counts(digits: list[int], weighted: bool) -> None:
    parents = [torch.randn(5, 30) for _ in range(3)]
    weights = torch.rand(5) if weighted else None
    digits = [each + 0x3F80 - 5 for each in digits]
    check(merge_library.count_sizes, (parents, [None] * 3, digits, weights))
    want = merges.count_sizes(
        [Operand(each) for each in parents], [digits[:2], digits[2:]] if digits else None, weights
    )
    same([merge_library.count_sizes(parents, [None] * 3, digits, weights)], [want])


def test_digits_that_do_not_fit_are_refused() -> None:
    parents = [torch.randn(5, 30) for _ in range(3)]
    for count, digits in ((3, [0x3F80]), (3, [1, 2, 3]), (2, [0x8000]), (2, [-1]), (1, [])):
        with pytest.raises(UsageError, match=r"digit|no model"):
            merge_library.count_sizes(parents[:count], [None] * count, digits, None)


@kernels
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_fusions(dtype: torch.dtype) -> None:
    parents = [torch.randn(130, 70) for _ in range(2)]
    arguments = (parents, [None] * 2, torch.rand(130), 0.4, dtype)
    check(merge_library.merge_fusion, arguments)
    values, scales, sums = merge_library.merge_fusion(*arguments)
    want, wanted = merges.merge_fusion(*map(Operand, parents), *arguments[2:], ue8m0=False)
    same([values, sums], [want.values, wanted])
    if want.scales is not None:
        same([scales], [want.scales])


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("gridded", [True, False])
def test_sweeps(gridded: bool, pattern: tuple[int, int] | None) -> None:
    weights = torch.randn(2, 5, 12)
    factor = torch.linalg.cholesky(torch.eye(12) + 0.1 * torch.ones(12, 12), upper=True).expand(2, 12, 12)
    grid: BlockGrid | None = None
    operands: tuple[Any, ...] = (None,) * 3
    if gridded:
        group = torch.arange(12, dtype=torch.int32).div(6, rounding_mode="floor").expand(2, 12).contiguous()
        zeros = torch.randint(0, 16, (2, 5, 2)).to(torch.uint8)
        grid = BlockGrid(torch.rand(2, 5, 2) + 0.5, zeros, group, 15)
        operands = grid[:3]
    arguments = (weights, factor, None, *operands, 15 if gridded else 0, *(pattern or (0, 0)))
    check(library.sweep_block, arguments)
    want = ops.sweep_block(weights, factor, pattern=pattern, grid=grid)
    codes = torch.empty(0, dtype=torch.uint8) if want.codes is None else want.codes
    same(library.sweep_block(*arguments), (want.values, want.errors, codes))


def test_a_traced_program_decodes() -> None:
    codes, scales = ops.encode_fp8_block(torch.randn(130, 70))

    class Decode(torch.nn.Module):
        def forward(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            return torch.ops.surgery.decode_fp8_block(codes, scales, torch.bfloat16) * 2

    program = torch.export.export(Decode(), (codes, scales))
    assert any("surgery.decode_fp8_block" in str(node.target) for node in program.graph.nodes)
    same([program.module()(codes, scales)], [ops.decode_fp8_block(codes, scales, torch.bfloat16) * 2])


def test_only_this_module_registers() -> None:
    code = "import torch, surgery.codecs.packed_ops; print(hasattr(torch.ops.surgery, 'decode_fp8_block'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
