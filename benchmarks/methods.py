"""Merge methods against mergekit in the same run: time and peak memory of each program, medians.

    python benchmarks/methods.py [--mergekit MERGEKIT-YAML] [--cuda] [--gb 2.94] [--repeat 3]
        [--work FOLDER] [CASE …]

A base and two bf16 Llama-shaped models of random weights; both programs read one mergekit YAML, in turn. Warm
cache. Processor seconds (user and system) stand beside wall seconds: on a machine that is not idle they are
the fairer figure, and the load average says how idle it was. `cp` copies a file of the output's size.
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
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

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


class Run(NamedTuple):
    """One process: wall and processor seconds, peak RSS in bytes."""

    wall: float
    cpu: float
    rss: int


def measured(command: Sequence[str], out: Path) -> Run:
    """Run a command; what it wrote is removed."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def medians(runs: Sequence[Run]) -> Run:
    walls, cpus, peaks = zip(*runs, strict=True)
    return Run(median(walls), median(cpus), int(median(peaks)))


def row(name: str, runs: Mapping[str, Sequence[Run]]) -> str:
    """A line of the table; `runs` are ours, cp's and perhaps ours on a GPU and mergekit's."""
    ours, copy = medians(runs["ours"]), medians(runs["cp"])
    cells = [f"{ours.wall:.1f}", f"{ours.cpu:.1f}", f"{ours.rss / 1e6:.0f}", f"{ours.wall / copy.wall:.1f}"]
    if "cuda" in runs:
        there = medians(runs["cuda"])
        cells += [f"{there.wall:.1f}", f"{there.cpu:.1f}"]
    if "mergekit" in runs:
        theirs = medians(runs["mergekit"])
        cells += [f"{theirs.wall:.1f}", f"{theirs.cpu:.1f}", f"{theirs.rss / 1e6:.0f}"]
        cells += [f"1/{theirs.wall / ours.wall:.1f}", f"1/{theirs.cpu / ours.cpu:.1f}"]
        cells += [f"1/{theirs.rss / ours.rss:.1f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", help="the program mergekit-yaml; without it ours alone is timed")
    parser.add_argument("--cuda", action="store_true", help="time ours with --device cuda as well")
    parser.add_argument("--gb", type=float, default=2.94)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="a folder with room for the base, two models and an output")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        work = Path(temporary)
        # In a process of its own: what is started from here would inherit its peak RSS.
        writer = get_context("spawn").Process(target=write_models, args=(work, arguments.gb))
        writer.start()
        writer.join()
        model, copy = work / "a" / "model.safetensors", work / "copy"
        print(f"output {model.stat().st_size / 1e9:.2f} GB, {arguments.repeat} turns, load {os.getloadavg()}")
        columns = ["method", "s", "CPU s", "MB", "x cp"]
        if arguments.cuda:
            columns += ["cuda s", "CPU s"]
        if arguments.mergekit:
            columns += ["mergekit s", "CPU s", "MB", "time", "CPU", "memory"]
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
        for name, config in cases(work).items():
            if arguments.cases and name not in arguments.cases:
                continue
            path, out = work / f"{name}.yaml", work / "out"
            path.write_text(yaml.safe_dump({**config, "dtype": "bfloat16"}))
            commands = {
                "cp": (["cp", str(model), str(copy)], copy),
                "ours": ([sys.executable, "-m", "surgery", "run", str(path), "-o", str(out), "-q"], out),
            }
            if arguments.cuda:
                commands["cuda"] = ([*commands["ours"][0], "--device", "cuda"], out)
            if arguments.mergekit:
                commands["mergekit"] = ([arguments.mergekit, str(path), str(out)], out)
            runs: dict[str, list[Run]] = {program: [] for program in commands}
            for _ in range(arguments.repeat):  # in turn, so that what else the machine does meets all
                for program, (command, target) in commands.items():
                    runs[program].append(measured(command, target))
            print(row(name, runs), flush=True)
        print(f"load {os.getloadavg()}")


if __name__ == "__main__":
    main()
