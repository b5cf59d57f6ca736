"""Collects the tensors of a tiny checkpoint and writes them as published folders look, for `factories`.

Every value depends on the seed and the tensor's name alone. The FP8 encoding is torch's own; the tests
hold it against `oracle`, which does without.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

BLOCK = 128
E4M3_MAX = 448.0
INDEX = "model.safetensors.index.json"
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


def noise(seed: int, name: str, shape: Iterable[int]) -> torch.Tensor:
    """Standard normal float32 values that depend on the seed and the name only."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def encode_fp8(weight: torch.Tensor, *, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, cols] float32 -> e4m3 codes and float32 scales per 128 x 128 block (scale = amax / 448)."""
    rows, cols = weight.shape
    down, across = -(-rows // BLOCK), -(-cols // BLOCK)
    padded = torch.nn.functional.pad(weight, (0, across * BLOCK - cols, 0, down * BLOCK - rows))
    blocks = padded.view(down, BLOCK, across, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / torch.tensor(E4M3_MAX)
    scales[scales == 0] = 1.0
    if ue8m0:
        scales = torch.exp2(torch.ceil(torch.log2(scales.to(torch.float64)))).to(torch.float32)
    scaled = (blocks / scales[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    codes = scaled.view(padded.shape)[:rows, :cols].contiguous().to(torch.float8_e4m3fn)
    return codes, scales


def decode_fp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    spread = scales.to(torch.float32).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return codes.to(torch.float32) * spread[: codes.shape[0], : codes.shape[1]]


@dataclass
class Tensors:
    """Stored tensors in natural order; with `base`, the values of that seed plus `delta` of our own noise."""

    seed: int
    base: int | None = None
    delta: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    scale_fmt: str | None = None
    e8m0: bool = False
    stored: dict[str, torch.Tensor] = field(default_factory=dict)

    def values(self, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
        if self.base is None:
            return noise(self.seed, name, shape) * std
        return (noise(self.base, name, shape) + self.delta * noise(self.seed, name, shape)) * std

    def plain(self, name: str, *shape: int, std: float = 0.05, dtype: torch.dtype | None = None) -> None:
        self.stored[name] = self.values(name, shape, std).to(dtype or self.dtype)

    def norm(self, name: str, size: int) -> None:
        self.stored[name] = (1.0 + self.values(name, (size,), 0.1)).to(self.dtype)

    def linear(self, name: str, rows: int, cols: int) -> None:
        """A matrix that FP8 checkpoints quantize."""
        if not self.fp8:
            return self.plain(name, rows, cols)
        codes, scales = encode_fp8(self.values(name, (rows, cols), 0.05), ue8m0=self.scale_fmt == "ue8m0")
        self.stored[name] = codes
        self.stored[f"{name}_scale_inv"] = scales.to(torch.float8_e8m0fnu) if self.e8m0 else scales

    def swiglu(self, prefix: str, inner: int, hidden: int) -> None:
        self.linear(f"{prefix}.gate_proj.weight", inner, hidden)
        self.linear(f"{prefix}.up_proj.weight", inner, hidden)
        self.linear(f"{prefix}.down_proj.weight", hidden, inner)

    def packed(self, name: str, *shape: int, low: int = 0, high: int = 256) -> None:
        """Random bytes: packed codes, or e8m0 exponents between `low` and `high`."""
        generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        self.stored[name] = torch.from_numpy(generator.integers(low, high, shape, dtype=np.uint8))


def write_checkpoint(
    folder: Path,
    stored: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    shards: int = 1,
    split_scales: bool = False,
) -> None:
    """Shards filled in natural order, the index with `total_size`, the config and the side files.

    A scale lies in its weight's shard, except every fifth one under `split_scales`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in stored.values())
    places: dict[str, int] = {}
    offset = 0
    num_scales = 0
    for name, tensor in stored.items():
        places[name] = offset * shards // total
        if name.endswith("_scale_inv"):
            moved = split_scales and num_scales % 5 == 0
            places[name] = (places[name.removesuffix("_scale_inv")] + moved) % shards
            num_scales += 1
        offset += tensor.nbytes
    used = sorted(set(places.values()))
    files = {
        shard: f"model-{number:05d}-of-{len(used):06d}.safetensors" if shards > 1 else "model.safetensors"
        for number, shard in enumerate(used, start=1)
    }
    for shard in used:
        part = {name: tensor for name, tensor in stored.items() if places[name] == shard}
        save_file(part, folder / files[shard], metadata={"format": "pt"})
    if shards > 1:
        weight_map = {name: files[shard] for name, shard in places.items()}
        _dump(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _dump(folder / "config.json", config)
    _dump(
        folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1}
    )
    _dump(folder / "tokenizer.json", tokenizer_json())
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    _dump(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def tokenizer_json() -> dict[str, Any]:
    """A byte-level tokenizer without merges: <s>, </s>, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    parsed: dict[str, Any] = json.loads(tokenizer.to_str())
    return parsed


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
