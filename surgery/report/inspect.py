"""Look at a model from its headers: tensors by role and stored form, quantization, oddities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery.codecs.fp8_block import BLOCK, Fp8Block
from surgery.stream.checkpoint import Checkpoint, TensorRef


@dataclass(frozen=True)
class RoleRow:
    """Tensors of one role in one stored form."""

    role: str
    mtp: bool
    form: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    label: str
    model_type: str | None
    architecture: str
    layers: int
    parameters: int
    nbytes: int
    shards: int
    quantization: dict[str, Any]
    rows: tuple[RoleRow, ...]
    oddities: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `surgery inspect --json`."""
        rows = [
            {
                "role": row.role, "mtp": row.mtp, "form": row.form, "tensors": row.tensors,
                "parameters": row.parameters, "bytes": row.nbytes,
            }
            for row in self.rows
        ]  # fmt: skip
        return {
            "schema": 1, "model": self.label, "model_type": self.model_type,
            "architecture": self.architecture, "layers": self.layers, "parameters": self.parameters,
            "bytes": self.nbytes, "shards": self.shards, "quantization": self.quantization,
            "roles": rows, "oddities": list(self.oddities),
        }  # fmt: skip


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Everything the headers and the config say."""
    cells: dict[tuple[str, bool, str], list[int]] = {}
    for ref in checkpoint.tensors.values():
        cell = cells.setdefault((ref.info.role, ref.info.mtp, ref.codec.name), [0, 0, 0])
        for index, amount in enumerate((1, ref.numel, ref.nbytes)):
            cell[index] += amount
    rows = tuple(RoleRow(*key, *cell) for key, cell in sorted(cells.items()))
    layers = {ref.info.layer for ref in checkpoint.tensors.values()} - {None}
    return Inspection(
        label=checkpoint.label,
        model_type=checkpoint.config.get("model_type"),
        architecture=checkpoint.architecture.name,
        layers=len(layers),
        parameters=sum(row.parameters for row in rows),
        nbytes=sum(row.nbytes for row in rows),
        shards=sum(len(source.files) for source in checkpoint.inputs),
        quantization=dict(checkpoint.quantization),
        rows=rows,
        oddities=oddities(checkpoint),
    )


def oddities(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What its users should know of a checkpoint."""
    found = [event.message for event in checkpoint.events]
    ragged = ragged_fp8(tuple(checkpoint.tensors.values()))
    if ragged:
        found.append(
            f"{len(ragged)} FP8 tensors have sides that are no multiple of {BLOCK}, first {ragged[0].name}: "
            "transformers up to 5.17 misreads them when it dequantizes"
        )
    mtp = [ref for ref in checkpoint.tensors.values() if ref.info.mtp]
    if mtp:
        found.append(f"{len(mtp)} tensors belong to multi-token prediction; transformers does not load them")
    opaque = Counter(ref.codec.name for ref in checkpoint.tensors.values() if not ref.codec.decodable)
    for form, count in opaque.items():
        found.append(f"{count} tensors are stored as {form}: they can be copied, not computed with")
    other = [name for name, ref in checkpoint.tensors.items() if ref.info.role == "other"]
    if other and checkpoint.architecture.known:
        found.append(f"{len(other)} tensors have no role, first {other[0]}")
    return tuple(found)


def ragged_fp8(refs: Sequence[TensorRef]) -> list[TensorRef]:
    """FP8 tensors larger than one block whose sides are no multiples of 128 (DeepSeek's own
    kv_a_proj_with_mqa has 576 rows)."""
    return [
        ref
        for ref in refs
        if isinstance(ref.codec, Fp8Block)
        and ref.codec.suffix == "_scale_inv"
        and any(side % BLOCK and side > BLOCK for side in ref.shape)
    ]
