"""The part of `llmcompressor_parity.py` that runs where llmcompressor is; nothing of surgery is here.

    python llmcompressor_peer.py FOLDER        # does FOLDER/jobs.json, a list of {do: NAME, …}

solve      GPTQ and SparseGPT of given matrices with given Hessians, by the package's own functions
oneshot    a model calibrated on given ids, saved
logits     of a saved model as transformers loads it
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

ROWS = 11
"""Sequences of a batch."""


def grid(bits: int, group_size: int, actorder: str | None = None) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group_size, actorder=actorder
    )


def solve(job: dict[str, Any]) -> None:
    """NAME.weight and NAME.hessian in; NAME.gptq or NAME.sparse, NAME.scale out."""
    given, found = load_file(job["given"]), {}
    for name in sorted({key.rpartition(".")[0] for key in given}):
        weight, hessian = given[f"{name}.weight"], given[f"{name}.hessian"]
        if "sparsity" in job:
            module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            module.weight.data = weight
            n, m = job["pattern"]
            with torch.no_grad():
                _, found[f"{name}.sparse"] = sparsify_weight(
                    module, {module: hessian}, job["sparsity"], n, m, 128, job["damping"], False
                )
            continue
        args = grid(job["bits"], job["group_size"], job["actorder"])
        groups = weight.unflatten(-1, (-1, job["group_size"]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        values, _, fallback = quantize_weight(
            weight[None].clone(), hessian[None].clone(), scale[None], zero[None], None, args, 128,
            job["damping"],
        )  # fmt: skip
        assert not fallback.any()
        found[f"{name}.gptq"], found[f"{name}.scale"] = values[0], scale
    save_file({key: value.contiguous() for key, value in found.items()}, job["out"])


def calibrate(job: dict[str, Any]) -> None:
    """A model under one modifier of the package, and saved as the package saves it."""
    params = job["params"]
    if job["modifier"] == "gptq":
        weights = grid(params.pop("bits"), params.pop("group_size")).model_dump()
        scheme = {"targets": ["Linear"], "weights": weights}
        modifier: Any = GPTQModifier(config_groups={"all": scheme}, ignore=job["ignore"], **params)
    else:
        modifier = SparseGPTModifier(ignore=job["ignore"], **params)
    ids = load_file(job["ids"])["ids"]
    oneshot(
        model=job["model"], precision=job["dtype"], recipe=[modifier], pipeline="sequential",
        dataset=DataLoader([{"input_ids": row} for row in ids], batch_size=ROWS),
        moe_calibrate_all_experts=job.get("all_experts", False), output_dir=job["out"],
    )  # fmt: skip


def logits(job: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    with torch.no_grad():
        save_file({"logits": model(load_file(job["ids"])["ids"], use_cache=False).logits}, job["out"])


def main() -> None:
    folder = Path(sys.argv[1])
    does = {"solve": solve, "oneshot": calibrate, "logits": logits}
    faults = {}
    for job in json.loads((folder / "jobs.json").read_text()):
        try:
            does[job.pop("do")](job)
        except Exception as error:  # noqa: BLE001 - one of many jobs; the other side shows it
            faults[job["out"]] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    told = {"faults": faults, "versions": {name: version(name) for name in names}}
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
