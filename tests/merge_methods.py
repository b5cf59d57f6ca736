"""Every merge method by name with some settings, and checkpoints to merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from surgery.recipe.table import operator_class
from surgery.stream.checkpoint import Checkpoint

Tensors = dict[str, torch.Tensor]
ALL: dict[str, dict[str, Any]] = {
    "linear": {"models": {"a": 0.4, "b": 0.6}},
    "slerp": {"base": "base", "models": {"a": {}}, "t": 0.5},
    "nuslerp": {"base": "base", "models": {"a": 1, "b": 2}},
    "karcher": {"models": {"a": 1, "b": 2}},
    "model_stock": {"base": "base", "models": {"a": {}, "b": {}}},
    "task_arithmetic": {"base": "base", "models": {"a": 0.4, "b": 0.6}},
    "ties": {"base": "base", "models": {"a": {"density": 0.5}, "b": {"density": 0.5}}},
    "breadcrumbs": {"base": "base", "models": {"a": {"density": 0.5}, "b": {"density": 0.5}}},
    "dare_linear": {
        "base": "base",
        "models": {"a": {"density": 0.5}, "b": {"density": 0.5}},
        "rescale": "l1",
    },
    "dare_ties": {"base": "base", "models": {"a": {"density": 0.5}, "b": {"density": 0.5}}},
    "della_linear": {"base": "base", "models": {"a": {"density": 0.5}, "b": {"density": 0.5}}},
    "della": {"base": "base", "models": {"a": {"density": 0.5}, "b": {"density": 0.5}}},
    "sce": {"base": "base", "models": {"a": {}, "b": {}}, "topk": 0.5},
    "arcee_fusion": {"base": "base", "models": {"a": {}}},
}


def write(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    config = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 32, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def child(inputs: Mapping[str, Checkpoint], op: str, **params: Any) -> Checkpoint:
    operator = operator_class(f"merge.{op}").model_validate(params)
    return operator.apply({name: inputs[name] for name in operator.input_names()})
