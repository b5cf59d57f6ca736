"""The manifest: where every tensor of an output came from, and everything needed to check it.

`lineage` holds each distinct history once and `tensors` points into it, so that the manifest of a
91,991-tensor model stays a few megabytes. All under `run` (times, memory, threads) may differ between
two runs of equal outputs; nothing else does.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from surgery.errors import VerificationError
from surgery.stream.checkpoint import Checkpoint, ComputedRef, Event
from surgery.stream.lanes import GpuUse
from surgery.stream.survey import Survey

NAME = "surgery_manifest.json"
SCHEMA = 1
DISTRIBUTION = "llm-surgery"


def tool_versions(checkpoint: Checkpoint) -> dict[str, str]:
    """Versions that the output depends on; torch's only where something is computed."""
    found = {"python": platform.python_version(), "surgery": tool_version()}
    if any(isinstance(ref, ComputedRef) for ref in checkpoint.tensors.values()):
        found["torch"] = version("torch")
    return found


def kernels_used(checkpoint: Checkpoint, gpu: str | None, use: GpuUse) -> dict[str, str]:
    """Which arithmetic computed tensors took (it never changes a result): `path`, its `compiler`, or the
    `reason` for going without, and the same of a GPU that was asked for; empty where nothing is computed."""
    if not any(isinstance(ref, ComputedRef) for ref in checkpoint.tensors.values()):
        return {}
    from surgery.codecs.native import cpu

    found = cpu()
    told = {"path": found.path, "compiler": found.compiler, "reason": found.reason}
    if gpu is not None and use.passes:
        from surgery.codecs.dispatch import cuda_library

        there = cuda_library(gpu)
        told |= {"gpu_path": there.path, "gpu_compiler": there.compiler}
    told["gpu_reason"] = "; ".join(sorted(use.reasons))
    return {key: value for key, value in told.items() if value}


def tool_version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "checkout"


def build_manifest(
    checkpoint: Checkpoint,
    plan: Survey,
    outcomes: Mapping[str, Mapping[str, Any]],
    *,
    recipe: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    events: Sequence[Event],
    measurements: Sequence[Mapping[str, Any]],
    files: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """`outcomes` says of computed tensors what was decided and measured while writing."""
    templates: dict[str, tuple[int, dict[str, Any]]] = {}
    tensors: dict[str, int] = {}
    coverage: dict[tuple[str, bool, str], list[int]] = {}
    for name, ref in checkpoint.tensors.items():
        lineage = ref.lineage()
        choice = outcomes.get(name, {}).get("copied")
        action = str(lineage.get("op", f"copy of {lineage.get('copy')}"))
        if choice is not None and isinstance(ref, ComputedRef):
            lineage = {**ref.inputs[choice].lineage(), "because": outcomes[name]["reason"]}
            action = f"copy of {lineage.get('copy')} ({outcomes[name]['reason']})"
        tensors[name] = templates.setdefault(repr(lineage), (len(templates), lineage))[0]
        cell = coverage.setdefault((ref.info.role, ref.info.mtp, action), [0, 0])
        cell[0] += 1
        cell[1] += ref.nbytes
    return {
        "schema": SCHEMA,
        "versions": tool_versions(checkpoint),
        "recipe": recipe,
        "settings": settings,
        "steps": list(checkpoint.history),
        "model": describe_model(checkpoint),
        "inputs": {source.label: source.identity() for source in checkpoint.inputs},
        "output": {"bytes": plan.output_bytes, "tensors": len(tensors), "files": files},
        "coverage": [
            {"role": role, "mtp": mtp, "action": action, "tensors": cell[0], "bytes": cell[1]}
            for (role, mtp, action), cell in sorted(coverage.items())
        ],
        "dropped": dict(checkpoint.dropped),
        "events": [event.as_dict() for event in events],
        "measurements": list(measurements),
        "lineage": [lineage for _, lineage in templates.values()],
        "tensors": tensors,
        "metrics": {
            name: outcomes[name]["metrics"]
            for name in checkpoint.tensors
            if outcomes.get(name, {}).get("metrics")
        },
        "run": dict(run),
    }


def dump_manifest(manifest: Mapping[str, Any]) -> bytes:
    """JSON with one line per key: indenting all of it would take longer than writing many a model."""
    lines = (
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in manifest.items()
    )
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """What readers of a manifest need of the config."""
    text = checkpoint.config.get("text_config") or {}
    layers = checkpoint.config.get("num_hidden_layers", text.get("num_hidden_layers"))
    described = {
        "model_type": checkpoint.config.get("model_type"),
        "architecture": checkpoint.architecture.name,
        "num_hidden_layers": layers,
        "dtype": checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"),
        "quantization_config": dict(checkpoint.quantization),
    }
    if text:
        described["text_config"] = {key: text.get(key) for key in ("model_type", "num_hidden_layers")}
    return described


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output; VerificationError where there is none or it cannot be read."""
    path = folder / NAME
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise VerificationError(
            f"{folder} has no {NAME}: it was not written by surgery, or never finished",
            hint="look at it with: surgery inspect",
        ) from error
    except ValueError as error:
        raise VerificationError(f"{path} is damaged: {error}") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise VerificationError(f"{path} has schema {schema}, this version reads {SCHEMA}")
    found: dict[str, Any] = manifest
    return found
