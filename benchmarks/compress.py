"""Quality of sparsifying and quantizing on small trained models: perplexity and KL divergence.

    python benchmarks/compress.py ZOO/dense ZOO/data            # all methods on a dense model
    python benchmarks/compress.py ZOO/moe-base ZOO/data --set sparsify

Calibrated on SEQUENCES windows of CONTEXT tokens of each of prose-, code- and math-calib.jsonl, documents
joined; measured on the first windows of each DATA/<domain>-valid.jsonl and of wikitext2-test.txt, the KL
divergence from the dense model in nats a token. Everything on the CPU in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import surgery
from surgery.evaluate.run import evaluate
from surgery.stream.checkpoint import Checkpoint

TEXTS = ("prose-valid.jsonl", "code-valid.jsonl", "math-valid.jsonl", "wikitext2-test.txt")
SEQUENCES, CONTEXT, WINDOWS = 12, 512, 8


def calibration(data: Path) -> dict[str, Any]:
    files = {domain: [str(data / f"{domain}-calib.jsonl")] for domain in ("prose", "code", "math")}
    return {"files": files, "num_samples": SEQUENCES, "sequence_length": CONTEXT, "packed": True}


def sparsified(model: Checkpoint, given: dict[str, Any]) -> Iterator[tuple[str, Checkpoint]]:
    family = surgery.sparsify
    amounts: list[tuple[str, dict[str, Any]]] = [
        ("50 %", {"sparsity": 0.5}), ("60 %", {"sparsity": 0.6}), ("2:4", {"pattern": "2:4"}),
    ]  # fmt: skip
    for name, amount in amounts:
        yield f"magnitude {name}", family.magnitude(model, **amount)
        for method in ("wanda", "sparsegpt", "admm"):
            operator = getattr(family, method)
            yield f"{method} {name}", operator(model, calibration=given, **amount)
        yield (
            f"sparsegpt {name}, in sequence",
            family.sparsegpt(model, calibration=given, sequential=True, **amount),
        )
    for method in ("owl", "lsa"):
        yield (
            f"sparsegpt 60 %, {method}",
            family.sparsegpt(model, calibration=given, sparsity=0.6, allocate=method),
        )
    joint = family.sparsegpt(model, calibration=given, sparsity=0.5, quantize="int4-g64")
    yield "sparsegpt 50 % + int4-g64, jointly", joint


def quantized(
    model: Checkpoint, given: dict[str, Any], groups: list[int]
) -> Iterator[tuple[str, Checkpoint]]:
    family = surgery.quantize
    for bits in (8, 4, 3, 2):
        for group in groups:
            amount = {"bits": bits, "group_size": group}
            yield f"rtn int{bits} g{group}", family.rtn(model, **amount)
            yield f"gptq int{bits} g{group}", family.gptq(model, calibration=given, **amount)
            yield f"awq int{bits} g{group}", family.awq(model, calibration=given, **amount)
    amount = {"bits": 3, "group_size": 64}
    for name, changes in (
        ("asymmetric", {"symmetric": False}), ("mse grid", {"grid": "mse"}),
        ("act order", {"act_order": True}), ("in sequence", {"sequential": True}),
    ):  # fmt: skip
        yield (
            f"gptq int3 g64, {name}",
            family.gptq(model, calibration=given, **amount, **changes),
        )
    for scheme in ("nf4", "mxfp4", "fp8", "fp8-block"):
        yield f"rtn {scheme}", family.rtn(model, scheme=scheme)


def measured(children: dict[str, Checkpoint], model: Checkpoint, data: Path) -> list[dict[str, Any]]:
    """Rows of all children; every text is read, and the dense model loaded, once."""
    rows: dict[str, dict[str, Any]] = {name: {"method": name} for name in children}
    for text in TEXTS:
        models = {"(dense)": model, **children}
        found = evaluate(
            models, text=data / text, parent="(dense)", context=CONTEXT, max_windows=WINDOWS, threads=1
        )
        short = text.partition("-")[0]
        for score in found.rows:
            row = rows.setdefault(score.name, {"method": score.name})
            row[short] = score.perplexity.value if score.perplexity else float("nan")
            row[f"KL {short}"] = score.divergence.kl.value if score.divergence else 0.0
    for name, child in children.items():
        changed = [ref for ref in child.tensors.values() if ref.codec != model.tensors[ref.name].codec]
        weights = sum(ref.numel for ref in changed)
        rows[name]["bits"] = 8 * sum(ref.nbytes for ref in changed) / weights if weights else ""
    rows["(dense)"]["bits"] = ""
    return [rows["(dense)"], *(row for name, row in rows.items() if name != "(dense)")]


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value or "") for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--set", dest="which", choices=("sparsify", "quantize", "all"), default="all")
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 64], help="group sizes")
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    given = parser.parse_args()
    begun = time.time()
    model = surgery.open(given.model)
    data = calibration(given.data)
    children: dict[str, Checkpoint] = {}
    found: list[tuple[str, Iterator[tuple[str, Checkpoint]]]] = [
        ("sparsify", sparsified(model, data)), ("quantize", quantized(model, data, given.groups))
    ]  # fmt: skip
    for family, variants in found:
        for name, child in variants if given.which in (family, "all") else ():
            if given.only in name:
                children[name] = child
                print(f"{time.time() - begun:6.0f} s  {name}", flush=True)
    rows = measured(children, model, given.data)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    machine = platform.processor() or platform.machine()
    seconds = time.time() - begun
    print(f"\n{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s\n")
    print(table(rows))


if __name__ == "__main__":
    main()
