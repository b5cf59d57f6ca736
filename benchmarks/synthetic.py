"""Checkpoints for the benchmarks: published shapes and names, made in seconds, no downloads.

    python benchmarks/synthetic.py CASE FOLDER [--gb SIZE]

Each case writes two parents, FOLDER/base and FOLDER/other:

    v3-full     DeepSeek-V3 whole: 91,991 tensors in 163 shards, 688,574,839,360 bytes each. Real headers over
                sparse bodies: for planning alone, since every weight reads as zero.
    v3-sample   the same architecture and matrix sizes with one dense layer, one MoE layer, the MTP layer, a
                small vocabulary, and as many experts as make SIZE; FP8 codes and scales that decode.
    v3-half     the same at half of V3's hidden size with six experts: 0.69 GB each, for sweeps.
    many-small  Qwen3-30B-A3B's 18,867 tensors at a hidden size of 64: 78 MB in bf16.
    one-big     a dense bf16 model of 3.1 GB whose tied embedding alone is 1.5 GB.

Bytes come from a block of random values read from a different place for each tensor, so that writing is what
takes the time. Values are normal; FP8 codes fill their range as a quantized weight's do; nothing is NaN.
"""

from __future__ import annotations

import argparse
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

PARENTS = ("base", "other")
V3_TENSORS, V3_SHARDS, V3_BYTES = 91_991, 163, 688_574_839_360
ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
RANDOM_VALUES = 1 << 24
WRITE_BYTES = 1 << 18  # measured on ext4: writes of several MiB took five times as long
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Entry:
    """One stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class V3Shape:
    """What a sample of DeepSeek-V3 may shrink; the other sizes are the published ones."""

    layers: int = 61
    dense: int = 3
    experts: int = 256
    vocab: int = 129_280
    hidden: int = 7168
    intermediate: int = 18_432
    moe_intermediate: int = 2048
    heads: int = 128


def v3_entries(shape: V3Shape) -> Iterator[Entry]:
    """Every tensor of a DeepSeek-V3 checkpoint in natural order, the MTP layer last."""
    hidden, vocab = shape.hidden, shape.vocab
    yield Entry("model.embed_tokens.weight", "BF16", (vocab, hidden))
    for layer in range(shape.layers):
        yield from _v3_layer(f"model.layers.{layer}", shape, moe=layer >= shape.dense)
    yield Entry("model.norm.weight", "BF16", (hidden,))
    yield Entry("lm_head.weight", "BF16", (vocab, hidden))
    mtp = f"model.layers.{shape.layers}"
    yield Entry(f"{mtp}.embed_tokens.weight", "BF16", (vocab, hidden))
    yield Entry(f"{mtp}.enorm.weight", "BF16", (hidden,))
    yield Entry(f"{mtp}.hnorm.weight", "BF16", (hidden,))
    yield Entry(f"{mtp}.eh_proj.weight", "BF16", (hidden, 2 * hidden))
    yield from _v3_layer(mtp, shape, moe=True)
    yield Entry(f"{mtp}.shared_head.norm.weight", "BF16", (hidden,))
    yield Entry(f"{mtp}.shared_head.head.weight", "BF16", (vocab, hidden))


def _v3_layer(prefix: str, shape: V3Shape, *, moe: bool) -> Iterator[Entry]:
    hidden, heads, attention = shape.hidden, shape.heads, f"{prefix}.self_attn"
    yield from _fp8(f"{attention}.q_a_proj", 1536, hidden)
    yield Entry(f"{attention}.q_a_layernorm.weight", "BF16", (1536,))
    yield from _fp8(f"{attention}.q_b_proj", heads * 192, 1536)
    yield from _fp8(f"{attention}.kv_a_proj_with_mqa", 576, hidden)
    yield Entry(f"{attention}.kv_a_layernorm.weight", "BF16", (512,))
    yield from _fp8(f"{attention}.kv_b_proj", heads * 256, 512)
    yield from _fp8(f"{attention}.o_proj", hidden, heads * 128)
    if moe:
        yield Entry(f"{prefix}.mlp.gate.weight", "BF16", (shape.experts, hidden))
        yield Entry(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (shape.experts,))
        mlps = ["shared_experts", *(f"experts.{expert}" for expert in range(shape.experts))]
        for mlp in mlps:
            yield from _fp8_mlp(f"{prefix}.mlp.{mlp}", shape.moe_intermediate, hidden)
    else:
        yield from _fp8_mlp(f"{prefix}.mlp", shape.intermediate, hidden)
    yield Entry(f"{prefix}.input_layernorm.weight", "BF16", (hidden,))
    yield Entry(f"{prefix}.post_attention_layernorm.weight", "BF16", (hidden,))


def _fp8_mlp(prefix: str, inner: int, hidden: int) -> Iterator[Entry]:
    yield from _fp8(f"{prefix}.gate_proj", inner, hidden)
    yield from _fp8(f"{prefix}.up_proj", inner, hidden)
    yield from _fp8(f"{prefix}.down_proj", hidden, inner)


def _fp8(prefix: str, rows: int, cols: int) -> Iterator[Entry]:
    yield Entry(f"{prefix}.weight", "F8_E4M3", (rows, cols))
    yield Entry(f"{prefix}.weight_scale_inv", "F32", (-(-rows // 128), -(-cols // 128)))


def _v3_config(shape: V3Shape) -> dict[str, Any]:
    config: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    config |= {"num_hidden_layers": shape.layers, "first_k_dense_replace": shape.dense}
    config |= {"num_nextn_predict_layers": 1, "vocab_size": shape.vocab, "hidden_size": shape.hidden}
    config |= {"intermediate_size": shape.intermediate, "moe_intermediate_size": shape.moe_intermediate}
    config |= {"n_routed_experts": shape.experts, "n_shared_experts": 1, "num_experts_per_tok": 8}
    config |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.heads}
    config |= {"q_lora_rank": 1536, "kv_lora_rank": 512, "v_head_dim": 128}
    config |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "scoring_func": "sigmoid"}
    config |= {"n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "tie_word_embeddings": False}
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    return config | {"quantization_config": quantization | {"weight_block_size": [128, 128]}}


def v3_full(folder: Path) -> None:
    """Two whole DeepSeek-V3 parents with sparse bodies."""
    shape = V3Shape()
    entries = list(v3_entries(shape))
    if (len(entries), sum(entry.nbytes for entry in entries)) != (V3_TENSORS, V3_BYTES):
        raise ValueError("v3_entries no longer yields the published inventory")
    for parent in PARENTS:
        write_parent(folder / parent, entries, _v3_config(shape), shards=V3_SHARDS, source=None)


def v3_sample(folder: Path, size_bytes: int) -> None:
    """Two parents of at least `size_bytes` each (1.6 GB is the least), with random FP8 weights."""
    experts = 8
    while sum(e.nbytes for e in v3_entries(_sample_shape(experts))) < size_bytes:
        experts += 1
    shape = _sample_shape(experts)
    for seed, parent in enumerate(PARENTS):
        config = _v3_config(shape) | {"n_group": 1, "topk_group": 1}
        write_parent(folder / parent, list(v3_entries(shape)), config, shards=4, source=RandomBytes(seed))


def v3_half(folder: Path) -> None:
    """Two parents of 0.69 GB each, with random FP8 weights."""
    shape = V3Shape(
        layers=2,
        dense=1,
        experts=6,
        vocab=4096,
        hidden=3584,
        intermediate=9216,
        moe_intermediate=1536,
        heads=64,
    )  # fmt: skip
    for seed, parent in enumerate(PARENTS):
        config = _v3_config(shape) | {"n_group": 1, "topk_group": 1}
        write_parent(folder / parent, list(v3_entries(shape)), config, shards=4, source=RandomBytes(seed))


def _sample_shape(experts: int) -> V3Shape:
    return V3Shape(layers=2, dense=1, experts=experts, vocab=4096)


def many_small(folder: Path) -> None:
    """Two qwen3_moe parents of 48 layers with 128 experts each."""
    hidden, inner, heads, kv_heads, head, vocab, experts, layers = 64, 32, 4, 2, 16, 2048, 128, 48
    entries = [Entry("model.embed_tokens.weight", "BF16", (vocab, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes: list[tuple[str, tuple[int, ...]]] = [
            ("self_attn.q_proj", (heads * head, hidden)),
            ("self_attn.k_proj", (kv_heads * head, hidden)),
            ("self_attn.v_proj", (kv_heads * head, hidden)),
            ("self_attn.o_proj", (hidden, heads * head)),
            ("self_attn.q_norm", (head,)),
            ("self_attn.k_norm", (head,)),
            ("mlp.gate", (experts, hidden)),
        ]
        for expert in range(experts):
            shapes += [(f"mlp.experts.{expert}.{name}_proj", (inner, hidden)) for name in ("gate", "up")]
            shapes.append((f"mlp.experts.{expert}.down_proj", (hidden, inner)))
        shapes += [("input_layernorm", (hidden,)), ("post_attention_layernorm", (hidden,))]
        entries += [Entry(f"{prefix}.{name}.weight", "BF16", shape) for name, shape in shapes]
    entries += [
        Entry("model.norm.weight", "BF16", (hidden,)),
        Entry("lm_head.weight", "BF16", (vocab, hidden)),
    ]
    config: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    config |= {"hidden_size": hidden, "moe_intermediate_size": inner, "intermediate_size": inner}
    config |= {"num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": 8}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head}
    config |= {"vocab_size": vocab, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    for seed, parent in enumerate(PARENTS):
        write_parent(folder / parent, entries, config, shards=1, source=RandomBytes(seed))


def one_big(folder: Path) -> None:
    """Two llama parents of one shard, half of it the embedding."""
    hidden, inner, vocab, layers = 2048, 8192, 366_592, 12
    entries = [Entry("model.embed_tokens.weight", "BF16", (vocab, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            entries.append(Entry(f"{prefix}.self_attn.{name}_proj.weight", "BF16", (hidden, hidden)))
        entries.append(Entry(f"{prefix}.mlp.gate_proj.weight", "BF16", (inner, hidden)))
        entries.append(Entry(f"{prefix}.mlp.up_proj.weight", "BF16", (inner, hidden)))
        entries.append(Entry(f"{prefix}.mlp.down_proj.weight", "BF16", (hidden, inner)))
        entries.append(Entry(f"{prefix}.input_layernorm.weight", "BF16", (hidden,)))
        entries.append(Entry(f"{prefix}.post_attention_layernorm.weight", "BF16", (hidden,)))
    entries.append(Entry("model.norm.weight", "BF16", (hidden,)))
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": vocab}
    config |= {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    for seed, parent in enumerate(PARENTS):
        write_parent(folder / parent, entries, config, shards=1, source=RandomBytes(seed))


class RandomBytes:
    """Plausible stored bytes, from one block of random values per dtype."""

    def __init__(self, seed: int) -> None:
        values = np.random.default_rng(seed).standard_normal(RANDOM_VALUES, dtype=np.float32)
        self.blocks: dict[str, Bytes] = {
            # The largest of 128 x 128 normal values is near 4: codes reach 448 about once a block.
            "F8_E4M3": _e4m3_codes(values * 112.0),
            "BF16": ((values * 0.02).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8),
            # Scales of weights with a standard deviation near 0.02; as a router bias these do as well.
            "F32": (2e-4 * np.exp(0.2 * values)).view(np.uint8),
        }

    def write(self, file: BinaryIO, entry: Entry) -> None:
        block = self.blocks[entry.dtype]
        start = zlib.crc32(entry.name.encode()) % RANDOM_VALUES * ITEM_BYTES[entry.dtype]
        left = entry.nbytes
        while left:
            piece = block[start : start + min(left, WRITE_BYTES)]
            file.write(piece.data)
            left -= len(piece)
            start = (start + len(piece)) % len(block)


def _e4m3_codes(values: npt.NDArray[np.float32]) -> Bytes:
    """Finite float32 -> e4m3 codes, never NaN, through a table of the bf16 magnitudes: near enough here."""
    patterns = np.arange(1 << 15, dtype=np.uint32) << 16
    positive = np.array(
        [(8 * (c > 7) + c % 8) * 2.0 ** (max(c // 8, 1) - 10) for c in range(127)], np.float32
    )
    nearest = np.searchsorted((positive[1:] + positive[:-1]) / 2, patterns.view(np.float32)).astype(np.uint8)
    bits = values.view(np.uint32)
    codes: Bytes = nearest[bits >> 16 & 0x7FFF] | (bits >> 24 & 0x80).astype(np.uint8)
    return codes


def shard_numbers(entries: Sequence[Entry], shards: int) -> list[int]:
    """Shard of each tensor, filled in order: a shard ends with the tensor that crosses its limit.

    So nearly every shard ends with a weight whose scale begins the next one.
    """
    total = sum(entry.nbytes for entry in entries)
    numbers, offset = [], 0
    for entry in entries:
        numbers.append(offset * shards // total)
        offset += entry.nbytes
    return numbers


def write_parent(
    folder: Path, entries: Sequence[Entry], config: dict[str, Any], *, shards: int, source: RandomBytes | None
) -> None:
    """A checkpoint folder; without a source the bodies are holes."""
    folder.mkdir(parents=True)
    numbers = shard_numbers(entries, shards)
    weight_map: dict[str, str] = {}
    members: list[list[Entry]] = [[] for _ in range(shards)]
    for entry, number in zip(entries, numbers, strict=True):
        members[number].append(entry)
        weight_map[entry.name] = f"model-{number + 1:05d}-of-{shards:06d}.safetensors"
    for number, shard in enumerate(members):
        _write_shard(folder / f"model-{number + 1:05d}-of-{shards:06d}.safetensors", shard, source)
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
    for name, content in {
        "model.safetensors.index.json": index,
        "config.json": config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _write_shard(path: Path, entries: Sequence[Entry], source: RandomBytes | None) -> None:
    # The safetensors library lays out a file by item size, widest first, then by name.
    ordered = sorted(entries, key=lambda entry: (-ITEM_BYTES[entry.dtype], entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        if source is None:
            file.truncate(8 + len(raw) + offset)
        else:
            for entry in ordered:
                source.write(file, entry)


CASES = {"v3-half": v3_half, "many-small": many_small, "one-big": one_big}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a pair of benchmark parents, FOLDER/base and FOLDER/other."
    )
    parser.add_argument("case", choices=["v3-full", "v3-sample", *CASES])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--gb", type=float, default=2.5, help="least size of a v3-sample parent in 10^9 bytes"
    )
    arguments = parser.parse_args()
    if arguments.case == "v3-sample":
        v3_sample(arguments.folder, int(arguments.gb * 1e9))
    else:
        {"v3-full": v3_full, **CASES}[arguments.case](arguments.folder)


if __name__ == "__main__":
    main()
