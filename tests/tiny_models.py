"""Tiny random models with a byte-level tokenizer, saved by transformers, and their FP8 twins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

Build = Callable[..., Path]
"""The fixture `build` of tests/evaluate."""

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<think>")
VOCAB = 320
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 96}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 160, "num_hidden_layers": 2},
    "deepseek_v3": {
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 192,
        "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
        "v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "moe_intermediate_size": 96, "num_nextn_predict_layers": 0,
    },
    "mixtral": {**_TWO_LAYERS, "num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": {**_TWO_LAYERS, "num_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_TWO_LAYERS, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80, "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        **_TWO_LAYERS, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "decoder_sparse_step": 1, "head_dim": 16,
    },
    "glm4_moe": {
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 96, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "head_dim": 16,
    },
    "gpt_oss": {
        **_TWO_LAYERS, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8,
    },
    "llama4_text": {
        **_TWO_LAYERS, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16,
        "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1,
    },
    "gemma2": {**_TWO_LAYERS, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {
        "intermediate_size": 96, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 8,
    },
    "phi3": _TWO_LAYERS,
    "qwen2": {**_TWO_LAYERS, "tie_word_embeddings": True},
    "qwen3": {**_TWO_LAYERS, "head_dim": 16},
    "mistral": {**_TWO_LAYERS, "sliding_window": 8},
}  # fmt: skip
CONFIGS["deepseek_v2"] = {
    **CONFIGS["deepseek_v3"], "topk_method": "group_limited_greedy", "head_dim": 48,
}  # fmt: skip


def write_tokenizer(folder: Path, **config: Any) -> None:
    """One token per byte, after the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    settings |= {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))


def decode_blocks(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 of e4m3 codes with one scale per 128x128 block, block by block."""
    values = codes.to(torch.float32)
    for down in range(scales.shape[0]):
        for across in range(scales.shape[1]):
            block = (slice(down * 128, (down + 1) * 128), slice(across * 128, (across + 1) * 128))
            values[block] *= scales[down, across]
    return values


def to_fp8(folder: Path, target: Path) -> Path:
    """`folder` with FP8 blocks for all matrices of the decoder layers but the routers."""
    target.mkdir()
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim != 2 or ".layers." not in name or name.endswith("mlp.gate.weight"):
            stored[name] = tensor
            continue
        down, across = (-(-side // 128) for side in tensor.shape)
        scales = torch.empty(down, across)
        codes = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for i in range(down):
            for j in range(across):
                block = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
                scales[i, j] = tensor[block].abs().max() / 448
                codes[block] = (tensor[block] / scales[i, j]).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = codes, scales
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (target / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def to_decoded(folder: Path, target: Path) -> Path:
    """An FP8 folder in float32, decoded here and not by the toolkit."""
    target.mkdir()
    stored = load_file(folder / "model.safetensors")
    decoded = {
        name: decode_blocks(tensor, stored[f"{name}_scale_inv"])
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }
    save_file(decoded, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the stored tensors of a folder in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def build_model(folder: Path, family: str, seed: int = 0, **config: Any) -> Path:
    """A model of `family` whose weights are large enough for logits that differ."""
    settings = AutoConfig.for_model(family, **{**COMMON, **CONFIGS[family], **config})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith((".bias", ".sinks")):
                parameter.normal_(std=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
