"""Verify an output against its manifest: hashes, headers, config, finite values, loading, lineage.

Tensors of weight operators can be made again from their parents, so a sample of them (or all) is
recomputed and compared byte by byte; everything else is guarded by its file's hash. A check that could
not be made says so and why: it is `skipped`, never `passed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from surgery.errors import CheckpointError, SurgeryError
from surgery.operators.protocol import Decision, LayerOperator
from surgery.recipe.table import operator_class
from surgery.report.inspect import ragged_fp8
from surgery.stream.checkpoint import Checkpoint, ComputedRef, ReadContext, StoredRef, TensorRef
from surgery.stream.files import file_hash, natural_key
from surgery.stream.formats import apply_format
from surgery.stream.fused import encoded
from surgery.stream.hub import Hub, pinned
from surgery.stream.jobs import same_bytes
from surgery.stream.manifest import read_manifest
from surgery.stream.packed_configs import packed_contradictions
from surgery.stream.quantization_configs import contradictions
from surgery.stream.source import open_checkpoint
from surgery.stream.spool import MadeRef

State = Literal["passed", "failed", "skipped", "noted"]
Progress = Callable[[str, int, int], None]
STEP_KEYS = ("op", "parents", "result", "decision")
"""What a step of a manifest holds beside its params."""


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    detail: str

    def as_dict(self) -> dict[str, str]:
        return {"check": self.name, "state": self.state, "detail": self.detail}


@dataclass(frozen=True)
class Verification:
    folder: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.state != "failed" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `surgery verify --json`."""
        return {
            "schema": 1, "output": str(self.folder), "ok": self.ok,
            "checks": [check.as_dict() for check in self.checks],
        }  # fmt: skip


def verify(
    folder: Path,
    *,
    recompute: int | None = 32,
    load: bool = True,
    threads: int = 2,
    progress: Progress | None = None,
) -> Verification:
    """Check an output. `recompute` tensors are made again (None: all, 0: none); `load` asks
    transformers whether every key has its place. Raises VerificationError without a manifest."""
    tell = progress or (lambda stage, done, total: None)
    manifest = read_manifest(folder)
    checks = [*check_files(folder, manifest, threads, tell)]
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        checks.append(Check("headers", "failed", str(error)))
        return Verification(folder, tuple(checks))
    checks.append(check_tensors(checkpoint, manifest))
    checks.extend(check_config(checkpoint))
    checks.append(check_finite(checkpoint, manifest, tell))
    if load:
        checks.append(check_load(checkpoint))
    if recompute != 0:
        checks.append(check_lineage(checkpoint, manifest, recompute, tell))
    return Verification(folder, tuple(checks))


def check_files(folder: Path, manifest: Mapping[str, Any], threads: int, tell: Progress) -> Iterator[Check]:
    """Every file of the manifest: there, of its size, of its hash; and no weights beside them."""
    files: Mapping[str, Mapping[str, Any]] = manifest["output"]["files"]
    yield _verdict("files", wrong_files(folder, manifest), f"{len(files)} files of the right size")
    hashed = {name: entry["sha256"] for name, entry in files.items() if entry["sha256"]}
    if not hashed:
        yield Check("hashes", "skipped", "the output was written with --no-hash")
        return
    present = [name for name in hashed if (folder / name).is_file()]
    bad = []
    with ThreadPoolExecutor(threads) as pool:
        digests = pool.map(lambda name: file_hash(folder / name), present)
        for done, (name, digest) in enumerate(zip(present, digests, strict=True), 1):
            tell("hash", done, len(present))
            if digest != hashed[name]:
                bad.append(f"{name} has SHA-256 {digest[:12]}…, {hashed[name][:12]}… expected")
    yield _verdict("hashes", bad, f"{len(present)} files have their SHA-256")


def wrong_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files of the manifest that are missing or of another size, and weights that it does not know."""
    files: Mapping[str, Mapping[str, Any]] = manifest["output"]["files"]
    wrong = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, {entry['bytes']} expected")
    stray = [path.name for path in folder.glob("*.safetensors") if path.name not in files]
    return wrong + [f"{name} is not in the manifest" for name in stray]


def check_tensors(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> Check:
    """The headers hold exactly the tensors that the manifest accounts for."""
    told, held = set(manifest["tensors"]), set(checkpoint.tensors)
    wrong = [f"{name} is missing" for name in sorted(told - held, key=natural_key)]
    wrong += [f"{name} is not accounted for" for name in sorted(held - told, key=natural_key)]
    return _verdict("tensors", wrong, f"{len(held)} tensors, each accounted for")


def check_config(checkpoint: Checkpoint) -> Iterator[Check]:
    """What config.json says is what the tensors are."""
    config = checkpoint.config
    quantization, tensors = checkpoint.quantization, checkpoint.tensors
    wrong = contradictions(quantization, tensors) + packed_contradictions(quantization, tensors)
    text = config.get("text_config") or config
    layers = {ref.info.layer for ref in checkpoint.tensors.values() if not ref.info.mtp} - {None}
    told = text.get("num_hidden_layers")
    if checkpoint.architecture.known and layers and told is not None and len(layers) != told:
        wrong.append(f"num_hidden_layers is {told}, the tensors have {len(layers)} layers")
    predicted = text.get("num_nextn_predict_layers")
    mtp = {ref.info.layer for ref in checkpoint.tensors.values() if ref.info.mtp}
    if predicted is not None and len(mtp) != predicted and mtp:
        wrong.append(f"num_nextn_predict_layers is {predicted}, the tensors have {len(mtp)}")
    vocabulary = text.get("vocab_size")
    for ref in checkpoint.tensors.values():
        if ref.info.role in ("embedding", "head") and vocabulary and ref.shape[0] < vocabulary:
            wrong.append(f"vocab_size is {vocabulary}, {ref.name} has {ref.shape[0]} rows")
    yield _verdict("config", wrong, "config.json agrees with the tensors")
    ragged = ragged_fp8(tuple(checkpoint.tensors.values()))
    if ragged:
        yield Check(
            "fp8 shapes", "noted",
            f"{len(ragged)} FP8 tensors have sides that are no multiple of 128, first {ragged[0].name}: "
            "transformers up to 5.17 misreads them when it dequantizes; engines that read blocks do not",
        )  # fmt: skip


def check_finite(checkpoint: Checkpoint, manifest: Mapping[str, Any], tell: Progress) -> Check:
    """No NaN, no infinity in any stored byte."""
    if manifest["settings"].get("allow_nonfinite"):
        return Check("finite", "skipped", "the recipe allows NaN and infinity")
    wrong = []
    refs = [ref for ref in checkpoint.tensors.values() if isinstance(ref, StoredRef)]
    for done, ref in enumerate(refs, 1):
        tell("scan", done, len(refs))
        for start, stop in ref.tiles() if ref.codec.decodable else ():
            raw = {part.key: ref.raw(part, start, stop) for part in ref.parts}
            if not all(ref.codec.finite(key, data) for key, data in raw.items()):
                wrong.append(f"{ref.name} holds NaN or infinity")
                break
    return _verdict("finite", wrong, "no NaN or infinity")


def check_load(checkpoint: Checkpoint) -> Check:
    """transformers finds a place for every tensor and a tensor for every place (shapes only)."""
    from surgery.evaluate.load import unplaced_keys

    try:
        missing, unexpected = unplaced_keys(checkpoint)
    except (SurgeryError, ValueError, KeyError, ImportError) as error:
        return Check("loads", "skipped", f"transformers cannot build this model: {error}")
    wrong = [f"{name} is missing" for name in missing] + [f"{name} has no place" for name in unexpected]
    return _verdict("loads", wrong, "transformers has a place for every tensor")


def check_lineage(
    checkpoint: Checkpoint, manifest: Mapping[str, Any], count: int | None, tell: Progress
) -> Check:
    """Make tensors again from the parents and compare the stored bytes."""
    try:
        again = apply_format(rebuild(manifest), manifest["settings"]["format"])
    except SurgeryError as error:
        return Check("lineage", "skipped", f"the parents cannot be read: {error}")
    changed = [
        source.label
        for source in again.inputs
        if json.loads(json.dumps(source.identity()["files"])) != manifest["inputs"][source.label]["files"]
    ]
    if changed:
        return Check("lineage", "skipped", f"{', '.join(changed)} changed since: other size, time or header")
    names = list(checkpoint.tensors)
    chosen = names if count is None else names[:: max(1, len(names) // count)][:count]
    wrong, lost = [], 0
    for done, name in enumerate(chosen, 1):
        tell("recompute", done, len(chosen))
        ref, made = checkpoint.tensors[name], again.tensors.get(name)
        if made is not None and is_lost(made):
            lost += 1
            continue
        if made is None or not isinstance(ref, StoredRef) or not _same(ref, made):
            wrong.append(f"{name} is not what its lineage makes")
    if lost == len(chosen):
        return Check("lineage", "skipped", "a walk made the tensors: their files' hashes guard them")
    fine = f"{len(chosen) - lost} of {len(names)} tensors recomputed, byte for byte equal"
    if lost:
        fine += f"; {lost} that a walk made are guarded by their files' hashes alone"
    return _verdict("lineage", wrong, fine)


def is_lost(ref: TensorRef) -> bool:
    """Whether a tensor, or what it is made from, came out of a walk whose files are gone."""
    return any(isinstance(source, MadeRef) and source.lost for source in ref.sources())


def rebuild(manifest: Mapping[str, Any]) -> Checkpoint:
    """The lazy checkpoint that a manifest describes, from its inputs and steps."""
    hub = Hub()
    made: dict[str, Checkpoint] = {
        label: open_checkpoint(pinned(entry["model"], entry["revision"]), label, hub)
        for label, entry in manifest["inputs"].items()
    }
    result = next(iter(made.values()))
    for step in manifest["steps"]:
        params = {key: value for key, value in step.items() if key not in STEP_KEYS}
        operator = operator_class(step["op"]).model_validate(params)
        inputs = {name: made[label] for name, label in step["parents"].items()}
        if isinstance(operator, LayerOperator):
            result = operator.finish(inputs, Decision(step["decision"]))
        else:
            result = operator.apply(inputs)
        made[result.label] = result
    return result


def _same(ref: StoredRef, made: TensorRef) -> bool:
    context = ReadContext()
    for start, stop in made.tiles():
        for part, data in _bytes(made, start, stop, context).items():
            mine = next(each for each in ref.parts if each.key == part)
            if not np.array_equal(ref.raw(mine, start, stop), data):
                return False
    return True


def _bytes(made: TensorRef, start: int, stop: int, context: ReadContext) -> Mapping[str, Any]:
    donor = made
    if isinstance(made, ComputedRef):
        choice = made.decision(context).copy
        donor = made.inputs[choice] if choice is not None else made
    if isinstance(donor, StoredRef) and same_bytes(donor, made):
        return {part.key: donor.raw(part, start, stop) for part in donor.parts}
    return encoded(made, start, stop, context)


def _verdict(name: str, wrong: list[str], fine: str) -> Check:
    if not wrong:
        return Check(name, "passed", fine)
    return Check(
        name, "failed", "; ".join(wrong[:5]) + (f"; … {len(wrong)} in all" if len(wrong) > 5 else "")
    )
