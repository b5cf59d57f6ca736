"""Walks over tiny models, the whole models that they are held against, and demonstrations to walk over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import surgery
from surgery.calibrate.batches import Batch
from surgery.calibrate.walk import Walk, WalkSettings
from surgery.evaluate.load import load_model
from surgery.stream.checkpoint import Checkpoint

CPU = torch.device("cpu")
Families = Callable[..., Path]
"""The fixture `tiny`: the folder of a tiny model of a family, with changes of its config."""
DEMOS = ("The quick brown fox jumps over the lazy dog.", "0123456789 + 1 = ?", "if x: return y", "ÄÖÜ ß 東京")
Sequences = list[tuple[int, list[int]]]


def sequences(lengths: Sequence[int], seed: int = 0, domains: Sequence[int] | None = None) -> Sequences:
    """Random ids of these lengths, each in its domain (0 by default)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (domain, torch.randint(6, 260, (length,), generator=generator).tolist())
        for length, domain in zip(lengths, domains or [0] * len(lengths), strict=True)
    ]


def settings(dtype: torch.dtype = torch.float32, **changes: Any) -> WalkSettings:
    options: dict[str, Any] = {"room_bytes": 1 << 30, "host_bytes": 1 << 30, **changes}
    return WalkSettings(CPU, dtype, **options)


def walked(
    checkpoint: Checkpoint, batches: Sequence[Batch], dtype: torch.dtype = torch.float32, **changes: Any
) -> Walk:
    """A walk without steps that has come to the end."""
    walk = Walk(checkpoint, batches, [], settings(dtype, **changes))
    walk.run()
    return walk


def whole(checkpoint: Checkpoint | Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model in memory, its experts in their eager loop."""
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else surgery.open(checkpoint)
    model: Any = load_model(opened, dtype=str(dtype).removeprefix("torch.")).model
    return eager(model)


def eager(model: Any) -> Any:
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("eager")
    return model.eval()


def alone(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A folder loaded by transformers by itself."""
    return eager(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options))


def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def distance(found: torch.Tensor, reference: torch.Tensor) -> float:
    """‖found − reference‖ / ‖reference‖ in float64."""
    wide = reference.double()
    return float((found.double() - wide).norm() / wide.norm())


def demos(path: Path, texts: Sequence[str] = DEMOS, *, repeat: int = 1) -> Path:
    """A JSONL file with a `text` in each line."""
    lines = [json.dumps({"text": f"{text} {number}"}) for number in range(repeat) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def experts_of(layer: Any) -> Any:
    """transformers' module with the routed experts of a decoder layer, or None."""
    found = [module for name, module in layer.named_modules() if name.endswith("experts")]
    found = [module for module in found if hasattr(module, "down_proj") and hasattr(module, "num_experts")]
    return found[0] if found else None


@contextmanager
def masked_routers(
    model: Any, layers: Mapping[int, Sequence[int]], groups: tuple[int, int] = (1, 1)
) -> Iterator[None]:
    """The whole model, choosing among the kept experts alone: per token and from the formulas.

    `layers` are the kept experts by layer in their new order; `groups` is how many groups they make, in that
    order, and among how many a token chooses.
    """

    def masking(kept: tuple[int, ...]) -> Callable[..., tuple[torch.Tensor, ...]]:
        return lambda router, args, out: _masked(model.config, router, args[0], kept, groups)

    handles = []
    for number, kept in layers.items():
        block = next(module for module in model.model.layers[number].modules() if hasattr(module, "experts"))
        router = block.gate if hasattr(block, "gate") else block.router
        handles.append(router.register_forward_hook(masking(tuple(kept))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masked(
    config: Any, router: Any, hidden: torch.Tensor, kept: tuple[int, ...], groups: tuple[int, int]
) -> tuple[torch.Tensor, ...]:
    family, flat, weight = config.model_type, hidden.reshape(-1, hidden.shape[-1]), router.weight
    wide = family in ("deepseek_v2", "deepseek_v3", "glm4_moe")
    if wide:
        flat, weight = flat.float(), weight.float()
    logits = torch.nn.functional.linear(flat, weight, getattr(router, "bias", None))
    gone = torch.tensor([expert for expert in range(logits.shape[1]) if expert not in kept])
    if family in ("deepseek_v3", "glm4_moe"):
        scores = logits.sigmoid()
        choice = scores + router.e_score_correction_bias
    elif family in ("gpt_oss", "llama4_text"):
        scores = choice = logits
    else:
        scores = choice = logits.index_fill(1, gone, float("-inf")).float().softmax(dim=-1)
    choice = choice.index_fill(1, gone, float("-inf"))
    if groups[0] > 1:
        size = len(kept) // groups[0]
        members = [list(kept[start : start + size]) for start in range(0, len(kept), size)]
        best = 2 if family == "deepseek_v3" else 1
        strength = torch.stack([choice[:, each].topk(best).values.sum(1) for each in members], 1)
        for token, chosen in enumerate(strength.topk(groups[1]).indices.tolist()):
            for number, each in enumerate(members):
                if number not in chosen:
                    choice[token, each] = float("-inf")
    index = choice.topk(config.num_experts_per_tok).indices
    gates = scores.gather(1, index)
    if family == "llama4_text":
        return torch.zeros_like(logits).scatter_(1, index, gates.sigmoid()), logits
    if family == "gpt_oss":
        gates = gates.softmax(dim=-1)
    elif family == "mixtral" or (config.norm_topk_prob and family != "deepseek_v2"):
        gates = gates / gates.sum(1, keepdim=True)
    if wide:
        return logits, gates * config.routed_scaling_factor, index
    return logits, gates.to(hidden.dtype), index
