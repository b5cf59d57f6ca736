"""The model card (README.md) of an output: front matter that the hub understands, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from surgery.stream.checkpoint import Checkpoint
from surgery.stream.units import format_bytes


def relation(checkpoint: Checkpoint) -> str | None:
    """The hub's `base_model_relation`: several parents make a merge. None for a model without some of its
    experts: the hub has no word for it, and would be told of a quantization or a training that never was."""
    if len(checkpoint.inputs) > 1:
        return "merge"
    return None if any(str(step["op"]).startswith("experts.") for step in checkpoint.history) else "quantized"


def _pruned(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> list[str]:
    """A line for each step that dropped experts: how many stay and by what they were chosen. Lists from a
    file and random ones measure nothing, so the decision counts; it is not known there of how many."""
    rows = [row for row in manifest["measurements"] if row.get("kind") == "experts"]
    lines = []
    for step in checkpoint.history:
        decision: Mapping[str, Any] = step.get("decision") or {}
        if not str(step["op"]).startswith("experts.") or not decision.get("layers"):
            continue
        kept = [list(each) for each in decision["layers"].values()]
        row = next((r for r in rows if [list(layer["kept"]) for layer in r["layers"]] == kept), None)
        of = f" of {row['experts']}" if row else ""
        line = f"- {step['op']}: {len(kept[0])}{of} routed experts stay in each layer"
        calibration = (decision.get("provenance") or {}).get("calibration")
        if calibration:
            domains = ", ".join(f"{name} ({count})" for name, count in calibration["domains"].items())
            line += (
                f"; calibrated on {calibration['sequences']} sequences, {calibration['tokens']:,} tokens, "
                f"of {domains} (SHA-256 `{calibration['sha256']}`)"
            )
        lines.append(line)
    return lines


def build_card(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> str:
    """Markdown with YAML front matter."""
    methods = [str(step["op"]).rpartition(".")[2] for step in checkpoint.history]
    kind = relation(checkpoint)
    pruned = _pruned(checkpoint, manifest)
    # The hub refuses a card whose base models are none of its own.
    bases = [source.model.partition("@")[0] for source in checkpoint.inputs if source.revision]
    front: dict[str, Any] = {
        **({"base_model": bases} if bases else {}),
        **({"base_model_relation": kind} if bases and kind else {}),
        "library_name": "transformers",
        "tags": ([kind] if kind == "merge" else [])
        + ["surgery", *(["pruned"] if pruned else []), *dict.fromkeys(methods)],
    }
    title = f"# {' + '.join(source.label for source in checkpoint.inputs)}"
    parents = [
        f"| {source.label} | `{source.model}` | {source.revision or ''} |" for source in checkpoint.inputs
    ]
    rows = [
        f"| {each['role']}{' (MTP)' if each['mtp'] else ''} | {each['action']} | {each['tensors']} "
        f"| {format_bytes(each['bytes'])} |"
        for each in manifest["coverage"]
    ]
    steps = "\n".join(yaml.safe_dump(dict(step), sort_keys=False).rstrip() for step in checkpoint.history)
    made_of = manifest["recipe"]
    recipe = yaml.safe_dump(made_of, sort_keys=False).rstrip() if made_of else steps
    dtype = json.dumps(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "auto")
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).rstrip(),
            "---",
            "",
            title,
            "",
            "Made with surgery, tensor by tensor; "
            "`surgery_manifest.json` says of every tensor where it came from, `SHA256SUMS` guards the files.",
            "",
            "## Parents",
            "",
            "| name | model | revision |",
            "| --- | --- | --- |",
            *parents,
            "",
            "## What was done",
            "",
            *([*pruned, ""] if pruned else []),
            "| role | origin | tensors | bytes |",
            "| --- | --- | ---: | ---: |",
            *rows,
            "",
            "## Recipe",
            "",
            "```yaml",
            recipe,
            "```",
            "",
            "## Loading",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype={dtype})',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
            "```",
            "",
            "The licence is that of the parents; check that they agree before publishing.",
            "",
        ]
    )
