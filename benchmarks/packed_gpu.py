"""Forms of few bits in `kernels_gpu.py`: the CUDA kernels against those of the CPU, and what is timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from surgery.codecs import bitstream
from surgery.codecs.encode_ops import encode_codes, encode_nf4, encode_stream
from surgery.codecs.grid import Quantized, absmax_grid, quantize
from surgery.codecs.mxfp4 import e2m1_values
from surgery.codecs.nf4 import LEVELS
from surgery.codecs.nf4 import encode_nf4 as eager_nf4
from surgery.codecs.packed_ops import decode_awq, decode_nibbles, decode_stream
from surgery.codecs.schemes import IntScheme

SCALES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = SCALES[:2]
STREAMS = ((1, 1, 1), (3, 7, 7), (5, 33, 1), (9, 129, 43), (300, 1200, 3), (257, 4096, 32))
GRIDS = ((1, 1, 0), (5, 129, 43), (7, 96, 32), (9, 520, 8), (33, 1280, 128), (257, 4096, 256), (5, 18432, 0))
AWQ = ((8, 1, 1), (24, 129, 43), (136, 300, 1), (512, 640, 5), (4096, 1024, 8))
SCHEMES = (IntScheme(4, 128), IntScheme(4, 128, symmetric=False), IntScheme(3, 128), IntScheme(8))

Case = tuple[str, float, Callable[[], Any]]
"""A name, the bytes that must move for a weight, and what is timed."""


def same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    a, b = a.cpu(), b.cpu()
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan()), f"{what}: NaN elsewhere"
        a, b = (each.masked_fill(a.isnan(), 0.0) for each in (a, b))
        ints = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.dtype]
        a, b = a.view(ints), b.view(ints)
    assert torch.equal(a, b), f"{what}: {int((a != b).sum())} of {a.numel()} differ"


def check_streams() -> int:
    done = 0
    for rows, cols, groups in STREAMS:
        for bits in range(2, 9):
            codes = torch.randint(0, 2**bits, (rows, cols)).to(torch.uint8)
            scales = torch.randn(rows, groups) * 10.0 ** torch.randint(-42, 3, (rows, groups))
            zeros = torch.randint(0, 2**bits, (rows, groups)).to(torch.uint8)
            words = bitstream.pack(codes, bits)
            for dtype in DTYPES:
                for points in (zeros, 2 ** (bits - 1)):
                    there = points.cuda() if isinstance(points, torch.Tensor) else points
                    got = decode_stream(words.cuda(), bits, cols, scales.cuda(), there, dtype)
                    want = decode_stream(words, bits, cols, scales, points, dtype)
                    same(got, want, f"stream of {bits} bits {(rows, cols, groups)}")
                    done += 1
    return done


def check_nibbles() -> int:
    done = 0
    for count in (1, 7, 64, 4099, 1 << 20):
        for block in (8, 32, 64, 4096):
            packed = torch.randint(0, 256, (-(-count // 2),)).to(torch.uint8)
            levels, scales = torch.randn(16), torch.randn(-(-count // block)) * 1e-38
            for high_first in (True, False):
                for dtype in DTYPES:
                    how: dict[str, Any] = {"block": block, "high_first": high_first, "dtype": dtype}
                    got = decode_nibbles(packed.cuda(), levels.cuda(), scales.cuda(), count, **how)
                    want = decode_nibbles(packed, levels, scales, count, **how)
                    same(got, want, f"nibbles {count} {block}")
                    done += 1
    return done


def check_awq() -> int:
    done = 0
    for rows, cols, groups in AWQ:
        words, zeros = (torch.randint(-(2**31), 2**31, (n, rows // 8)).int() for n in (cols, groups))
        scales = torch.randint(0, 65536, (groups, rows)).to(torch.int16).view(torch.float16)
        for dtype in DTYPES:
            got = decode_awq(words.cuda(), zeros.cuda(), scales.cuda(), dtype)
            same(got, decode_awq(words, zeros, scales, dtype), f"awq {(rows, cols, groups)}")
            done += 1
    return done


def check_grid(values: torch.Tensor, scheme: IntScheme) -> int:
    for scale_dtype in SCALES:
        for encode in (encode_stream, encode_codes):
            got = encode(values.cuda(), scheme, scale_dtype)
            for one, other in zip(got, encode(values, scheme, scale_dtype), strict=True):
                same(one, other, f"{scheme} {tuple(values.shape)}")
    return 2 * len(SCALES)


def check_grids(widths: Sequence[int]) -> int:
    done = 0
    for rows, cols, group in GRIDS:
        for bits in widths:
            values = torch.randn(rows, cols) * 10.0 ** torch.randint(-42, 38, (rows, 1))
            for broken in (0.0, torch.inf, -torch.inf, torch.nan, 3e38):
                values[torch.rand(rows, cols) < 0.2 / cols] = broken
            for dtype in DTYPES:
                for symmetric in (True, False):
                    done += check_grid(values.to(dtype), IntScheme(bits, group, symmetric))
    return done


def check_nf4() -> int:
    done = 0
    for count in (1, 7, 64, 4099, 70001, 1 << 20):
        for block in (8, 32, 64, 256, 512, 4096):
            values = torch.randn(count) * 10.0 ** torch.randint(-42, 38, (count,))
            for broken in (torch.nan, torch.inf):
                values[torch.rand(count) < 1e-3] = broken
            for given in (values, torch.randn(count), torch.randn(count).bfloat16()):
                for one, other in zip(encode_nf4(given.cuda(), block), encode_nf4(given, block), strict=True):
                    same(one, other, f"nf4 {count} {block}")
                done += 1
    return done


def check(widths: Sequence[int] = range(2, 9)) -> int:
    """Raises AssertionError at the first difference; returns the number of comparisons."""
    return check_streams() + check_nibbles() + check_awq() + check_grids(widths) + check_nf4()


def decoding(big: torch.Tensor, size: int) -> list[Case]:
    """`big`: at least half a random byte for each of [size, size] weights."""
    weights, found = size * size, []
    scales = torch.rand(size, size // 128, device=big.device) * 0.01
    zeros = torch.randint(0, 4, scales.shape, device=big.device).to(torch.uint8)
    for bits in (2, 3, 4, 8):
        words = big[: weights * bits // 8].view(torch.int32).view(size, -1)
        read = bits / 8 + 4 / 128
        run = partial(decode_stream, words, bits, size, scales, 2 ** (bits - 1))
        found.append((f"int{bits} g128 -> bf16", read + 2, partial(run, dtype=torch.bfloat16)))
        if bits == 4:
            found.append(("int4 g128 -> fp32", read + 4, run))
            asymmetric = partial(decode_stream, words, bits, size, scales, zeros, torch.bfloat16)
            found.append(("int4 g128 zeros -> bf16", read + 2 + 1 / 128, asymmetric))
    points = big[: weights // 256].view(torch.int32).view(size // 128, -1)
    words = big[: weights // 2].view(torch.int32).view(size, -1)
    awq = partial(decode_awq, words, points, scales.T.half().contiguous())
    nibbles, absmax = big[: weights // 2], torch.rand(weights // 32, device=big.device)
    nf4 = partial(
        decode_nibbles, nibbles, torch.tensor(LEVELS, device=big.device), absmax[: weights // 64], weights
    )
    mxfp4 = partial(decode_nibbles, nibbles, e2m1_values().to(big.device), absmax, weights)
    return [
        *found,
        ("awq g128 -> bf16", 2.5 + 2.5 / 128, partial(awq, torch.bfloat16)),
        ("awq g128 -> fp32", 4.5 + 2.5 / 128, awq),
        ("nf4 -> bf16", 2.5 + 4 / 64, partial(nf4, block=64, high_first=True, dtype=torch.bfloat16)),
        ("nf4 -> fp32", 4.5 + 4 / 64, partial(nf4, block=64, high_first=True)),
        ("mxfp4 -> bf16", 2.5 + 4 / 32, partial(mxfp4, block=32, high_first=False, dtype=torch.bfloat16)),
        ("int4 g128 -> bf16, eager", (2.5 + 5 / 128) / 8,
         partial(eager_int4, words[: size // 8], scales[: size // 8], zeros[: size // 8])),
    ]  # fmt: skip


def encoding(narrow: torch.Tensor) -> list[Case]:
    wide, found = narrow.float(), []
    for name, values in (("bf16", narrow), ("fp32", wide)):
        size = values.element_size()
        for scheme in SCHEMES:
            moved = size + scheme.bits / 8 + 5 / scheme.width(values.shape[1])
            run = partial(encode_stream, values, scheme, torch.bfloat16)
            found.append((f"{name} -> {scheme}", moved, run))
        found.append((f"{name} -> nf4", size + 0.5 + 4 / 64, partial(encode_nf4, values.view(-1))))
    part = wide[: len(wide) // 8]
    return [
        *found,
        ("fp32 -> int4-g128, eager", (4.5 + 5 / 128) / 8, partial(eager_grid, part, SCHEMES[0])),
        ("fp32 -> nf4, eager", (4.5 + 4 / 64) / 8, partial(eager_nf4, part.view(-1))),
    ]


def peers(narrow: torch.Tensor) -> list[Case]:
    """NF4 by bitsandbytes, where it is there: the same values."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return []
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(narrow, blocksize=64, quant_type="nf4")
    ours = decode_nibbles(packed.view(-1), torch.tensor(LEVELS, device=narrow.device), state.absmax.float(),
                          narrow.numel(), block=64, high_first=True, dtype=torch.bfloat16)  # fmt: skip
    unlike = int((dequantize_4bit(packed, state).view(-1) != ours).sum())
    print(f"of bitsandbytes' values {unlike} of {ours.numel()} are others than ours", flush=True)
    return [
        ("nf4 -> bf16, bitsandbytes", 2.5 + 4 / 64, partial(dequantize_4bit, packed, state)),
        ("bf16 -> nf4, bitsandbytes", 2.5 + 4 / 64,
         partial(quantize_4bit, narrow, blocksize=64, quant_type="nf4")),
    ]  # fmt: skip


def eager_int4(words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    codes = bitstream.unpack(words, 4, words.shape[1] * 8)
    return Quantized(codes, scales, zeros).values().bfloat16()


def eager_grid(values: torch.Tensor, scheme: IntScheme) -> torch.Tensor:
    codes = quantize(values, absmax_grid(values, scheme, torch.bfloat16), scheme).codes
    return bitstream.pack(codes, scheme.bits)
