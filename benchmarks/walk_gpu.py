"""The layer walk on a GPU: equal to transformers, and its peak memory against the plan's figure.

    python benchmarks/walk_gpu.py [--layers 4] [--tokens 32768]

A scaled DeepSeek-V3 (hidden 2048, 64 experts of 512, top-8 of 8 groups, 32 heads, random bf16 weights) is
written to a temporary folder and walked in bf16. Checked: logits against transformers' own forward of the
whole model with the eager experts; experts kept on the device, in host memory and not at all give the same
bits; and torch's peak allocation during a walk with all sums taken, against `plan`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import surgery
from surgery.calibrate.batches import make_batches
from surgery.calibrate.budget import estimate_walk
from surgery.calibrate.ranks import ONE_RANK
from surgery.calibrate.walk import Walk, WalkSettings
from surgery.evaluate.load import load_model
from surgery.operators.experts.easy_ep import EasyEP
from surgery.operators.experts.keep import expert_shape
from surgery.operators.experts.walking import PruneStep

CONFIG: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "first_k_dense_replace": 1, "intermediate_size": 5632,
    "q_lora_rank": 512, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "n_routed_experts": 64, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "n_shared_experts": 1,
    "moe_intermediate_size": 512, "num_nextn_predict_layers": 0,
}  # fmt: skip


def build(folder: Path, layers: int) -> None:
    config = AutoConfig.for_model("deepseek_v3", **CONFIG, num_hidden_layers=layers)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768)
    given = parser.parse_args()
    device, dtype = torch.device("cuda"), torch.bfloat16
    with tempfile.TemporaryDirectory() as name:
        build(Path(name), given.layers)
        torch.cuda.empty_cache()
        checkpoint = surgery.open(name, "scaled")
        sequences = [(0, torch.randint(4096, (4096,)).tolist()) for _ in range(2 * given.tokens // 4096)]
        batches = make_batches(sequences, given.tokens)

        def walked(steps: list[Any], room: int, keep: str) -> Walk:
            settings = WalkSettings(device, dtype, room, 1 << 40, keep=keep)
            walk = Walk(checkpoint, batches, steps, settings)
            walk.run()
            return walk

        shape = expert_shape(checkpoint)
        criterion = EasyEP(keep=32, statistics="unused")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begun = time.time()
        step = PruneStep(criterion, shape, ("all",), ONE_RANK)
        walk = walked([step], 1 << 40, "device")
        torch.cuda.synchronize()
        seconds = time.time() - begun
        peak = torch.cuda.max_memory_allocated() - before
        reserved = torch.cuda.max_memory_reserved() - before
        planned = estimate_walk(
            checkpoint, [batch.shape for batch in batches], device="cuda", dtype="bfloat16",
            memory_bytes=1 << 30,
        )  # fmt: skip
        hidden = walk._now.flat.clone()
        same = {
            keep: torch.equal(walked([], room, keep)._now.flat, hidden)
            for keep, room in (("device", 0), ("host", 1 << 40))
        }
        again = PruneStep(criterion, shape, ("all",), ONE_RANK)
        walked([again], 1 << 40, "host")
        repeatable = all((step.sums[layer] == again.sums[layer]).all() for layer in step.sums)
        model: Any = load_model(checkpoint, device="cuda", dtype="bfloat16").model
        model.set_experts_implementation("eager")
        worst, equal = 0.0, True
        for batch, logits in zip(batches, walk.logits(), strict=True):
            # In batches of the same shape: products of other shapes round otherwise, and a router may flip.
            with torch.no_grad():
                expected = model(input_ids=batch.ids.to(device)).logits
            gap = (logits.double() - expected.double()).norm() / expected.double().norm()
            worst = max(worst, float(gap))
            equal = equal and torch.equal(logits, expected)
    print(json.dumps({
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": given.layers,
        "tokens": sum(batch.tokens for batch in batches), "walk_s": seconds,
        "peak_GB": peak / 1e9, "peak_reserved_GB": reserved / 1e9,
        "planned_GB": planned.device_bytes / 1e9,
        "parts": planned.as_dict()["parts"],
        "peak_to_plan": peak / planned.device_bytes, "same_bits_by_keeping": same,
        "same_sums_again": bool(repeatable), "logits_error": worst, "logits_equal": equal,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
