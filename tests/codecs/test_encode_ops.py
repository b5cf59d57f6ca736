"""Encoding to few bits, and AWQ's words: the kernels against the torch forms, bit for bit, on every path."""

from __future__ import annotations

import pytest
import torch
from kernel_sets import SETS, device, kernels, pinned

from surgery.codecs import bitstream, encode_ops, packed_ops
from surgery.codecs.encode_ops import encode_codes, encode_nf4, encode_stream
from surgery.codecs.grid import absmax_grid, quantize
from surgery.codecs.nf4 import LEVELS
from surgery.codecs.nf4 import encode_nf4 as nf4_of
from surgery.codecs.packed_ops import decode_awq
from surgery.codecs.schemes import IntScheme
from surgery.errors import UsageError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (1, 1, 0),
    (3, 7, 7),
    (2, 40, 8),
    (5, 129, 43),
    (7, 96, 32),
    (6, 576, 64),
    (5, 520, 0),
    (9, 1280, 128),
]
SHAPES += [(2, 1040, 8), (3, 301, 7), (70, 512, 256), (3, 2048, 512), (4, 999, 333), (3, 4100, 0)]
"""Rows, columns, and columns of a group."""
FIELD_HOLDS = (0, 2, 4, 6, 1, 3, 5, 7)


def same(found: torch.Tensor, want: torch.Tensor) -> None:
    found = found.cpu()
    assert found.dtype == want.dtype and found.shape == want.shape
    if want.is_floating_point():
        assert torch.equal(found.isnan(), want.isnan())
        whole = torch.int32 if want.dtype == torch.float32 else torch.int16
        found, want = (each.masked_fill(want.isnan(), 0).view(whole) for each in (found, want))
    assert torch.equal(found, want), f"{int((found != want).sum())} of {want.numel()} differ"


def matrix(rows: int, cols: int, extreme: bool) -> torch.Tensor:
    """Random values; `extreme`: rows of all magnitudes, zeros, ties, infinities and NaN among them."""
    values = torch.randn(rows, cols)
    values[0] = torch.randint(-8, 8, (cols,)) * 0.5
    if not extreme:
        return values
    values *= 10.0 ** torch.randint(-44, 38, (rows, 1))
    values[torch.rand(rows, cols) < 0.1] = 0.0
    values[torch.rand(rows, 1).expand(rows, cols) < 0.15] = 0.0
    values[torch.rand(rows, cols) < 0.1] *= -1e-3
    for broken in (torch.inf, -torch.inf, torch.nan, -torch.nan, 3.4e38, -3.4e38):
        values[torch.rand(rows, cols) < 0.3 / cols] = broken
    return values


def check_grids(device: str, rows: int, cols: int, group: int, bits: int, extreme: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = matrix(rows, cols, extreme).to(dtype)
        for symmetric in (True, False):
            scheme = IntScheme(bits, group, symmetric)
            for scale_dtype in DTYPES:
                want = quantize(values.float(), absmax_grid(values.float(), scheme, scale_dtype), scheme)
                packed = encode_stream(values.to(device), scheme, scale_dtype)
                found = encode_codes(values.to(device), scheme, scale_dtype)
                same(packed.words, bitstream.pack(want.codes, bits))
                for one, other in zip((*found, *packed[1:]), (*want, *want[1:]), strict=True):
                    same(one, other)


@device
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grids_and_codes_are_those_of_the_torch_form(
    device: str, shape: tuple[int, int, int], bits: int
) -> None:
    for extreme in (False, True):
        check_grids(device, *shape, bits, extreme)


@device
def test_every_bf16_value_on_a_grid(device: str) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, 64)
    for group in (32, 8):
        scheme = IntScheme(4, group, symmetric=False)
        want = quantize(every.float(), absmax_grid(every.float(), scheme, torch.float16), scheme)
        found = encode_codes(every.to(device), scheme, torch.float16)
        for one, other in zip(found, want, strict=True):
            same(one, other)


def check_nf4(device: str, count: int, block: int) -> None:
    values = matrix(-(-count // 64), 64, extreme=True).view(-1)[:count]
    levels = torch.tensor(LEVELS)
    means = ((levels[:-1] + levels[1:]) / 2).repeat(count)[:count]
    near = means + torch.randint(-1, 2, (count,)) * 2.0**-25
    near[::block] = torch.tensor([-1.0, 1.0])[torch.randint(0, 2, (len(near[::block]),))]
    for given in (values, near, torch.randn(count), torch.zeros(count)):
        for dtype in (torch.float32, torch.bfloat16):
            rounded = given.to(dtype)
            for one, other in zip(
                encode_nf4(rounded.to(device), block), nf4_of(rounded.float(), block), strict=True
            ):
                same(one, other)


@device
@pytest.mark.parametrize("count", [1, 7, 64, 513, 4099, 70000])
@pytest.mark.parametrize("block", [8, 32, 64, 256, 4096])
def test_nf4_is_the_torch_form(device: str, count: int, block: int) -> None:
    check_nf4(device, count, block)


def check_awq(device: str, rows: int, cols: int, groups: int) -> None:
    codes, zeros = (torch.randint(0, 16, (n, rows)) for n in (cols, groups))
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scales = halves[torch.randint(0, 65536, (groups, rows))]
    packed = []
    for each in (codes, zeros):
        words = torch.zeros(len(each), rows // 8, dtype=torch.int64)
        for field, place in enumerate(FIELD_HOLDS):
            words |= each[:, place::8] << 4 * field
        packed.append(words.to(torch.int32).to(device))
    spread = [each.T.float().repeat_interleave(cols // groups, 1) for each in (zeros, scales)]
    want = (codes.T.float() - spread[0]) * spread[1]
    for dtype in (torch.float32, torch.bfloat16):
        same(decode_awq(*packed, scales.to(device), dtype), want.to(dtype))


AWQ_SHAPES = [(8, 1, 1), (8, 40, 5), (24, 129, 43), (136, 300, 1), (264, 256, 2), (96, 70, 7), (512, 640, 5)]


@device
@pytest.mark.parametrize("shape", AWQ_SHAPES, ids=str)
def test_awq_words_are_the_formula(device: str, shape: tuple[int, int, int]) -> None:
    check_awq(device, *shape)


@kernels
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_gives_equal_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = pinned(name)
    for module in (encode_ops, packed_ops):
        monkeypatch.setattr(module, "library_for", lambda _: held)
    for bits in range(2, 9):
        check_grids("cpu", 12, 645, 43, bits, extreme=True)
        check_grids("cpu", 3, 1024, 128, bits, extreme=False)
    check_nf4("cpu", 3001, 64)
    check_awq("cpu", 136, 600, 5)


def test_without_kernels_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_KERNELS", "reference")
    check_grids("cpu", 6, 60, 12, 3, extreme=True)
    check_nf4("cpu", 301, 64)
    check_awq("cpu", 16, 60, 5)


def test_values_that_lie_apart_and_nothing_at_all() -> None:
    values = torch.randn(64, 12)
    scheme = IntScheme(3, 16)
    for one, other in zip(
        encode_stream(values.T, scheme), encode_stream(values.T.clone(), scheme), strict=True
    ):
        same(one, other)
    spread = torch.randn(200)
    for one, other in zip(encode_nf4(spread[::2]), encode_nf4(spread[::2].clone()), strict=True):
        same(one, other)
    assert encode_stream(torch.empty(0, 32), scheme).words.shape == (0, 3)
    assert encode_codes(torch.empty(0, 32), scheme).codes.shape == (0, 32)
    assert [len(each) for each in encode_nf4(torch.empty(0))] == [0, 0]
    empty = torch.empty(0, 0, dtype=torch.int32)
    assert decode_awq(empty, empty, torch.empty(0, 0, dtype=torch.float16)).shape == (0, 0)


def test_operands_that_do_not_fit_are_refused() -> None:
    words, half = torch.zeros(4, 2, dtype=torch.int32), torch.ones(2, 16, dtype=torch.float16)
    for call in (
        lambda: encode_stream(torch.zeros(3, 8), IntScheme(4, 3)),
        lambda: encode_stream(torch.zeros(8), IntScheme(4)),
        lambda: encode_codes(torch.zeros(3, 0), IntScheme(4)),
        lambda: encode_codes(torch.zeros(3, 8), IntScheme(9)),
        lambda: encode_codes(torch.zeros(3, 8).double(), IntScheme(4)),
        lambda: encode_codes(torch.zeros(3, 8), IntScheme(4), torch.float64),
        lambda: encode_nf4(torch.zeros(8), 12),
        lambda: encode_nf4(torch.zeros(8, 8)),
        lambda: encode_nf4(torch.zeros(8).double()),
        lambda: decode_awq(words, words[:3], half),
        lambda: decode_awq(words, words[:2, :1], half),
        lambda: decode_awq(words.long(), words[:2], half),
        lambda: decode_awq(words, words[:2], half.float()),
        lambda: decode_awq(words, words[:2], half, torch.float16),
    ):
        with pytest.raises(UsageError):
            call()
