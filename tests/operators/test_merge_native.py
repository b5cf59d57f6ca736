"""Merge methods by the native kernels and by torch alone: the same bytes, sums and decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_writer import encode_fp8
from merge_methods import ALL, child, write

from surgery.codecs import native
from surgery.stream.checkpoint import ComputedRef, ReadContext, Sums
from surgery.stream.jobs import encode
from surgery.stream.source import open_checkpoint

SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (7, 13),
    "model.layers.0.input_layernorm.weight": (300,),
    "model.layers.1.self_attn.q_proj.weight": (259, 133),
    "model.layers.2.mlp.down_proj.weight": (3, 5, 2),
}
TILED = {"model.layers.2.mlp.up_proj.weight": (130, 8200)}
"""Two tiles; in one form alone, to save time."""
pytestmark = pytest.mark.skipif(native.cpu().library is None, reason="no kernels")
OPS: list[tuple[str, dict[str, Any]]] = [
    *ALL.items(),
    ("linear", {"models": {"a": 0.4, "b": -0.6}, "normalize": False}),
    (
        "task_arithmetic",
        {"base": "base", "models": {"a": 0.4, "b": 0.6}, "normalize": "weights", "scale": 0.7},
    ),
    ("task_arithmetic", {"base": "base", "models": {"a": 0.4, "b": 0.6}, "normalize": "norms"}),
    ("ties", {"base": "base", "models": {"a": {"density": 0.3, "weight": -0.3}, "b": 1, "c": 0.2}}),
    ("dare_ties", {"base": "base", "models": {"a": {"density": 0.37}, "b": 1}, "rescale": "l1", "seed": 4}),
    ("dare_ties", {"base": "base", "models": {"a": {"density": 0.6}, "b": 1}, "normalize": "weights"}),
    (
        "breadcrumbs",
        {"base": "base", "models": {"a": {"density": 0.1, "gamma": 0.95}, "b": {"density": 0.5}}},
    ),
]


def stored(values: torch.Tensor, name: str, form: str) -> dict[str, torch.Tensor]:
    if form == "fp8" and values.ndim == 2:
        codes, scales = encode_fp8(values)
        return {name: codes, f"{name}_scale_inv": scales}
    return {name: values.to({"f16": torch.float16, "f32": torch.float32}.get(form, torch.bfloat16))}


def folders(root: Path, forms: str) -> dict[str, Path]:
    random = torch.Generator().manual_seed(7)
    shapes = SHAPES | (TILED if forms == "bf16" else {})
    base = {name: 0.02 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    found = {}
    for label in ("base", "a", "b", "c"):
        form = {"mixed": {"base": "bf16", "a": "f32", "b": "f16", "c": "fp8"}[label]}.get(forms, forms)
        held: dict[str, torch.Tensor] = {}
        for name, values in base.items():
            near = values + 0.004 * torch.randn(values.shape, generator=random)
            held |= stored(values if label == "base" else near, name, form)
        found[label] = write(root / label, held)
    return found


@pytest.mark.parametrize("forms", ["bf16", "fp8", "mixed"])
@pytest.mark.parametrize(("op", "params"), OPS, ids=[f"{i}-{op}" for i, (op, _) in enumerate(OPS)])
def test_kernels_and_torch_write_the_same(
    op: str, params: dict[str, Any], forms: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = folders(tmp_path, forms)
    found = []
    for kernels in ("cpu", "reference"):
        monkeypatch.setenv("SURGERY_KERNELS", kernels)
        made = child({label: open_checkpoint(path, label) for label, path in paths.items()}, op, **params)
        written: dict[str, Any] = {}

        def record(ref: ComputedRef, start: int, sums: Sums, written: dict[str, Any] = written) -> None:
            written[f"{ref.name} sums from {start}"] = sums

        context = ReadContext(record=record)
        for name, ref in made.tensors.items():
            for start, stop in ref.tiles():
                for key, data in encode(ref, start, stop, context).items():
                    written[f"{name} {key} from {start}"] = data.tobytes()
        found.append(written)
    assert found[0].keys() == found[1].keys()
    assert [key for key in found[0] if found[0][key] != found[1][key]] == []


def test_kernels_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparison above would be of torch with itself."""
    from surgery.codecs import merges

    calls: list[str] = []
    for name in ("merge_tasks", "merge_fusion"):
        real = getattr(merges, name)

        def noted(*args: Any, real: Any = real, name: str = name, **more: Any) -> Any:
            calls.append(name)
            return real(*args, **more)

        monkeypatch.setattr(merges, name, noted)
    inputs = {label: open_checkpoint(path, label) for label, path in folders(tmp_path, "bf16").items()}
    for op in ("ties", "arcee_fusion", "dare_ties"):
        ref = child(inputs, op, **ALL[op]).tensors["model.layers.1.self_attn.q_proj.weight"]
        encode(ref, 0, ref.rows, ReadContext())
    assert calls == ["merge_tasks", "merge_fusion", "merge_tasks"]
