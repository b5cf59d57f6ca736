"""Codes of 2 to 8 bits in 32-bit words, as the packed layouts of compressed-tensors and GPTQ lay them out.

Code i of a row takes the bits i·b … i·b + b − 1 of a little-endian stream over the row's words, lowest bit
first; codes straddle words. Eight codes fill b bytes, so eight are squeezed (and spread) at once in one
64-bit lane, in three steps that halve the number of gaps. `padded` is the layout of compressed-tensors
before 0.18: ⌊32/b⌋ codes a word, the bits above them 0. Where b divides 32 both are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORD = 32


def word_count(codes: int, bits: int, *, padded: bool = False) -> int:
    """Words of a row of so many codes."""
    if padded:
        return -(-codes // (WORD // bits))
    return -(-codes * bits // WORD)


def pack(codes: torch.Tensor, bits: int, *, padded: bool = False) -> torch.Tensor:
    """int32 words [rows, word_count(n, bits)] of uint8 codes [rows, n], each below 2^bits."""
    import torch

    if padded and WORD % bits:
        return _pack_padded(codes, bits)
    rows, count = codes.shape
    if not codes.numel():
        return torch.empty(rows, word_count(count, bits), dtype=torch.int32, device=codes.device)
    padding = -count % WORD
    stream = torch.nn.functional.pad(codes, (0, padding)) if padding else codes.contiguous()
    # Flat, as a view of another size looks at strides, and those of sides of 1 are anything.
    stream = stream.reshape(-1)
    if bits < 8:
        lanes = stream.view(torch.int64)
        for width in (8, 16, 32):
            gap = width - bits * width // 8
            low = _mask(bits * width // 8, 2 * width)
            lanes = (lanes & low) | ((lanes >> gap) & (low << bits * width // 8))
        stream = lanes.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
    words = stream.view(torch.int32).view(rows, (count + padding) // WORD * bits)
    return words[:, : word_count(count, bits)].contiguous()


def unpack(words: torch.Tensor, bits: int, count: int, *, padded: bool = False) -> torch.Tensor:
    """uint8 codes [rows, count] of int32 words [rows, word_count(count, bits)]."""
    import torch

    if padded and WORD % bits:
        return _unpack_padded(words, bits, count)
    rows = words.shape[0]
    if not words.numel():
        return torch.empty(rows, count, dtype=torch.uint8, device=words.device)
    eights = -(-count // 8)
    padded_words = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    stream = padded_words.reshape(-1).view(torch.uint8).view(rows, padded_words.shape[1] * 4)
    if bits == 8:
        return stream[:, :count].contiguous()
    spread = torch.zeros(rows, eights, 8, dtype=torch.uint8, device=words.device)
    spread[..., :bits] = stream[:, : eights * bits].view(rows, eights, bits)
    lanes = spread.view(-1).view(torch.int64)
    for width in (32, 16, 8):
        gap = width - bits * width // 8
        low = _mask(bits * width // 8, 2 * width)
        lanes = (lanes & low) | ((lanes << gap) & (low << width))
    return lanes.view(torch.uint8).view(rows, eights * 8)[:, :count].contiguous()


def _mask(ones: int, period: int) -> int:
    """A 64-bit number with so many ones at the bottom of every period."""
    return sum(((1 << ones) - 1) << start for start in range(0, 64, period))


def _pack_padded(codes: torch.Tensor, bits: int) -> torch.Tensor:
    import torch

    per_word = WORD // bits
    rows, count = codes.shape
    wide = torch.nn.functional.pad(codes, (0, -count % per_word)).to(torch.int32)
    places = torch.arange(per_word, dtype=torch.int32, device=codes.device) * bits
    return (wide.view(rows, -(-count // per_word), per_word) << places).sum(-1, dtype=torch.int32)


def _unpack_padded(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    import torch

    places = torch.arange(WORD // bits, dtype=torch.int32, device=words.device) * bits
    codes = (words[..., None] >> places) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count].to(torch.uint8)
