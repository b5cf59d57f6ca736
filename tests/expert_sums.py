"""The sums of a layer's experts, token by token in float64 from the formulas: the reference of statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from walk_models import alone, experts_of, run

Rows = dict[int, np.ndarray[Any, np.dtype[np.float64]]]
"""By layer: [domains, 8, experts]."""
PREFIXES = {
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "other": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}


def naive_sums(
    folder: Path, family: str, sequences: Sequence[tuple[int, Sequence[int]]], domains: int = 1
) -> Rows:
    """Count, g, g², ‖e‖, ‖e‖², g‖e‖, g‖e‖s and max ‖e‖ of each expert, sequence by sequence.

    The residual and the router's choice come from hooks on transformers' model in memory, experts' outputs
    from the stored matrices.
    """
    stored = load_file(folder / "model.safetensors")
    model = alone(folder)
    seen: dict[int, dict[str, Any]] = {}
    for number, layer in enumerate(model.model.layers):
        experts = experts_of(layer)
        if experts is None:
            continue
        seen[number] = {}
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, n=number: seen[n].update(residual=args[0][0])
        )
        experts.register_forward_pre_hook(
            lambda _, args, n=number: seen[n].update(inputs=args[0], index=args[1], gates=args[2])
        )
    count = experts_of(model.model.layers[-1]).num_experts
    sums = {number: np.zeros((domains, 8, count)) for number in seen}
    for domain, ids in sequences:
        run(model, torch.tensor([list(ids)]))
        for number, found in seen.items():
            _add(sums[number][domain], number, family, found, stored)
    return sums


def _add(
    table: np.ndarray[Any, np.dtype[np.float64]], layer: int, family: str, found: dict[str, Any], stored: Any
) -> None:
    where, *names = PREFIXES.get(family, PREFIXES["other"])
    for token in range(found["index"].shape[0]):
        x, h = found["inputs"][token].double(), found["residual"][token].double()
        outputs = []
        for expert, gate in zip(found["index"][token].tolist(), found["gates"][token].tolist(), strict=True):
            w_gate, w_up, w_down = (
                stored[f"model.layers.{layer}.{where}.{expert}.{name}.weight"].double() for name in names
            )
            inner = w_gate @ x
            outputs.append((expert, gate, w_down @ (inner * torch.sigmoid(inner) * (w_up @ x))))
        after = h + sum(gate * out for _, gate, out in outputs)
        weight = max(0.0, 1 - float(h @ after / (h.norm() * after.norm())))
        for expert, gate, out in outputs:
            norm = float(out.norm())
            table[:7, expert] += [
                1, gate, gate**2, norm, norm**2, gate * norm, gate * norm * weight
            ]  # fmt: skip
            table[7, expert] = max(table[7, expert], norm)
