"""Manifests as the stream writes them, small and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

BASE, DONOR, THIRD = "org/base-model", "org/donor", "org/third"


def sampled(parent: str, layer: int | None, role: str, rms: float | None, **other: Any) -> dict[str, Any]:
    return {
        "kind": "parent distance", "parent": parent, "layer": layer, "role": role, "mtp": False, "tensors": 2,
        "weights": 64, "of_weights": 640, "rms": rms, "relative": None if rms is None else rms * 30, **other,
    }  # fmt: skip


def chimera() -> dict[str, Any]:
    """Two layers and an MTP layer: experts of the donor, the rest of the base, sampled distances."""
    tensors = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.experts.0.up_proj.weight",
        "model.layers.1.mlp.experts.1.up_proj.weight", "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.experts.0.up_proj.weight", "model.layers.2.eh_proj.weight",
        "model.norm.weight", "lm_head.weight",
    ]  # fmt: skip
    copied = [("attention", 2), ("dense_mlp", 1), ("embedding", 1), ("head", 1), ("norm", 1), ("router", 1)]
    coverage = [
        {"role": role, "mtp": False, "action": f"copy of {BASE}", "tensors": count, "bytes": 1000 * count}
        for role, count in copied
    ]
    coverage += [
        {"role": "other", "mtp": True, "action": f"copy of {BASE}", "tensors": 1, "bytes": 10},
        {"role": "routed_expert", "mtp": False, "action": f"copy of {DONOR}", "tensors": 2, "bytes": 4_000},
        {"role": "routed_expert", "mtp": True, "action": f"copy of {DONOR}", "tensors": 1, "bytes": 2_000},
    ]
    return {
        "schema": 1,
        "versions": {"python": "3.11.7", "surgery": "0.1.0"},
        "recipe": None,
        "settings": {"format": "source", "shard_bytes": 2_000_000, "hash": True},
        "model": {
            "model_type": "deepseek_v3", "architecture": "deepseek", "num_hidden_layers": 2,
            "dtype": "bfloat16",
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        },
        "steps": [{
            "op": "merge.aoe", "base": "base", "weights": {"donor": 1.0}, "select": ["routed_expert"],
            "parents": {"base": BASE, "donor": DONOR},
        }],
        "inputs": {
            label: {
                "model": f"/models/{label}", "revision": revision,
                "files": {"model.safetensors": {"size": 9000, "mtime_ns": 1, "header_sha256": "ab" * 32}},
            }
            for label, revision in ((BASE, None), (DONOR, "0123456789abcdef0123"))
        },
        "output": {
            "bytes": 7_507_010, "tensors": 11,
            "files": {
                "model-00001-of-00001.safetensors": {"bytes": 7_600_000, "sha256": "cd" * 32},
                "config.json": {"bytes": 1305, "sha256": None},
            },
        },
        "coverage": coverage,
        "dropped": {},
        "events": [],
        "measurements": [
            sampled(DONOR, None, "embedding", 0.000125),
            sampled(DONOR, 0, "attention", 0.00025, weights=640),
            sampled(DONOR, 0, "dense_mlp", 0.0),
            sampled(DONOR, 1, "attention", 0.000375),
            sampled(DONOR, 1, "routed_expert", 0.00121875),
            sampled(DONOR, 2, "routed_expert", 0.0011, mtp=True),
            sampled(DONOR, 2, "other", None, mtp=True, weights=0),
            sampled(DONOR, None, "norm", 0.0005),
            sampled(DONOR, None, "head", 0.0002),
        ],
        "lineage": [{"copy": BASE}, {"copy": DONOR}],
        "tensors": {name: int(".experts." in name) for name in tensors},
        "metrics": {},
        "run": {"started": "2026-01-02T03:04:05Z", "seconds": 75.2, "peak_rss_bytes": 61_345_792},
    }  # fmt: skip


def averaged() -> dict[str, Any]:
    """The same model, every tensor computed from three parents; exact distances per tensor."""
    manifest = chimera()
    manifest["measurements"] = []
    manifest["steps"][0].update(weights={"donor": 0.25, "third": 0.25}, select=["all"])
    manifest["inputs"][THIRD] = manifest["inputs"][BASE]
    for row in manifest["coverage"]:
        row["action"] = "merge.aoe"
    manifest["coverage"][0]["action"] = f"copy of {BASE} (parents are equal)"
    inputs = [{"copy": BASE}, {"copy": DONOR}, {"copy": THIRD}]
    manifest["lineage"] = [{"op": "merge.aoe", "weights": [0.5, 0.25, 0.25], "inputs": inputs}]
    manifest["metrics"] = {
        name: {
            "weights": 100 * (index + 1),
            "distance": {
                DONOR: {"rms": 0.001 * (index + 1), "relative": 0.01 * (index + 1)},
                THIRD: {"rms": 0.002 * (index + 1), "relative": 0.02},
            },
        }
        for index, name in enumerate(manifest["tensors"])
    }
    return manifest


MANIFESTS: dict[str, Callable[[], dict[str, Any]]] = {"chimera": chimera, "averaged": averaged}


@pytest.fixture
def copied_manifest() -> dict[str, Any]:
    return chimera()


@pytest.fixture
def averaged_manifest() -> dict[str, Any]:
    return averaged()


@pytest.fixture(params=sorted(MANIFESTS))
def any_manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MANIFESTS[request.param]()
