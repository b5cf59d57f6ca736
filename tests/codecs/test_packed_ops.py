"""Packed forms of few bits: the kernels against a plain formula, bit for bit, on every path."""

from __future__ import annotations

import pytest
import torch
from kernel_sets import SETS, device, kernels, pinned

from surgery.codecs import bitstream, packed_ops
from surgery.codecs.packed_ops import decode_nibbles, decode_stream
from surgery.errors import UsageError

SHAPES = [(1, 1, 1), (3, 7, 7), (5, 33, 1), (2, 40, 5), (9, 129, 43), (4, 1200, 3), (70, 512, 4)]


def same(found: torch.Tensor, want: torch.Tensor) -> None:
    found = found.cpu()
    assert found.dtype == want.dtype and found.shape == want.shape
    assert torch.equal(found.isnan(), want.isnan())
    whole = torch.int32 if want.dtype == torch.float32 else torch.int16
    left, right = (each.nan_to_num(0.0, 1e38, -1e38).view(whole) for each in (found, want))
    assert torch.equal(left, right), f"{int((left != right).sum())} of {left.numel()} differ"


def check_stream(device: str, shape: tuple[int, int, int], bits: int) -> None:
    rows, cols, groups = shape
    codes = torch.randint(0, 2**bits, (rows, cols)).to(torch.uint8)
    scales = torch.randn(rows, groups) * torch.tensor([1e-3, 1.0, 1e-40])[torch.randint(0, 3, (rows, groups))]
    zeros = torch.randint(0, 2**bits, (rows, groups)).to(torch.uint8)
    words = bitstream.pack(codes, bits).to(device)
    spread = [each.repeat_interleave(cols // groups, 1) for each in (scales, zeros)]
    for points, there in ((spread[1].float(), zeros.to(device)), (2.0 ** (bits - 1), 2 ** (bits - 1))):
        want = (codes.float() - points) * spread[0]
        for dtype in (torch.float32, torch.bfloat16):
            found = decode_stream(words, bits, cols, scales.to(device), there, dtype)
            same(found, want.to(dtype))


@device
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_streams_are_the_formula(device: str, shape: tuple[int, int, int], bits: int) -> None:
    check_stream(device, shape, bits)


def check_nibbles(device: str, count: int, block: int) -> None:
    codes, levels = torch.randint(0, 16, (count + count % 2,)), torch.randn(16)
    scales = torch.randn(-(-count // block)).abs()
    scales[-1] = torch.nan
    want = levels[codes[:count]] * scales.repeat_interleave(block)[:count]
    for high_first in (True, False):
        first, second = codes[::2].to(torch.uint8), codes[1::2].to(torch.uint8)
        packed = first << 4 | second if high_first else second << 4 | first
        for dtype in (torch.float32, torch.bfloat16):
            places = (packed.to(device), levels.to(device), scales.to(device), count)
            found = decode_nibbles(*places, block=block, high_first=high_first, dtype=dtype)
            same(found, want.to(dtype))


@device
@pytest.mark.parametrize("count", [1, 7, 64, 513, 4099, 70000])
@pytest.mark.parametrize("block", [8, 32, 64, 4096])
def test_nibbles_are_the_formula(device: str, count: int, block: int) -> None:
    check_nibbles(device, count, block)


@kernels
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_gives_equal_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = pinned(name)
    monkeypatch.setattr(packed_ops, "library_for", lambda _: held)
    for bits in range(2, 9):
        check_stream("cpu", (6, 600, 5), bits)
    check_nibbles("cpu", 3001, 64)


def test_without_kernels_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_KERNELS", "reference")
    check_stream("cpu", (6, 60, 5), 3)
    check_nibbles("cpu", 301, 64)


def test_empty_matrices() -> None:
    for rows, cols in ((0, 8), (3, 0)):
        words = torch.empty(rows, bitstream.word_count(cols, 4), dtype=torch.int32)
        assert decode_stream(words, 4, cols, torch.empty(rows, 1), 8).shape == (rows, cols)
    assert decode_nibbles(torch.empty(0, dtype=torch.uint8), torch.ones(16), torch.empty(0), 0,
                          block=64, high_first=True).shape == (0,)  # fmt: skip


def test_operands_that_do_not_fit_are_refused() -> None:
    words, scales = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    for call in (
        lambda: decode_stream(words, 9, 16, scales, 8),
        lambda: decode_stream(words, 4, 17, scales, 8),
        lambda: decode_stream(words, 4, 32, scales, 8),
        lambda: decode_stream(words.long(), 4, 16, scales, 8),
        lambda: decode_stream(words, 4, 16, scales.double(), 8),
        lambda: decode_stream(words, 4, 16, scales, torch.zeros(3, 1, dtype=torch.uint8)),
        lambda: decode_stream(words, 4, 16, scales, 8, torch.float16),
        lambda: decode_nibbles(torch.zeros(8, dtype=torch.uint8), torch.ones(16), torch.ones(1), 16, block=12,
                               high_first=True),
        lambda: decode_nibbles(torch.zeros(8, dtype=torch.uint8), torch.ones(16), torch.ones(2), 16, block=16,
                               high_first=True),
        lambda: decode_nibbles(torch.zeros(8, dtype=torch.uint8), torch.ones(8), torch.ones(1), 16, block=16,
                               high_first=True),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            call()
