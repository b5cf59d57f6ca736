"""Tiny checkpoints in the layouts that models are published in, deterministic from a seed.

Names, shapes, dtypes and configs follow the published files; only the sizes differ. Two factories called with
different seeds give parents of equal shapes; `base` and `delta`, or `vary`, give parents near each other.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from checkpoint_writer import BLOCK, Tensors, decode_fp8, encode_fp8, noise, write_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file

VOCAB = 320


def deepseek_v3(
    folder: Path,
    seed: int,
    *,
    layers: int = 3,
    dense: int = 1,
    experts: int = 8,
    hidden: int = 256,
    moe_intermediate: int = 128,
    mtp: bool = True,
    fp8: bool = True,
    scale_fmt: str | None = None,
    e8m0_storage: bool = False,
    ragged: bool = True,
    shards: int = 4,
    split_scales: bool = True,
    base: int | None = None,
    delta: float = 0.0,
) -> Path:
    """DeepSeek-V3 / R1 (V3.1 with `scale_fmt="ue8m0"`); the MTP layer follows the last one.

    `ragged` gives attention and the dense MLP rows and columns that are no multiple of 128, as the published
    kv_a_proj_with_mqa has; without it every FP8 dimension is a multiple and transformers loads the folder.
    `split_scales` moves the scale of every fifth weight to another shard.
    """
    heads, nope, rope, value = 2, 64, 64 if ragged else 128, 64
    q_rank, kv_rank, intermediate = (192, 128, 320) if ragged else (128, 128, 256)
    tensors = Tensors(seed, base, delta, fp8=fp8, scale_fmt=scale_fmt, e8m0=e8m0_storage)

    def decoder_layer(prefix: str, *, moe: bool) -> None:
        attention = f"{prefix}.self_attn"
        tensors.linear(f"{attention}.q_a_proj.weight", q_rank, hidden)
        tensors.norm(f"{attention}.q_a_layernorm.weight", q_rank)
        tensors.linear(f"{attention}.q_b_proj.weight", heads * (nope + rope), q_rank)
        tensors.linear(f"{attention}.kv_a_proj_with_mqa.weight", kv_rank + rope, hidden)
        tensors.norm(f"{attention}.kv_a_layernorm.weight", kv_rank)
        tensors.linear(f"{attention}.kv_b_proj.weight", heads * (nope + value), kv_rank)
        tensors.linear(f"{attention}.o_proj.weight", hidden, heads * value)
        if moe:
            tensors.plain(f"{prefix}.mlp.gate.weight", experts, hidden)
            tensors.plain(f"{prefix}.mlp.gate.e_score_correction_bias", experts, dtype=torch.float32)
            tensors.swiglu(f"{prefix}.mlp.shared_experts", moe_intermediate, hidden)
            for expert in range(experts):
                tensors.swiglu(f"{prefix}.mlp.experts.{expert}", moe_intermediate, hidden)
        else:
            tensors.swiglu(f"{prefix}.mlp", intermediate, hidden)
        _norms(tensors, prefix, hidden)

    tensors.plain("model.embed_tokens.weight", VOCAB, hidden)
    for layer in range(layers):
        decoder_layer(f"model.layers.{layer}", moe=layer >= dense)
    _head(tensors, hidden)
    if mtp:
        prefix = f"model.layers.{layers}"
        decoder_layer(prefix, moe=True)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors.norm(f"{prefix}.{name}.weight", hidden)
        tensors.plain(f"{prefix}.eh_proj.weight", hidden, 2 * hidden)
        tensors.plain(f"{prefix}.embed_tokens.weight", VOCAB, hidden)
        tensors.plain(f"{prefix}.shared_head.head.weight", VOCAB, hidden)

    config = _config("DeepseekV3ForCausalLM", "deepseek_v3", hidden, heads, heads, intermediate)
    config |= {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": int(mtp),
        "first_k_dense_replace": dense,
    }
    config |= {"q_lora_rank": q_rank, "kv_lora_rank": kv_rank, "v_head_dim": value}
    config |= {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "attention_bias": False}
    config |= {
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_layer_freq": 1,
    }
    config |= {
        "n_group": 2 if experts % 2 == 0 else 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "ep_size": 1,
    }
    config |= {
        "moe_intermediate_size": moe_intermediate,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }
    config |= {"scoring_func": "sigmoid", "use_cache": True}
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    if fp8:
        quantization: dict[str, Any] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        quantization["weight_block_size"] = [BLOCK, BLOCK]
        config["quantization_config"] = quantization | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    write_checkpoint(folder, tensors.stored, config, shards=shards, split_scales=split_scales)
    for name, class_name in (("configuration", "DeepseekV3Config"), ("modeling", "DeepseekV3ForCausalLM")):
        (folder / f"{name}_deepseek.py").write_text(
            f'"""Remote code."""\n\n\nclass {class_name}:\n    pass\n'
        )
    return folder


def llama(
    folder: Path, seed: int, *, dtype: torch.dtype = torch.bfloat16, tied: bool = False, shards: int = 2
) -> Path:
    """A dense model; `tied` leaves lm_head out."""
    hidden, inner, heads, kv_heads, head = 64, 160, 4, 2, 16
    tensors = Tensors(seed, dtype=dtype)
    tensors.plain("model.embed_tokens.weight", VOCAB, hidden)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        _attention(tensors, prefix, hidden, heads, kv_heads, head)
        tensors.swiglu(f"{prefix}.mlp", inner, hidden)
        _norms(tensors, prefix, hidden)
    _head(tensors, hidden)
    if tied:
        del tensors.stored["lm_head.weight"]
    config = _config("LlamaForCausalLM", "llama", hidden, heads, kv_heads, inner)
    config |= {
        "head_dim": head,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_checkpoint(folder, tensors.stored, config, shards=shards)
    return folder


def qwen3_moe(folder: Path, seed: int, *, experts: int = 8, shards: int = 2) -> Path:
    """Per-expert matrices and a router `mlp.gate`, bf16."""
    hidden, inner, heads, kv_heads, head = 64, 32, 4, 2, 16
    tensors = Tensors(seed)
    tensors.plain("model.embed_tokens.weight", VOCAB, hidden)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        _attention(tensors, prefix, hidden, heads, kv_heads, head)
        tensors.norm(f"{prefix}.self_attn.q_norm.weight", head)
        tensors.norm(f"{prefix}.self_attn.k_norm.weight", head)
        tensors.plain(f"{prefix}.mlp.gate.weight", experts, hidden)
        for expert in range(experts):
            tensors.swiglu(f"{prefix}.mlp.experts.{expert}", inner, hidden)
        _norms(tensors, prefix, hidden)
    _head(tensors, hidden)
    config = _config("Qwen3MoeForCausalLM", "qwen3_moe", hidden, heads, kv_heads, 160)
    config |= {"head_dim": head, "moe_intermediate_size": inner, "num_experts": experts}
    config |= {
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    write_checkpoint(folder, tensors.stored, config, shards=shards)
    return folder


def gpt_oss_mxfp4(folder: Path, seed: int, *, experts: int = 4, shards: int = 2) -> Path:
    """Fused experts as MXFP4 blocks and scales (random bytes), expert is the first dimension."""
    return _gpt_oss(folder, seed, experts, shards, mxfp4=True)


def gpt_oss_bf16(folder: Path, seed: int, *, experts: int = 4, shards: int = 2) -> Path:
    """Fused experts as [expert, in, out] matrices, gate and up columns interleaved."""
    return _gpt_oss(folder, seed, experts, shards, mxfp4=False)


def _gpt_oss(folder: Path, seed: int, experts: int, shards: int, *, mxfp4: bool) -> Path:
    hidden, inner, heads, kv_heads, head = 64, 96, 4, 2, 16
    tensors = Tensors(seed)
    tensors.plain("model.embed_tokens.weight", VOCAB, hidden)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        _attention(tensors, prefix, hidden, heads, kv_heads, head, bias=True)
        tensors.plain(f"{prefix}.self_attn.sinks", heads)
        tensors.plain(f"{prefix}.mlp.router.weight", experts, hidden)
        tensors.plain(f"{prefix}.mlp.router.bias", experts)
        for name, rows, cols in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            fused = f"{prefix}.mlp.experts.{name}"
            if mxfp4:
                tensors.packed(f"{fused}_blocks", experts, rows, cols // 32, 16)
                tensors.packed(f"{fused}_scales", experts, rows, cols // 32, low=118, high=124)
            else:
                tensors.plain(fused, experts, cols, rows)
            tensors.plain(f"{fused}_bias", experts, rows)
        _norms(tensors, prefix, hidden)
    _head(tensors, hidden)
    config = _config("GptOssForCausalLM", "gpt_oss", hidden, heads, kv_heads, inner)
    config |= {"head_dim": head, "num_local_experts": experts, "num_experts_per_tok": 2}
    config |= {
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 128,
    }
    if mxfp4:
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    write_checkpoint(folder, tensors.stored, config, shards=shards)
    return folder


def llama4_text(folder: Path, seed: int, *, experts: int = 4, wrapped: bool = False, shards: int = 2) -> Path:
    """Fused experts [expert, in, out]; `wrapped` as in the multimodal files, under `language_model.`."""
    hidden, inner, heads, kv_heads, head = 64, 32, 4, 2, 16
    root = "language_model." if wrapped else ""
    tensors = Tensors(seed)
    tensors.plain(f"{root}model.embed_tokens.weight", VOCAB, hidden)
    for layer in range(2):
        prefix = f"{root}model.layers.{layer}"
        _attention(tensors, prefix, hidden, heads, kv_heads, head)
        tensors.plain(f"{prefix}.feed_forward.router.weight", experts, hidden)
        tensors.plain(f"{prefix}.feed_forward.experts.gate_up_proj", experts, hidden, 2 * inner)
        tensors.plain(f"{prefix}.feed_forward.experts.down_proj", experts, inner, hidden)
        tensors.swiglu(f"{prefix}.feed_forward.shared_expert", inner, hidden)
        _norms(tensors, prefix, hidden)
    _head(tensors, hidden, root)
    config = _config("Llama4ForCausalLM", "llama4_text", hidden, heads, kv_heads, inner)
    config |= {"head_dim": head, "intermediate_size_mlp": inner, "num_local_experts": experts}
    config |= {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "use_qk_norm": False}
    if wrapped:
        tensors.plain("multi_modal_projector.linear_1.weight", hidden, 48)
        text = {key: value for key, value in config.items() if key != "architectures"}
        config = {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "text_config": text,
        }
    write_checkpoint(folder, tensors.stored, config, shards=shards)
    return folder


def vary(folder_in: Path, folder_out: Path, seed: int, scale: float) -> Path:
    """Another parent: each weight plus noise of `scale` times its RMS, encoded as it was.

    Packed 4-bit codes are drawn anew. Side files, shards and names stay.
    """
    shutil.copytree(folder_in, folder_out)
    quantization = json.loads((folder_in / "config.json").read_text()).get("quantization_config", {})
    ue8m0 = quantization.get("scale_fmt") == "ue8m0"
    shards = {path.name: _load(path) for path in sorted(folder_in.glob("*.safetensors"))}
    old = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    new = dict(old)
    for name, tensor in old.items():
        if name.endswith("_scale_inv") or name.endswith("_scales"):
            continue
        if tensor.dtype == torch.uint8:
            packed = Tensors(seed)
            packed.packed(name, *tensor.shape)
            new[name] = packed.stored[name]
        elif tensor.dtype == torch.float8_e4m3fn:
            scales = old[f"{name}_scale_inv"]
            codes, fresh = encode_fp8(_moved(decode_fp8(tensor, scales), seed, name, scale), ue8m0=ue8m0)
            new |= {name: codes, f"{name}_scale_inv": fresh.to(scales.dtype)}
        else:
            new[name] = _moved(tensor.to(torch.float32), seed, name, scale).to(tensor.dtype)
    for file, shard in shards.items():
        save_file({name: new[name] for name in shard}, folder_out / file, metadata={"format": "pt"})
    return folder_out


def _moved(values: torch.Tensor, seed: int, name: str, scale: float) -> torch.Tensor:
    if scale == 0:
        return values  # adding zeros would turn -0 into 0
    return values + noise(seed, name, values.shape) * (scale * values.square().mean().sqrt())


def _load(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _attention(
    tensors: Tensors, prefix: str, hidden: int, heads: int, kv_heads: int, head: int, *, bias: bool = False
) -> None:
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads), ("o", 0)):
        rows, cols = (count * head, hidden) if count else (hidden, heads * head)
        tensors.plain(f"{prefix}.self_attn.{name}_proj.weight", rows, cols)
        if bias:
            tensors.plain(f"{prefix}.self_attn.{name}_proj.bias", rows)


def _norms(tensors: Tensors, prefix: str, hidden: int) -> None:
    tensors.norm(f"{prefix}.input_layernorm.weight", hidden)
    tensors.norm(f"{prefix}.post_attention_layernorm.weight", hidden)


def _head(tensors: Tensors, hidden: int, root: str = "") -> None:
    tensors.norm(f"{root}model.norm.weight", hidden)
    tensors.plain(f"{root}lm_head.weight", VOCAB, hidden)


def _config(
    architecture: str, model_type: str, hidden: int, heads: int, kv_heads: int, intermediate: int
) -> dict[str, Any]:
    config: dict[str, Any] = {"architectures": [architecture], "model_type": model_type}
    config |= {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
    }
    config |= {"num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config |= {"rms_norm_eps": 1e-06, "rope_theta": 10000.0, "max_position_embeddings": 512}
    config |= {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    return config
