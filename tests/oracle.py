"""Independent references for the tests: formats from their definitions, arithmetic in one obvious order.

Nothing here uses the code under test, torch's float8 casts or the safetensors library, so that agreement
between the two sides means something. Everything is slow on purpose: loops over blocks, one operation a line.

    e4m3 (fn)   sign 1, exponent 4 (bias 7), mantissa 3; no infinities; S.1111.111 is NaN; largest value 448
    e8m0        2^(byte - 127); 255 is NaN
    fp8 block   w[r, c] = e4m3(code[r, c]) * scale[r // 128, c // 128], blocks cut at the ragged edges
    mxfp4       32 values of e2m1 in 16 bytes, low nibble first, times one e8m0 scale
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import torch

BLOCK = 128
E4M3_MAX = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

StoredTensor = tuple[str, tuple[int, ...], bytes]


def e4m3_value(code: int) -> float:
    """Value of one e4m3 byte, from its bits."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def e8m0_value(code: int) -> float:
    return math.nan if code == 0xFF else 2.0 ** (code - 127)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes, any shape -> float32."""
    table = torch.tensor([e4m3_value(code) for code in range(256)], dtype=torch.float32)
    return table[codes.to(torch.int64)]


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([e8m0_value(code) for code in range(256)], dtype=torch.float32)
    return table[codes.to(torch.int64)]


def encode_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Finite float32 -> uint8 codes: clamped to ±448, to nearest, ties to even, the sign of zero kept."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError("encode_e4m3 takes finite values only")
    magnitude = values.to(torch.float64).abs().clamp(max=E4M3_MAX)
    # Spacing of e4m3 around a value: 2^(exponent - 3), and 2^-9 below the smallest normal number 2^-6.
    exponent = (torch.frexp(magnitude).exponent - 1).clamp(min=-6)
    spacing = torch.ldexp(torch.ones_like(magnitude), exponent - 3)
    rounded = (magnitude / spacing).round() * spacing
    positive = torch.tensor([e4m3_value(code) for code in range(0x7F)], dtype=torch.float64)
    codes = torch.searchsorted(positive, rounded.contiguous())
    return (codes + 128 * torch.signbit(values)).to(torch.uint8)


def decode_fp8_block(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 codes [rows, cols] and float32 scales, one per 128 x 128 block -> float32 [rows, cols]."""
    out = torch.empty(codes.shape, dtype=torch.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            out[block] = decode_e4m3(codes[block]) * scales[i, j]
    return out


def block_scale(block: torch.Tensor, *, ue8m0: bool = False) -> torch.Tensor:
    """max|w| / 448 in float32, 1 where that is zero; `ue8m0`: the next power of two, at least 2^-126."""
    scale = block.abs().max() / torch.tensor(E4M3_MAX, dtype=torch.float32)
    if float(scale) == 0.0:
        return torch.tensor(1.0)
    if ue8m0:
        mantissa, exponent = math.frexp(float(scale))
        power = exponent - 1 if mantissa == 0.5 else exponent
        return torch.tensor(2.0 ** max(power, -126), dtype=torch.float32)
    return scale


def encode_fp8_block(weight: torch.Tensor, *, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [rows, cols] -> (uint8 codes [rows, cols], float32 scales per 128 x 128 block)."""
    rows, cols = weight.shape
    codes = torch.empty((rows, cols), dtype=torch.uint8)
    scales = torch.empty((-(-rows // BLOCK), -(-cols // BLOCK)), dtype=torch.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = block_scale(weight[block], ue8m0=ue8m0)
            codes[block] = encode_e4m3(weight[block] / scales[i, j])
    return codes, scales


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 blocks [..., groups, 16] and e8m0 scales [..., groups] -> float32 [..., groups * 32]."""
    table = torch.tensor(E2M1, dtype=torch.float32)
    low, high = table[(blocks & 0xF).to(torch.int64)], table[(blocks >> 4).to(torch.int64)]
    values = torch.stack((low, high), dim=-1).flatten(-2) * decode_e8m0(scales).unsqueeze(-1)
    return values.flatten(-2)


def encode_mxfp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., groups * 32] -> uint8 blocks [..., groups, 16] and e8m0 scales [..., groups].

    Scale floor(log2(amax)) - 2, one more from a mantissa of 1.75 on; nearest codes, ties to the even one.
    """
    groups = values.double().unflatten(-1, (-1, 32))
    mantissa, power = torch.frexp(groups.abs().amax(-1))
    exponent = power - 3 + (mantissa >= 0.875).int()
    scaled = groups / torch.exp2(exponent.double()).unsqueeze(-1)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # argmin takes the first of equals
    levels = torch.tensor(E2M1[:8], dtype=torch.float64)[order]
    codes = order[(scaled.abs().unsqueeze(-1) - levels).abs().argmin(-1)] + 8 * torch.signbit(scaled)
    blocks = codes[..., ::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), (exponent + 127).to(torch.uint8)


def weighted_sum(parents: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """((w0*p0) + (w1*p1)) + ... in the order given, each product and each sum rounded to float32."""
    total: torch.Tensor | None = None
    for parent, weight in zip(parents, weights, strict=True):
        term = parent.to(torch.float32) * torch.tensor(weight, dtype=torch.float32)
        total = term if total is None else total + term
    if total is None:
        raise ValueError("weighted_sum needs at least one parent")
    return total


def rms_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b||_F / sqrt(number of elements), in float64."""
    difference = a.to(torch.float64) - b.to(torch.float64)
    return math.sqrt(float((difference * difference).sum()) / difference.numel())


def relative_distance(a: torch.Tensor, base: torch.Tensor) -> float:
    """||a - base||_F / ||base||_F, in float64; 0 for two zero tensors, inf for a zero base alone."""
    difference = float(torch.linalg.vector_norm(a.to(torch.float64) - base.to(torch.float64)))
    norm = float(torch.linalg.vector_norm(base.to(torch.float64)))
    if norm == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / norm


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the angle between two tensors taken as vectors, in float64; NaN where one is zero."""
    x, y = a.to(torch.float64).flatten(), b.to(torch.float64).flatten()
    norms = float(torch.linalg.vector_norm(x)) * float(torch.linalg.vector_norm(y))
    return float(x @ y) / norms if norms else math.nan


def read_shard(path: Path) -> dict[str, StoredTensor]:
    """One safetensors file from its specification: u64 header length, JSON header, bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    body = raw[8 + length :]
    found: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = (entry["dtype"], tuple(entry["shape"]), body[begin:end])
    return found


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every stored tensor of a folder: name -> (dtype, shape, bytes). Index and shards must agree."""
    found: dict[str, StoredTensor] = {}
    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, stored in read_shard(path).items():
            if name in found:
                raise ValueError(f"{name} is in {places[name]} and in {path.name}")
            found[name], places[name] = stored, path.name
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text())["weight_map"]
        if listed != places:
            wrong = sorted(name for name in {*listed, *places} if listed.get(name) != places.get(name))
            raise ValueError(f"index and shards of {folder} disagree on {wrong[:5]}")
    return found


def stored_values(dtype: str, shape: tuple[int, ...], raw: bytes) -> torch.Tensor:
    """Stored bytes as float32 values (codes and packed bytes as uint8) of the stored shape."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    kinds |= {"U8": torch.uint8, "F8_E4M3": torch.uint8, "F8_E8M0": torch.uint8, "I64": torch.int64}
    # bytearray: torch wants a writable buffer, which must not be empty.
    kind = kinds[dtype]
    flat = torch.frombuffer(bytearray(raw), dtype=kind) if raw else torch.empty(0, dtype=kind)
    values = flat.reshape(shape)
    return values.to(torch.float32) if values.is_floating_point() else values


def model_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint's tensors mean: name -> float32 values, scales folded in and left out of the result.

    Fused expert tensors stay whole, under their stored name and shape; an MXFP4 pair `X_blocks`, `X_scales`
    becomes `X`.
    """
    stored = read_folder(folder)
    found: dict[str, torch.Tensor] = {}
    for name, (dtype, shape, raw) in stored.items():
        if name.endswith("_scale_inv") or (name.endswith("_scales") and dtype == "U8"):
            continue
        values = stored_values(dtype, shape, raw)
        if dtype == "F8_E4M3":
            scale_dtype, scale_shape, scale_raw = stored[f"{name}_scale_inv"]
            scales = stored_values(scale_dtype, scale_shape, scale_raw)
            found[name] = decode_fp8_block(
                values, decode_e8m0(scales) if scale_dtype == "F8_E8M0" else scales
            )
        elif dtype == "U8" and name.endswith("_blocks"):
            target = name.removesuffix("_blocks")
            scales = stored_values(*stored[f"{target}_scales"])
            found[target] = decode_mxfp4(values, scales)
        else:
            found[name] = values
    return found
