"""Parity with mergekit on fp32 parents: run both on tiny Llama-shaped models and compare tensor by tensor.

    python benchmarks/mergekit_parity.py --mergekit PATH/TO/mergekit-yaml [--work FOLDER]

mergekit runs as a program from an environment of its own; nothing of it is imported. Errors are
‖ours − theirs‖ / ‖theirs‖ over all tensors, and the largest difference of one entry.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from surgery.recipe.api import run

HIDDEN, INNER, LAYERS, VOCAB = 64, 176, 3, 320
TASK = {"weight": 0.6, "density": 0.5}


def write_model(folder: Path, seed: int, base: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """A Llama-shaped model in fp32; near `base` where there is one."""
    random = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    tensors = {name: 0.05 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    if base is not None:
        tensors = {name: base[name] + 0.3 * tensors[name] for name in tensors}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": VOCAB, "torch_dtype": "float32", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def cases(base: str, a: str, b: str) -> dict[str, dict[str, Any]]:
    """Configurations of mergekit by name."""

    def tasks(method: str, model: dict[str, Any], **shared: Any) -> dict[str, Any]:
        models = [{"model": base}, {"model": a, "parameters": model}, {"model": b, "parameters": model}]
        return {"merge_method": method, "base_model": base, "models": models, "parameters": shared}

    weight = {"weight": 0.6}
    pair = [{"model": a, "parameters": {"weight": [0.2, 0.8]}}, {"model": b, "parameters": {"weight": 0.5}}]
    filters = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": 0.3}, {"value": 0.6}]
    return {
        "linear, gradient": {"merge_method": "linear", "models": pair},
        "slerp, filters": {
            "merge_method": "slerp", "base_model": base, "models": [{"model": base}, {"model": a}],
            "parameters": {"t": filters},
        },
        "task_arithmetic": tasks("task_arithmetic", weight, **{"lambda": 0.7}),
        "ties": tasks("ties", TASK),
        "ties, not normalised": tasks("ties", TASK, normalize=False),
        "dare_linear, density 1": tasks("dare_linear", {"weight": 0.6, "density": 1.0}),
        "dare_ties, density 1": tasks("dare_ties", {"weight": 0.6, "density": 1.0}),
        "della, density 1": tasks("della", {"weight": 0.6, "density": 1.0}),
        "breadcrumbs": tasks("breadcrumbs", {"weight": 0.6, "density": 0.8, "gamma": 0.05}),
        "sce, all": tasks("sce", {}),
        "sce, top half": tasks("sce", {}, select_topk=0.5),
        "model_stock": tasks("model_stock", {}),
        "nuslerp": {"merge_method": "nuslerp", "models": pair},
        "karcher": {"merge_method": "karcher", "models": [{"model": a}, {"model": b}]},
        "arcee_fusion": {
            "merge_method": "arcee_fusion", "base_model": base, "models": [{"model": base}, {"model": a}],
        },
        "stack": {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": a, "layer_range": [0, 2]}]},
                {"sources": [{"model": b, "layer_range": [1, 3]}]},
            ],
        },
    }  # fmt: skip


def compare(program: Path, work: Path) -> list[tuple[str, str, str, str]]:
    """One row per case: the relative error, the largest difference, and where tensors are off."""
    base = write_model(work / "base", 1, None)
    write_model(work / "a", 2, base)
    write_model(work / "b", 3, base)
    rows = []
    for name, config in cases(*(str(work / each) for each in ("base", "a", "b"))).items():
        stem = name.replace(",", "").replace(" ", "-")
        path = work / f"{stem}.yaml"
        path.write_text(yaml.safe_dump({**config, "dtype": "float32"}, sort_keys=False))
        command = [program, str(path), str(work / f"{stem}-theirs"), "--no-copy-tokenizer"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            rows.append((name, "mergekit fails", (done.stderr.strip().splitlines() or ["?"])[-1][:90], ""))
            continue
        run(path, work / f"{stem}-ours")
        theirs, ours = ({k: v for f in sorted((work / f"{stem}-{who}").glob("*.safetensors"))
                         for k, v in load_file(f).items()} for who in ("theirs", "ours"))  # fmt: skip
        if theirs.keys() != ours.keys():
            rows.append((name, "other tensors", str(len(theirs.keys() ^ ours.keys())), ""))
            continue
        gaps = {key: (ours[key].double() - theirs[key].double()) for key in theirs}
        norm = sum(float(each.double().square().sum()) for each in theirs.values()) ** 0.5
        error = sum(float(gap.square().sum()) for gap in gaps.values()) ** 0.5 / norm
        off = [key for key, gap in gaps.items() if float(gap.norm() / theirs[key].double().norm()) > 1e-6]
        rows.append((name, f"{error:.1e}", f"{max(float(g.abs().max()) for g in gaps.values()):.1e}",
                     f"{len(off)} of {len(gaps)}"))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", type=Path, required=True, help="the program mergekit-yaml")
    parser.add_argument("--work", type=Path, help="an empty folder (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = compare(arguments.mergekit, arguments.work or Path(temporary))
    print("| case | relative error | largest difference | tensors off by more than 1e-6 |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
