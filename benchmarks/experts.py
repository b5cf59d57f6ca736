"""Quality of expert pruning on small trained models, by criterion, group strategy and domain.

    python benchmarks/experts.py text ZOO/moe-base ZOO/data          # perplexity, prose / code / math
    python benchmarks/experts.py reasoning ZOO/nano-deliberate ZOO/data   # accuracy on problems

`text`: half the experts of each layer are kept for one domain, chosen on demonstrations out of
DATA/<domain>-calib.jsonl (SEQUENCES windows of CONTEXT tokens, documents joined; a seed other than 0 shuffles
the documents first), measured on the first WINDOWS windows of DATA/<domain>-valid.jsonl, in and out of
domain. One walk per domain and seed serves all criteria. `reasoning`: demonstrations are the model's own
replies to the first prompts of DATA/reasoning-train.jsonl; accuracy is over the first problems of each task
of DATA/reasoning-test.jsonl. Everything on the CPU in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import surgery
from surgery.evaluate.demonstrate import demonstrations
from surgery.evaluate.run import evaluate
from surgery.stream.checkpoint import Checkpoint

DOMAINS = ("prose", "code", "math")
CRITERIA = ("easy_ep", "reap", "frequency", "gating", "ean", "man")
STRATEGIES = ("ungrouped", "equal_per_group", "regrouped", "best_groups")
SEQUENCES, CONTEXT, WINDOWS = 8, 512, 24
SEEDS = (0, 1, 2, 3, 4)


def statistics_of(
    model: Checkpoint, calibration: dict[str, Any], keep: float, folder: Path, name: str
) -> str:
    """The file with the sums of one walk."""
    pruned = surgery.experts.easy_ep(model, keep=keep, calibration=calibration)
    path = folder / f"{name}.json"
    path.write_text(pruned.texts["surgery_experts.json"], encoding="utf-8")
    return str(path)


def shuffled(path: Path, seed: int, folder: Path) -> Path:
    """The lines of a file in an order of the seed's; 0 leaves them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if seed:
        random.Random(seed).shuffle(lines)
    target = folder / f"{path.stem}-{seed}.jsonl"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def variants(model: Checkpoint, keep: float, statistics: str) -> dict[tuple[str, str], Checkpoint]:
    """Every criterion under every strategy, and random and AIMER."""
    family = surgery.experts
    found = {}
    for strategy in STRATEGIES:
        for name in CRITERIA:
            operator = getattr(family, name)
            found[name, strategy] = operator(model, keep=keep, groups=strategy, statistics=statistics)
    for seed in range(3):
        found[f"random {seed}", "ungrouped"] = family.random(model, keep=keep, seed=seed)
    for end in ("low", "high"):
        found[f"aimer {end}", "ungrouped"] = family.aimer(model, keep=keep, important=end)
    return found


def perplexities(checkpoint: Checkpoint, data: Path) -> dict[str, float]:
    found = {}
    for domain in DOMAINS:
        result = evaluate(
            {"child": checkpoint}, text=data / f"{domain}-valid.jsonl", context=CONTEXT, max_windows=WINDOWS
        )
        perplexity = result.rows[0].perplexity
        found[domain] = perplexity.value if perplexity else float("nan")
    return found


def text(model: Checkpoint, data: Path, keep: float, folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"kept for": "(unpruned)", "seed": 0, "criterion": "", "groups": "", **perplexities(model, data)}
    ]
    for domain in DOMAINS:
        for seed in SEEDS:
            file = shuffled(data / f"{domain}-calib.jsonl", seed, folder)
            calibration = {
                "files": {domain: [str(file)]}, "num_samples": SEQUENCES, "sequence_length": CONTEXT,
                "packed": True,
            }  # fmt: skip
            statistics = statistics_of(model, calibration, keep, folder, f"{domain}-{seed}")
            every = variants(model, keep, statistics)
            if seed:
                every = {key: every[key] for key in (("easy_ep", "ungrouped"), ("frequency", "ungrouped"))}
            for (criterion, strategy), pruned in every.items():
                row = {"kept for": domain, "seed": seed, "criterion": criterion, "groups": strategy}
                rows.append({**row, **perplexities(pruned, data)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def reasoning(model_path: str, data: Path, keep: float, folder: Path) -> list[dict[str, Any]]:
    model = surgery.open(model_path)
    demos = folder / "demos.jsonl"
    demonstrations(model_path, data / "reasoning-train.jsonl", demos, limit=64)
    statistics = statistics_of(model, {"files": str(demos)}, keep, folder, "reasoning")
    every: dict[tuple[str, str], Checkpoint] = {("(unpruned)", ""): model}
    every |= variants(model, keep, statistics)
    rows = []
    for (criterion, strategy), pruned in every.items():
        if criterion != "easy_ep" and strategy not in ("", "ungrouped"):
            continue
        result = evaluate({"child": pruned}, tasks=data / "reasoning-test.jsonl", limit=20)
        score = result.rows[0].tasks
        if score is None:
            raise RuntimeError("no score")
        rows.append({
            "criterion": criterion, "groups": strategy, "accuracy": score.accuracy.value,
            "low": score.accuracy.low, "high": score.accuracy.high, "tokens": score.reply_tokens.value,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("text", "reasoning"))
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    given = parser.parse_args()
    begun = time.time()
    with tempfile.TemporaryDirectory() as name:
        if given.what == "text":
            rows = text(surgery.open(given.model), given.data, given.keep, Path(name))
        else:
            rows = reasoning(given.model, given.data, given.keep, Path(name))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    machine = platform.processor() or platform.machine()
    seconds = time.time() - begun
    print(f"\n{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s\n")
    print(table(rows))


if __name__ == "__main__":
    main()
