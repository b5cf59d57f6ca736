"""Encoding to packed forms of few bits: the native kernel of the tensor's device, or the torch reference.

    grids     the grid that spans each group, scales rounded to the dtype that they are stored in, and the
              codes on it (`grid`), one a byte or as a stream of few bits (`bitstream`), in one pass
    nf4       absmax of each block and the nearest of 16 levels, two codes a byte (`nf4`)

from float32 or bf16 values; results are equal to the last bit on every path.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from surgery.codecs import bitstream, native, nf4, structures
from surgery.codecs.dispatch import call, library_for, place, told
from surgery.codecs.grid import Quantized, absmax_grid, quantize
from surgery.codecs.packed_ops import KINDS
from surgery.codecs.schemes import BITS, IntScheme
from surgery.errors import UsageError

SCALE_KINDS = {**KINDS, torch.float16: native.F16}


class Packed(NamedTuple):
    """int32 words [rows, ⌈cols · bits / 32⌉] of codes on a grid: float32 scales and uint8 zero points
    [rows, groups]."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def encode_stream(
    values: torch.Tensor, scheme: IntScheme, scale_dtype: torch.dtype = torch.float32
) -> Packed:
    """Float32 or bf16 values [rows, cols] on the grid over each group, packed. Raises UsageError for operands
    that do not fit."""
    groups = _groups(values, scheme, scale_dtype)
    if values.shape[0] and library_for(values).library is None:
        found = _on_grid(values, scheme, scale_dtype)
        return Packed(bitstream.pack(found.codes, scheme.bits), found.scales, found.zeros)
    rows, cols = values.shape
    words = torch.empty(
        rows, bitstream.word_count(cols, scheme.bits), dtype=torch.int32, device=values.device
    )
    return Packed(words, *_fill(values, words, words.shape[1] * 4, scheme.bits, scheme, groups, scale_dtype))


def encode_codes(
    values: torch.Tensor, scheme: IntScheme, scale_dtype: torch.dtype = torch.float32
) -> Quantized:
    """As `encode_stream`, with each code in a byte of its own."""
    groups = _groups(values, scheme, scale_dtype)
    if values.shape[0] and library_for(values).library is None:
        return _on_grid(values, scheme, scale_dtype)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    return Quantized(codes, *_fill(values, codes, values.shape[1], 8, scheme, groups, scale_dtype))


def encode_nf4(values: torch.Tensor, block: int = nf4.BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 bytes [⌈n / 2⌉], float32 absmax [⌈n / block⌉]) of float32 or bf16 values [n], where `block` is
    a power of two from 8 on. Raises UsageError for operands that do not fit."""
    if block < 8 or block & (block - 1) or values.dim() != 1 or values.dtype not in KINDS:
        raise UsageError(f"{told(values)} has no NF4 codes in blocks of {block}")
    count, found = values.numel(), library_for(values)
    if found.library is None or not count:
        return nf4.encode_nf4(values.float(), block)
    values = values.contiguous()
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=values.device)
    absmax = torch.empty(-(-count // block), dtype=torch.float32, device=values.device)
    job = structures.ToNibbles(
        values=place(values),
        bytes=place(packed),
        absmax=place(absmax),
        count=count,
        block=block,
        kind=KINDS[values.dtype],
        borders=(ctypes.c_float * 15)(*nf4.borders()),
    )
    call(found, "to_nibbles", values.device, ctypes.byref(job))
    return packed, absmax


def _groups(values: torch.Tensor, scheme: IntScheme, scale_dtype: torch.dtype) -> int:
    """Groups of a row. Raises UsageError for what has no codes."""
    fits = values.dim() == 2 and values.dtype in KINDS and scheme.bits in BITS and scale_dtype in SCALE_KINDS
    if not fits or not values.shape[1] or values.shape[1] % scheme.width(values.shape[1]):
        raise UsageError(f"{told(values)} has no codes of {scheme} with scales in {scale_dtype}")
    return scheme.groups(values.shape[1])


def _on_grid(values: torch.Tensor, scheme: IntScheme, scale_dtype: torch.dtype) -> Quantized:
    wide = values.float().contiguous()
    return quantize(wide, absmax_grid(wide, scheme, scale_dtype), scheme)


def _fill(
    values: torch.Tensor,
    stream: torch.Tensor,
    row_bytes: int,
    bits: int,
    scheme: IntScheme,
    groups: int,
    scale_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the codes to a stream with places of `bits`; scales and zero points."""
    rows, cols = values.shape
    values = values.contiguous()
    scales = torch.empty(rows, groups, dtype=torch.float32, device=values.device)
    zeros = torch.empty(rows, groups, dtype=torch.uint8, device=values.device)
    job = structures.ToStream(
        values=place(values),
        stream=place(stream),
        scales=place(scales),
        zeros=place(zeros),
        rows=rows,
        cols=cols,
        row_bytes=row_bytes,
        groups=groups,
        width=cols // groups,
        kind=KINDS[values.dtype],
        scale_kind=SCALE_KINDS[scale_dtype],
        bits=bits,
        top=scheme.top,
        symmetric=int(scheme.symmetric),
    )
    if rows:
        call(library_for(values), "to_stream", values.device, ctypes.byref(job))
    return scales, zeros
