"""Parity with llm-compressor: the same solvers on the same matrices, and both tools on the same models.

    python benchmarks/llmcompressor_parity.py --peer ENVIRONMENT/bin/python ZOO/dense ZOO/data
        [--moe ZOO/moe-base] [--work FOLDER]

llm-compressor runs in an environment of its own (`llmcompressor_peer.py`); nothing of it is imported. With
--work its results are kept, and a second call with equal jobs only compares.

matrices   real weights and Hessians: our GPTQ and SparseGPT, `solver_eager.py` and the package's functions
models     one decoder layer after another on the same ids, groups of 64: weights that differ; output errors
           ‖(W − W')X‖ / ‖WX‖ of each matrix, X what goes into it in the dense model; perplexity on the first
           windows of prose-valid.jsonl. Both children are decoded by our reader and run in float32
export     our int4 child as transformers loads it there, against our decoded weights here
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import solver_eager as eager
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.calibrate.data import Calibration, read_calibration
from surgery.calibrate.inputs import InputSums
from surgery.calibrate.tokenizer import load_tokenizer
from surgery.codecs.grid import absmax_grid
from surgery.codecs.schemes import IntScheme
from surgery.evaluate.load import LoadedModel, load_model
from surgery.evaluate.run import evaluate
from surgery.operators.layerwise.hessian import factorize
from surgery.operators.layerwise.reconstruction import output_squares
from surgery.operators.quantize.gptq import gptq
from surgery.operators.sparsify.sparsegpt import sparsegpt
from surgery.stream.checkpoint import Checkpoint

SEQUENCES, CONTEXT, WINDOWS, DAMPING = 11, 512, 24, 0.01
"""Sequences of each of three domains; tokens of each; windows of the perplexity."""
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Whose inputs are another one's."""
MATRICES = ("0.self_attn.q_proj", "3.self_attn.o_proj", "3.mlp.gate_proj", "7.mlp.down_proj")
WAYS, ONE_MORE = ("none", "static", "50 %", "2:4"), "50 %, ours with one more zero a block"
INT4, GROUP = IntScheme(4, 128), 64
"""Of the matrices; columns of a group of the models."""


@dataclass(frozen=True)
class Case:
    """One setting on both sides: `op` of ours with its params, and a job of the peer's."""

    name: str
    op: str
    ours: dict[str, Any]
    dtype: str
    theirs: dict[str, Any]
    job: dict[str, Any] = field(default_factory=dict)


def cases() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        for order, ours in ((None, {"static_groups": True}), ("static", {"act_order": True})):
            yield Case(
                f"GPTQ int4 g64, actorder {order}", "gptq",
                {"bits": 4, "group_size": GROUP, "scale_dtype": dtype, **ours}, dtype,
                {"bits": 4, "group_size": GROUP, "actorder": order},
            )  # fmt: skip
        for name, ours, structure in (
            ("50 %", {"sparsity": 0.5}, "0:0"), ("2:4", {"pattern": "2:4"}, "2:4")
        ):  # fmt: skip
            yield Case(
                f"SparseGPT {name}", "sparsegpt", ours, dtype, {"sparsity": 0.5, "mask_structure": structure}
            )


def moe_cases() -> Iterator[Case]:
    amount = {"bits": 4, "group_size": GROUP}
    yield Case("MoE, GPTQ int4 g64, actorder None", "gptq", {**amount, "static_groups": True,
        "scale_dtype": "float32"}, "float32", {**amount, "actorder": None})  # fmt: skip


def family(op: str) -> Any:
    return getattr(surgery.quantize if op == "gptq" else surgery.sparsify, op)


def calibration_ids(calibration: dict[str, Any], model: Checkpoint, path: Path) -> torch.Tensor:
    """The ids that our operators calibrate a model on, written for the peer."""
    found = read_calibration(Calibration(**calibration), load_tokenizer(model))
    ids = torch.tensor([row for _, row in found.sequences])
    save_file({"ids": ids}, path)
    return ids


def oneshot(case: Case, model: str, ids: Path, out: Path) -> dict[str, Any]:
    """The peer's job of a case."""
    params = {**case.theirs, "dampening_frac": DAMPING, "block_size": 128}
    return {
        "do": "oneshot", "model": model, "dtype": case.dtype, "modifier": case.op, "params": params,
        "ignore": ["re:.*lm_head"], "ids": str(ids), "out": str(out),
    }  # fmt: skip


def call(peer: Path, work: Path, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Have the peer do its jobs; its versions and faults. Equal jobs that it has done are not done again."""
    work.mkdir(exist_ok=True)
    asked, told = work / "jobs.json", work / "told.json"
    text = json.dumps(jobs, indent=1)
    if not (told.exists() and asked.read_text() == text):
        told.unlink(missing_ok=True)
        asked.write_text(text)
        script = Path(__file__).resolve().parent / "llmcompressor_peer.py"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with (work / "log.txt").open("w") as log:
            subprocess.run(
                [peer.absolute(), script, work], check=True, stdout=log, stderr=log, cwd=work, env=environment
            )
    found: dict[str, Any] = json.loads(told.read_text())
    return found


# --- matrices


def input_sums(loaded: LoadedModel, ids: torch.Tensor) -> dict[str, InputSums]:
    """Of every linear module of the decoder layers that shares its input with none before it."""
    sums: dict[str, InputSums] = {}
    module: Any = loaded.model
    for name, each in module.named_modules():
        if isinstance(each, torch.nn.Linear) and ".layers." in name and name.rpartition(".")[2] not in SHARED:
            sums[name] = InputSums.zeros(each.in_features, torch.device("cpu"), gram=True)

            def take(_: Any, given: tuple[torch.Tensor, ...], name: str = name) -> None:
                sums[name].add(given[0].flatten(0, -2))

            each.register_forward_pre_hook(take)
    with torch.no_grad():
        for rows in ids.split(8):
            module(input_ids=rows, use_cache=False)
    return sums


def gram_of(sums: dict[str, InputSums], tensor: str) -> torch.Tensor:
    parent, _, last = tensor.removesuffix(".weight").rpartition(".")
    gram = sums[f"{parent}.{SHARED.get(last, last)}"].gram
    assert gram is not None
    return gram


def eager_values(weight: torch.Tensor, hessian: torch.Tensor, way: str) -> torch.Tensor:
    """`solver_eager.py`, columns in the order of their inputs for `static`."""
    grid = absmax_grid(weight, INT4)
    if way == "50 %":
        return eager.sparsegpt(weight, eager.inverse_factor(hessian, DAMPING), 0.5)
    order = torch.arange(len(hessian))
    if way == "static":
        order = torch.argsort(hessian.diagonal(), descending=True)
    factor = eager.inverse_factor(hessian[order][:, order], DAMPING)
    groups = (order // INT4.group_size).tolist()
    zeros = grid.zeros.float()
    found = eager.gptq(weight[:, order], factor, grid.scales, zeros, INT4.top, groups=groups)
    return found[:, order.argsort()]


def our_values(weight: torch.Tensor, hessian: torch.Tensor, way: str) -> torch.Tensor:
    factors = factorize(hessian[None], DAMPING, act_order=way == "static")
    if way in WAYS[:2]:
        return gptq(weight[None], factors, INT4, static_groups=True).values[0]
    amount: float | tuple[int, int] = (2, 4) if way == "2:4" else 0.5
    if way == ONE_MORE:
        block = weight.shape[0] * eager.BLOCK
        amount = (block // 2 + 1) / block
    return sparsegpt(weight[None], factors, amount).values[0]


def matrix_jobs(model: Checkpoint, sums: dict[str, InputSums], work: Path) -> list[dict[str, Any]]:
    given = {}
    for place in MATRICES:
        name = f"model.layers.{place}"
        given[f"{name}.weight"] = model.tensors[f"{name}.weight"].read()
        given[f"{name}.hessian"] = gram_of(sums, name) * (2 / (3 * SEQUENCES))
    save_file(given, work / "given.safetensors")
    jobs: list[dict[str, Any]] = []
    for way in WAYS:
        job = {
            "do": "solve", "given": str(work / "given.safetensors"), "damping": DAMPING,
            "out": str(work / f"matrices-{len(jobs)}.safetensors"),
        }  # fmt: skip
        if way in WAYS[2:]:
            jobs.append({**job, "sparsity": 0.5, "pattern": [2, 4] if way == "2:4" else [0, 0]})
        else:
            jobs.append({**job, "bits": 4, "group_size": 128, "actorder": None if way == "none" else way})
    return jobs


def compare_matrices(work: Path) -> Iterator[list[str]]:
    given = load_file(work / "given.safetensors")
    for way in (*WAYS[:3], ONE_MORE, WAYS[3]):
        number = WAYS.index("50 %" if way == ONE_MORE else way)
        found = load_file(work / f"matrices-{number}.safetensors")
        for place in MATRICES:
            name = f"model.layers.{place}"
            weight, hessian = given[f"{name}.weight"], given[f"{name}.hessian"]
            scale = found.get(f"{name}.scale")
            theirs = found[f"{name}.{'sparse' if scale is None else 'gptq'}"]
            equal = "" if scale is None else str(torch.equal(scale, absmax_grid(weight, INT4).scales))
            cells = [way, f"{place} {tuple(weight.shape)}", equal]
            for solver in (eager_values, our_values):
                if solver is eager_values and way in (ONE_MORE, "2:4"):
                    cells += ["", ""]
                    continue
                mine = solver(weight, hessian, way)
                lost = [output_squares((weight - each)[None], hessian[None]).sum() for each in (mine, theirs)]
                cells += [differing(mine, theirs, scale), f"{float(lost[0] / lost[1]) ** 0.5 - 1:+.1e}"]
            yield cells


def differing(mine: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor | None) -> str:
    """How many codes, or zeros, are not the same, and in how many rows they are."""
    if scale is None:
        apart = (mine == 0) != (theirs == 0)
    else:
        apart = (mine - theirs).abs() > 0.5 * scale.repeat_interleave(INT4.group_size, 1)
    return f"{int(apart.sum())} in {int(apart.any(1).sum())}"


# --- models


def solved_names(model: Checkpoint, children: list[Checkpoint]) -> list[str]:
    """Matrices of the decoder layers."""
    return [
        name for name, ref in model.tensors.items()
        if ".layers." in name and len(ref.shape) == 2 and all(name in child.tensors for child in children)
    ]  # fmt: skip


def elsewhere(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Where two children have another zero, or by far another value for their group: another code."""
    if float((theirs == 0).float().mean()) > 0.4:
        return (mine == 0) != (theirs == 0)
    mine, theirs = (each.unflatten(-1, (-1, GROUP)) for each in (mine, theirs))
    # A code is 2/15 of the largest weight away from the next, the scales of bf16 0.4 % from one another.
    return (mine - theirs).abs() > 0.03 * (mine.abs() + theirs.abs()).amax(-1, keepdim=True)


def compare_children(
    model: Checkpoint, ours: Checkpoint, theirs: Checkpoint, sums: dict[str, InputSums] | None, data: Path
) -> list[str]:
    """Cells: weights (zeros) that differ in layer 0 and in all; errors; perplexities."""
    differ, counted = [0, 0], [0, 0]
    errors: list[tuple[float, float]] = []
    for name in solved_names(model, [ours, theirs]):
        weight, mine, other = (each.tensors[name].read() for each in (model, ours, theirs))
        if torch.equal(weight, mine) and torch.equal(weight, other):
            continue
        apart = elsewhere(mine, other)
        for place in (0, 1) if ".layers.0." in name else (1,):
            differ[place] += int(apart.sum())
            counted[place] += apart.numel()
        if sums is not None:
            gram = gram_of(sums, name)
            whole, lost, lost_too = (
                float(output_squares(each[None], gram[None]).sum())
                for each in (weight, weight - mine, weight - other)
            )
            errors.append(((lost / whole) ** 0.5, (lost_too / whole) ** 0.5))
    cells = [" / ".join(f"{100 * a / b:.3g} %" for a, b in zip(differ, counted, strict=True))]
    if errors:
        ratios = sorted(a / b for a, b in errors)
        cells += [f"{sum(each[side] for each in errors) / len(errors):.4f}" for side in (0, 1)]
        cells += [f"{sum(ratios) / len(ratios):.4f}", f"{ratios[0]:.3f}–{ratios[-1]:.3f}"]
    else:
        cells += [""] * 4
    values = [perplexity(each, data) for each in (ours, theirs)]
    return [*cells, *(f"{each:.3f}" for each in values), f"{100 * (values[0] / values[1] - 1):+.2f} %"]


def perplexity(child: Checkpoint, data: Path) -> float:
    found = evaluate(
        {"child": child}, text=data / "prose-valid.jsonl", context=CONTEXT, max_windows=WINDOWS, streamed=True
    )
    score = found.rows[0].perplexity
    assert score is not None
    return score.value


def compare_logits(exported: Path, ids: torch.Tensor, theirs: Path) -> str:
    model: Any = load_model(surgery.open(exported)).model
    with torch.no_grad():
        mine = model(input_ids=ids[:2], use_cache=False).logits
    return f"{float((mine - load_file(theirs)['logits']).norm() / mine.norm()):.1e}"


# --- the run


def our_child(case: Case, model: Checkpoint, given: dict[str, Any], folder: Path) -> Checkpoint:
    if not (folder / "config.json").exists():
        family(case.op)(model, calibration=given, damping=DAMPING, **case.ours).save(folder)
        print(f"ours: {case.name}, {case.dtype}", file=sys.stderr, flush=True)
    return surgery.open(folder)


def show(columns: str, rows: list[list[str]]) -> None:
    lines = [columns, " | ".join("---" for _ in columns.split("|")), *(" | ".join(row) for row in rows)]
    print("", *(f"| {line} |" for line in lines), sep="\n")


def stem(case: Case) -> str:
    return "".join(each if each.isalnum() else "-" for each in f"{case.name} {case.dtype}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--peer", type=Path, required=True, help="python of llm-compressor's environment")
    parser.add_argument("--moe", type=Path, help="a mixture of experts as well")
    parser.add_argument("--work", type=Path, help="a folder to keep (default: a temporary one)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(given, (given.work or Path(temporary)).absolute())


def run(given: argparse.Namespace, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    files = {domain: [str(given.data / f"{domain}-calib.jsonl")] for domain in ("prose", "code", "math")}
    calibration = {
        "files": files, "num_samples": SEQUENCES, "sequence_length": CONTEXT, "packed": True,
    }  # fmt: skip
    model = surgery.open(given.model)
    ids = calibration_ids(calibration, model, work / "ids.safetensors")
    save_file({"ids": ids[:2].clone()}, work / "two.safetensors")
    sums = input_sums(load_model(model), ids)

    jobs = matrix_jobs(model, sums, work)
    plans: list[tuple[Case, Checkpoint, Path, Path]] = []
    sources = [(cases(), model, given.model.absolute(), work / "ids.safetensors")]
    if given.moe:
        if not (work / "moe-bf16").exists():
            surgery.open(given.moe).save(work / "moe-bf16", format="bf16")
        moe = surgery.open(work / "moe-bf16")
        # Not the dense model's ids: transformers cuts texts of a Qwen2 model as Qwen2 does, whatever its
        # tokenizer.json says, so that equal files give other ids.
        calibration_ids(calibration, moe, work / "moe-ids.safetensors")
        sources.append((moe_cases(), moe, work / "moe-bf16", work / "moe-ids.safetensors"))
    for group, source, origin, known_ids in sources:
        for case in group:
            mine, other = (work / f"{stem(case)}-{who}" for who in ("ours", "theirs"))
            plans.append((case, source, mine, other))
            jobs.append(oneshot(case, str(origin), known_ids, other))
    for case, source, mine, _ in plans:
        our_child(case, source, calibration, mine)
    exports = [mine for case, source, mine, _ in plans if case.op == "gptq" and source is model]
    two = str(work / "two.safetensors")
    for each in exports:
        jobs.append({"do": "logits", "model": str(each), "ids": two, "out": f"{each}.logits.safetensors"})
    told = call(given.peer, work / "peer", jobs)

    print(f"{time.strftime('%Y-%m-%d')}; ours with torch {torch.__version__}; theirs: {told['versions']}")
    print(f"{len(ids)} sequences of {CONTEXT} tokens")
    for out, fault in told["faults"].items():
        print(f"the peer fails: {Path(out).name}: {fault}")
    print("\nDifferences: codes, or zeros, and in how many rows; errors to the package's.")
    show("way | matrix | scales equal | eager differs | error | ours differs | error",
         list(compare_matrices(work)))  # fmt: skip
    rows = []
    for case, source, mine, other in plans:
        if str(other) not in told["faults"]:
            known = sums if source is model else None
            cells = compare_children(source, surgery.open(mine), surgery.open(other), known, given.data)
            rows.append([f"{case.name}, {case.dtype}", *cells])
    dense = [perplexity(source, given.data) for _, source, _, _ in sources]
    show("case | differ, layer 0 / all | error, ours | theirs | mean ratio | ratios | perplexity, ours | "
         "theirs | ours to theirs", rows)  # fmt: skip
    print(f"\nperplexity unchanged: {', '.join(f'{each:.3f}' for each in dense)}")
    show("our export, loaded there | logits, relative difference", [
        [each.name, compare_logits(each, ids, Path(f"{each}.logits.safetensors"))]
        for each in exports if f"{each}.logits.safetensors" not in told["faults"]
    ])  # fmt: skip


if __name__ == "__main__":
    main()
