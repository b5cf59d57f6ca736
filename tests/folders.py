"""Changing model folders for a test, and what every written folder must satisfy."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from surgery.stream.save import SaveResult

INDEX = "model.safetensors.index.json"
MANIFEST = "surgery_manifest.json"
TEXTS = {
    "SHA256SUMS", "README.md", "surgery_recipe.yaml", "surgery_report.html", "surgery_experts.json",
    "surgery_keep.json",
}  # fmt: skip
"""Files of an output that the manifest does not list: they are made from it."""
ALIGNMENT = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}

Tensors = dict[str, torch.Tensor]


def change_shards(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Every shard through `change`, names and index kept in step."""
    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = change(load_file(path))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
        places |= dict.fromkeys(tensors, path.name)
    if (folder / INDEX).exists():
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def change_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def opaque_experts(folder: Path) -> Path:
    """Routed experts as integers of a method that nobody here knows."""
    change_shards(folder, lambda tensors: {
        name: each.to(torch.int32) if ".experts." in name else each for name, each in tensors.items()
    })  # fmt: skip
    return change_config(folder, quantization_config={"quant_method": "hqq"})


def raw_file(path: Path, header: Any, body: bytes = b"") -> Path:
    """A safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, which tells of the run (times, memory) as well."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def strict_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, read as JSON is defined: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    parsed: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes(), parse_constant=refuse)
    return parsed


def lasting(result: SaveResult) -> str:
    """The manifest without what may differ between equal outputs, key order included."""
    manifest = strict_manifest(result.folder)
    assert manifest == json.loads(json.dumps(result.manifest))
    return json.dumps({key: value for key, value in manifest.items() if key != "run"})


def check_written(folder: Path, logical: Mapping[str, Any]) -> dict[str, Any]:
    """Index, sizes, hashes, alignment, leftovers and lineage of an output; its manifest."""
    shards = sorted(folder.glob("*.safetensors"))
    places: dict[str, str] = {}
    total = 0
    for path in shards:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        assert length % 8 == 0
        header = json.loads(raw[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, after = entry["data_offsets"]
            assert begin == end, f"{name} does not follow its neighbour"
            assert (8 + length + begin) % ALIGNMENT.get(entry["dtype"], 1) == 0, f"{name} is misaligned"
            assert name not in places
            places[name], end = path.name, after
        assert len(raw) == 8 + length + end
        total += end
    if len(shards) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == places
        assert index["metadata"]["total_size"] == total
    else:
        assert not (folder / INDEX).exists()
    present = set(file_hashes(folder))
    sums = dict(line.split("  ", 1)[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: digest for name, digest in file_hashes(folder).items() if name != "SHA256SUMS"}
    assert not [name for name in present if name.endswith(".tmp") or "journal" in name or "lock" in name]
    manifest = strict_manifest(folder)
    for name, entry in manifest["output"]["files"].items():
        data = (folder / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert set(manifest["output"]["files"]) == present - TEXTS
    assert set(manifest["tensors"]) == set(logical)
    assert all(0 <= number < len(manifest["lineage"]) for number in manifest["tensors"].values())
    assert sum(row["tensors"] for row in manifest["coverage"]) == len(manifest["tensors"])
    assert sum(row["bytes"] for row in manifest["coverage"]) == total
    return manifest
