"""Decoding of packed forms of few bits on tensors: the native kernel of their device, or the torch reference.

    streams   w[r, c] = (code[r, c] − zero[r, g]) · scale[r, g], g = c // width, laid out as in `bitstream`
    awq       the same of 4 bits, laid out as in `awq`
    nibbles   w[i] = level[code[i]] · scale[i // block], two codes a byte

in float32, rounded to the dtype that is asked for; results are equal to the last bit on every path.
"""

from __future__ import annotations

import ctypes

import torch

from surgery.codecs import awq, bitstream, native, structures
from surgery.codecs.dispatch import call, check, library_for, place
from surgery.codecs.grid import Quantized
from surgery.errors import UsageError

KINDS = {torch.float32: native.F32, torch.bfloat16: native.BF16}


def decode_stream(
    words: torch.Tensor,
    bits: int,
    cols: int,
    scales: torch.Tensor,
    zeros: torch.Tensor | int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[rows, cols] of int32 words [rows, ⌈cols · bits / 32⌉], float32 scales [rows, groups] and uint8 zero
    points of that shape, or one for all. Raises UsageError for operands that do not fit."""
    rows, groups = scales.shape
    if not 2 <= bits <= 8 or dtype not in KINDS or (cols and (not groups or cols % groups)):
        raise UsageError(f"no stream of {bits} bits, {cols} columns in {groups} groups decodes to {dtype}")
    check("words", words, (rows, bitstream.word_count(cols, bits)), (torch.int32,), words)
    check("scales", scales, (rows, groups), (torch.float32,), words)
    if isinstance(zeros, torch.Tensor):
        check("zeros", zeros, (rows, groups), (torch.uint8,), words)
        zeros = zeros.contiguous()
    words, scales = words.contiguous(), scales.contiguous()
    if not rows or not cols:
        return torch.empty(rows, cols, dtype=dtype, device=words.device)
    found = library_for(words)
    if found.library is None:
        points = zeros if isinstance(zeros, torch.Tensor) else _filled(scales, zeros)
        return Quantized(bitstream.unpack(words, bits, cols), scales, points).values().to(dtype)
    out = torch.empty(rows, cols, dtype=dtype, device=words.device)
    job = structures.Stream(
        words=place(words),
        scales=place(scales),
        zeros=place(zeros) if isinstance(zeros, torch.Tensor) else None,
        out=place(out),
        rows=rows,
        cols=cols,
        row_words=words.shape[1],
        groups=groups,
        width=cols // groups,
        kind=KINDS[dtype],
        bits=bits,
        zero=0 if isinstance(zeros, torch.Tensor) else zeros,
    )
    call(found, "stream", words.device, ctypes.byref(job))
    return out


def decode_awq(
    words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[rows, cols] of int32 words [cols, rows / 8] and [groups, rows / 8] and fp16 scales [groups, rows].
    Raises UsageError for operands that do not fit."""
    (cols, across), groups = words.shape, zeros.shape[0]
    if dtype not in KINDS or (cols and (not groups or cols % groups)):
        raise UsageError(f"no AWQ words of {cols} columns in {groups} groups decode to {dtype}")
    check("words", words, (cols, across), (torch.int32,), words)
    check("zeros", zeros, (groups, across), (torch.int32,), words)
    check("scales", scales, (groups, across * awq.PER_WORD), (torch.float16,), words)
    words, zeros, scales = words.contiguous(), zeros.contiguous(), scales.contiguous()
    out = torch.empty(scales.shape[1], cols, dtype=dtype, device=words.device)
    if not out.numel():
        return out
    found = library_for(words)
    if found.library is None:
        return awq.unpacked(words, zeros, scales).values().to(dtype)
    job = structures.AwqWords(
        words=place(words),
        zeros=place(zeros),
        scales=place(scales),
        out=place(out),
        rows=scales.shape[1],
        cols=cols,
        groups=groups,
        width=cols // groups,
        kind=KINDS[dtype],
    )
    call(found, "awq", words.device, ctypes.byref(job))
    return out


def decode_nibbles(
    packed: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    count: int,
    *,
    block: int,
    high_first: bool,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[count] of uint8 bytes [⌈count / 2⌉], 16 float32 levels and float32 scales [⌈count / block⌉], where
    `block` is a power of two from 8 on. Raises UsageError for operands that do not fit."""
    if block < 8 or block & (block - 1) or dtype not in KINDS:
        raise UsageError(f"no nibbles in blocks of {block} decode to {dtype}")
    check("codes", packed, (-(-count // 2),), (torch.uint8,), packed)
    check("levels", levels, (16,), (torch.float32,), packed)
    check("scales", scales, (-(-count // block),), (torch.float32,), packed)
    packed, levels, scales = packed.contiguous(), levels.contiguous(), scales.contiguous()
    found = library_for(packed)
    if found.library is None or not count:
        return _nibbles_by_reference(packed, levels, scales, count, block, high_first).to(dtype)
    out = torch.empty(count, dtype=dtype, device=packed.device)
    job = structures.Nibbles(
        bytes=place(packed),
        scales=place(scales),
        levels=place(levels),
        out=place(out),
        count=count,
        block=block,
        kind=KINDS[dtype],
        high_first=int(high_first),
    )
    call(found, "nibbles", packed.device, ctypes.byref(job))
    return out


def _nibbles_by_reference(
    packed: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, count: int, block: int, high_first: bool
) -> torch.Tensor:
    codes = torch.arange(256, device=packed.device)
    halves = (levels[codes >> 4], levels[codes & 15])
    pairs = torch.stack(halves if high_first else halves[::-1], dim=1)
    values = pairs.index_select(0, packed.to(torch.int32)).view(-1)[:count]
    whole = count // block
    values[: whole * block].view(whole, block).mul_(scales[:whole, None])
    values[whole * block :].mul_(scales[whole:])
    return values


def _filled(like: torch.Tensor, zero: int) -> torch.Tensor:
    return torch.full_like(like, zero, dtype=torch.uint8)
