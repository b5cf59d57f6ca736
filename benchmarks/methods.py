"""Merge methods against mergekit in the same run: wall seconds and peak memory of each program.

    python benchmarks/methods.py --mergekit PATH/TO/mergekit-yaml [--gb 2.94] [--work FOLDER] [CASE …]

A base and two bf16 Llama-shaped models of random weights; both programs read one mergekit YAML. Warm cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

HIDDEN, INNER, VOCAB = 2048, 5632, 32000
LAYER_WEIGHTS = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
TASK = {"weight": 0.5, "density": 0.5}


def write_models(work: Path, gb: float) -> None:
    """base, a and b of `gb` 10⁹ bytes each."""
    layers = max(1, round((gb * 1e9 / 2 - 2 * VOCAB * HIDDEN) / LAYER_WEIGHTS))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": VOCAB, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    for label in ("base", "a", "b"):
        tensors = {}
        for number, (name, shape) in enumerate(shapes.items()):
            values = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(number))
            if label != "base":
                seed = number + (100_000 if label == "a" else 200_000)
                values += 0.002 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            tensors[name] = values.bfloat16()
        (work / label).mkdir(parents=True)
        save_file(tensors, work / label / "model.safetensors", {"format": "pt"})
        (work / label / "config.json").write_text(json.dumps(config))


def cases(work: Path) -> dict[str, dict[str, Any]]:
    base, a, b = (str(work / each) for each in ("base", "a", "b"))
    two = [{"model": a, "parameters": TASK}, {"model": b, "parameters": TASK}]
    plain = [{"model": each, "parameters": {"weight": 0.5}} for each in (a, b)]
    pair = [{"model": base}, {"model": a}]
    return {
        "linear": {"merge_method": "linear", "models": plain},
        "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": base, "models": plain},
        "slerp": {"merge_method": "slerp", "base_model": base, "models": pair, "parameters": {"t": 0.5}},
        "arcee_fusion": {"merge_method": "arcee_fusion", "base_model": base, "models": pair},
        "dare_ties": {"merge_method": "dare_ties", "base_model": base, "models": two},
        "ties": {"merge_method": "ties", "base_model": base, "models": two},
    }


def measured(command: Sequence[str], out: Path) -> tuple[float, int]:
    """Wall seconds and peak RSS in bytes of one process; its output folder is removed."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    shutil.rmtree(out, ignore_errors=True)
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", help="the program mergekit-yaml; without it ours alone is timed")
    parser.add_argument("--gb", type=float, default=2.94)
    parser.add_argument("--work", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        work = Path(temporary)
        # In a process of its own: what is started from here would inherit its peak RSS.
        writer = get_context("spawn").Process(target=write_models, args=(work, arguments.gb))
        writer.start()
        writer.join()
        begin = time.perf_counter()
        shutil.copyfile(work / "a" / "model.safetensors", work / "copy")
        print(f"cp: {time.perf_counter() - begin:.2f} s for {(work / 'copy').stat().st_size / 1e9:.2f} GB")
        print("| method | ours s | ours MB | mergekit s | mergekit MB | time | memory |")
        print("|---|---|---|---|---|---|---|")
        for name, config in cases(work).items():
            if arguments.cases and name not in arguments.cases:
                continue
            path, out = work / f"{name}.yaml", work / "out"
            path.write_text(yaml.safe_dump({**config, "dtype": "bfloat16"}))
            ours = measured([sys.executable, "-m", "surgery", "run", str(path), "-o", str(out), "-q"], out)
            row = f"| {name} | {ours[0]:.1f} | {ours[1] / 1e6:.0f} |"
            if arguments.mergekit:
                theirs = measured([arguments.mergekit, str(path), str(out)], out)
                row += f" {theirs[0]:.1f} | {theirs[1] / 1e6:.0f} | 1/{theirs[0] / ours[0]:.1f} |"
                row += f" 1/{theirs[1] / ours[1]:.1f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
