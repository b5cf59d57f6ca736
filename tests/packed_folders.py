"""Tiny checkpoints in the layouts of GPTQ, AWQ and bitsandbytes, packed here field by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import numpy as np
import torch
from folders import change_config, change_shards
from quantized_codes import random_codes

from surgery.codecs.grid import Quantized
from surgery.codecs.schemes import IntScheme

Tensors = dict[str, torch.Tensor]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803,
    0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


def stream_words(rows: np.ndarray, bits: int) -> torch.Tensor:
    """int32 [n, codes · b / 32] of codes [n, codes]: one little-endian number a row."""
    words = []
    for row in rows.tolist():
        number = sum(code << place * bits for place, code in enumerate(row))
        words.append([number >> 32 * k & 0xFFFF_FFFF for k in range(len(row) * bits // 32)])
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


def gptq_parts(codes: Quantized, bits: int, version: int) -> Tensors:
    """The parts of one module; zero points must be at least 1 where version 1 is asked for."""
    zeros = codes.zeros.T.numpy().astype(np.int64) - (version == 1)
    cols, groups = codes.codes.shape[1], codes.scales.shape[1]
    return {
        "qweight": stream_words(codes.codes.numpy(), bits).T,
        "qzeros": stream_words(zeros, bits),
        "scales": codes.scales.T.half(),
        "g_idx": (torch.arange(cols) // (cols // groups)).to(torch.int32),
    }


def awq_parts(codes: Quantized) -> Tensors:
    def ordered(matrix: torch.Tensor) -> torch.Tensor:
        rows = matrix.numpy()
        fields = [rows[:, 8 * word + place] for word in range(rows.shape[1] // 8) for place in AWQ_ORDER]
        return stream_words(np.stack(fields, axis=1), 4)

    return {
        "qweight": ordered(codes.codes.T),
        "qzeros": ordered(codes.zeros.T),
        "scales": codes.scales.T.half(),
    }


def repack(folder: Path, pack: Callable[[str, tuple[int, ...]], Tensors]) -> Path:
    """Every linear weight `X.weight` as what `pack` gives, by the name behind `X.`."""

    def change(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            if name != module and module.rpartition(".")[2] in LINEAR:
                parts = pack(name, tuple(tensor.shape))
                found |= {f"{module}.{key}": part for key, part in parts.items()}
            else:
                found[name] = tensor
        return found

    return change_shards(folder, change)


def integers(
    folder: Path,
    method: str,
    scheme: IntScheme,
    *,
    form: int = 1,
    base: Callable[[Path, int], Path] = factories.llama,
    **config: Any,
) -> tuple[Path, dict[str, Quantized]]:
    """A GPTQ or AWQ checkpoint of random codes, and the codes by weight."""
    made: dict[str, Quantized] = {}

    def pack(name: str, shape: tuple[int, ...]) -> Tensors:
        codes = random_codes(scheme, shape[0], shape[1], len(made))
        codes = codes._replace(zeros=codes.zeros.clamp(min=1), scales=codes.scales * 0.01)
        codes = codes._replace(scales=codes.scales.half().float())
        made[name] = codes
        return awq_parts(codes) if method == "awq" else gptq_parts(codes, scheme.bits, form)

    repack(base(folder, 1), pack)
    told: dict[str, Any] = {
        "quant_method": method,
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
    }
    if method == "gptq":
        name = "gptq" if form == 1 else "gptq_v2"
        told |= {"desc_act": False, "sym": scheme.symmetric, "checkpoint_format": name}
    else:
        told |= {"zero_point": not scheme.symmetric, "version": "gemm"}
    change_config(folder, quantization_config=told | config)
    return folder, made


def nf4(folder: Path, *, base: Callable[[Path, int], Path] = factories.llama) -> tuple[Path, Tensors]:
    """A bitsandbytes checkpoint of random codes, and what they mean."""
    made: Tensors = {}

    def pack(name: str, shape: tuple[int, ...]) -> Tensors:
        generator = np.random.default_rng(len(made))
        count = shape[0] * shape[1]
        codes = generator.integers(0, 16, count)
        absmax = torch.from_numpy(generator.uniform(0.01, 1, -(-count // 64)).astype(np.float32))
        levels = torch.tensor(NF4)
        made[name] = (levels[codes] * absmax.repeat_interleave(64)[:count]).view(shape)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
        return {
            "weight": torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8))[:, None],
            "weight.absmax": absmax,
            "weight.quant_map": levels,
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            ),
        }

    repack(base(folder, 1), pack)
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    told |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
    change_config(folder, quantization_config=told)
    return folder, made
