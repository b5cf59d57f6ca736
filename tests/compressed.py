"""Folders of compressed-tensors made from the definition of its layouts, and what their weights are.

Codes and scales are drawn, not rounded from weights; bits are laid out by numpy's packbits.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folders import Tensors, change_config, change_shards

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Build = Callable[[str, tuple[int, int]], tuple[Tensors, torch.Tensor]]
"""Stored tensors of a module by their names behind it, and its float64 weights."""


def packed(codes: np.ndarray[Any, Any], bits: int, *, padded: bool = False) -> torch.Tensor:
    """int32 words of the rows of codes, one bit after the other."""
    rows, count = codes.shape
    per_word = 32 // bits if padded else count
    runs = -(-count // per_word) if count else 0
    spread = np.zeros((rows, runs * per_word), np.uint8)
    spread[:, :count] = codes
    planes = np.unpackbits(spread[..., None], axis=-1, bitorder="little")[..., :bits]
    streams = planes.reshape(rows, runs, per_word * bits)
    filler = np.zeros((rows, runs, -streams.shape[2] % 32), np.uint8)
    data = np.packbits(np.concatenate((streams, filler), axis=2), axis=2, bitorder="little")
    return torch.from_numpy(data.reshape(rows, -1).view(np.int32).copy())


def generator(module: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(module.encode()))


def integers(
    bits: int, group: int = 0, *, symmetric: bool = True, dtype: str = "BF16", padded: bool = False
) -> Build:
    """pack-quantized, `group` 0 for one scale a row."""

    def build(module: str, shape: tuple[int, int]) -> tuple[Tensors, torch.Tensor]:
        codes, zeros, scales = _drawn(module, shape, bits, group, symmetric, dtype)
        stored = {
            "weight_packed": packed(codes, bits, padded=padded),
            "weight_scale": scales,
            "weight_shape": torch.tensor(shape),
        }
        if not symmetric:
            stored["weight_zero_point"] = packed(zeros.T, bits, padded=padded).T.contiguous()
        return stored, _values(codes, zeros, scales)

    return build


def unpacked(bits: int = 8, group: int = 0, *, symmetric: bool = True, per_tensor: bool = False) -> Build:
    """int-quantized."""

    def build(module: str, shape: tuple[int, int]) -> tuple[Tensors, torch.Tensor]:
        codes, zeros, scales = _drawn(module, shape, bits, group, symmetric, "BF16")
        if per_tensor:
            scales = scales[:1, :1].expand(scales.shape)
        signed = torch.from_numpy(codes.astype(np.int16) - (1 << bits - 1)).to(torch.int8)
        stored = {"weight": signed, "weight_scale": scales[0, :1] if per_tensor else scales}
        if not symmetric:
            moved = zeros.astype(np.int16) - (1 << bits - 1)
            stored["weight_zero_point"] = torch.from_numpy(moved).to(torch.int8)
        return stored, _values(codes, zeros, scales)

    return build


def fp8(strategy: str, dtype: str = "BF16") -> Build:
    """float-quantized by `channel`, `tensor` or `block`."""

    def build(module: str, shape: tuple[int, int]) -> tuple[Tensors, torch.Tensor]:
        drawn = generator(module)
        codes = torch.from_numpy(drawn.integers(0, 0x7F, shape, np.uint8)).view(torch.float8_e4m3fn)
        grid = {
            "channel": (shape[0], 1), "tensor": (1,), "block": (-(-shape[0] // 128), -(-shape[1] // 128)),
        }[strategy]  # fmt: skip
        scales = torch.from_numpy(drawn.uniform(1e-3, 2e-3, grid)).to(DTYPES[dtype])
        spread = scales.double().view(1, 1) if strategy == "tensor" else scales.double()
        if strategy == "block":
            spread = spread.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
        return {"weight": codes, "weight_scale": scales}, codes.double() * spread

    return build


def _drawn(
    module: str, shape: tuple[int, int], bits: int, group: int, symmetric: bool, dtype: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], torch.Tensor]:
    drawn = generator(module)
    grid = (shape[0], shape[1] // (group or shape[1]))
    codes = drawn.integers(0, 1 << bits, shape, np.uint8)
    zeros = drawn.integers(0, 1 << bits, grid, np.uint8)
    if symmetric:
        zeros[...] = 1 << bits - 1
    return codes, zeros, torch.from_numpy(drawn.uniform(0.01, 0.02, grid)).to(DTYPES[dtype])


def _values(codes: np.ndarray[Any, Any], zeros: np.ndarray[Any, Any], scales: torch.Tensor) -> torch.Tensor:
    width = codes.shape[1] // scales.shape[1]
    signed = torch.from_numpy(codes.astype(np.float64) - zeros.repeat(width, 1))
    return signed * scales.double().repeat_interleave(width, 1)


def weights(bits: int, group: int = 0, **more: Any) -> dict[str, Any]:
    """The `weights` of a group of integers."""
    strategy = "group" if group else "channel"
    return {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group or None,
    } | more  # fmt: skip


def config(form: str, *groups: tuple[list[str], dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A quantization_config with (targets, weights) of each group."""
    return {
        "quant_method": "compressed-tensors", "format": form, "version": "0.18.0",
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {
            f"group_{number}": {"targets": targets, "weights": told}
            for number, (targets, told) in enumerate(groups)
        },
    } | more  # fmt: skip


def compress(
    folder: Path, quantization: Mapping[str, Any], build: Callable[[str], Build | None]
) -> dict[str, torch.Tensor]:
    """Quantize the matrices of decoder layers of a plain folder in place, each module as `build` says; the
    float64 weights of every module that was."""
    reference: dict[str, torch.Tensor] = {}

    def change(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            form = build(module) if tensor.ndim == 2 and ".layers." in name and "gate." not in name else None
            if form is None:
                found[name] = tensor
                continue
            stored, reference[name] = form(module, (tensor.shape[0], tensor.shape[1]))
            found |= {f"{module}.{part}": value for part, value in stored.items()}
        return found

    change_shards(folder, change)
    change_config(folder, quantization_config=dict(quantization))
    return reference


def read_config(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return parsed
