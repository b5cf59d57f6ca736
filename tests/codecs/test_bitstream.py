"""The bit stream of packed codes against Python's own integers, and both layouts against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.codecs.bitstream import pack, unpack, word_count

BITS = range(2, 9)


def by_integers(codes: list[int], bits: int, *, padded: bool) -> list[int]:
    """The words of one row: one long integer, cut in pieces of 32 bits; padded, an integer for each word."""
    if padded:
        per_word = 32 // bits
        runs = [codes[start : start + per_word] for start in range(0, len(codes), per_word)]
    else:
        runs = [codes]
    words = []
    for run in runs:
        stream = sum(code << (place * bits) for place, code in enumerate(run))
        words += [(stream >> start) & 0xFFFF_FFFF for start in range(0, len(run) * bits, 32)]
    return words


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return [[word & 0xFFFF_FFFF for word in row] for row in words.tolist()]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_every_code_at_every_place_has_its_bits(bits: int, padded: bool) -> None:
    """One row for each code and place of a period of 32 codes, zeros elsewhere."""
    codes = torch.zeros(32 << bits, 32, dtype=torch.uint8)
    rows = torch.arange(codes.shape[0])
    codes[rows, rows % 32] = (rows // 32).to(torch.uint8)
    words = pack(codes, bits, padded=padded)
    expected = [by_integers(row, bits, padded=padded) for row in codes.tolist()]
    assert unsigned(words) == expected
    assert torch.equal(unpack(words, bits, 32, padded=padded), codes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.booleans(), st.integers(0, 3), st.integers(0, 140), st.integers(0, 99))
def test_rows_of_any_length_are_packed_and_come_back(
    bits: int, padded: bool, rows: int, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, count), generator=generator).to(torch.uint8)
    words = pack(codes, bits, padded=padded)
    assert words.dtype == torch.int32
    assert tuple(words.shape) == (rows, word_count(count, bits, padded=padded))
    assert unsigned(words) == [by_integers(row, bits, padded=padded) for row in codes.tolist()]
    assert torch.equal(unpack(words, bits, count, padded=padded), codes)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1)])
def test_transposed_codes_are_packed_whatever_strides_their_sides_of_one_have(shape: tuple[int, int]) -> None:
    codes = torch.arange(40, dtype=torch.uint8).view(shape) % 8
    turned = codes.T.contiguous()
    words = pack(turned, 3)
    assert unsigned(words) == [by_integers(row, 3, padded=False) for row in turned.tolist()]
    assert torch.equal(unpack(words.T.contiguous().T, 3, turned.shape[1]), turned)


def test_both_layouts_are_one_where_the_bits_divide_a_word() -> None:
    for bits in BITS:
        codes = torch.randint(0, 1 << bits, (2, 96), dtype=torch.uint8)
        dense, padded = pack(codes, bits), pack(codes, bits, padded=True)
        assert (dense.shape == padded.shape and torch.equal(dense, padded)) == (32 % bits == 0)
