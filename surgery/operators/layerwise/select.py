"""Which matrices of a model an operator works on, and what their names say of their place in a layer.

A matrix is a two-dimensional `.weight` of more than one row and column. By default those of attention, dense
MLPs, shared and routed experts take part; embeddings, head, router and norms stay as they are. The prediction
(MTP) layer has no inputs in a walk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from surgery.calibrate.inputs import Site
from surgery.errors import PlanError
from surgery.operators.layerwise.problem import Matrix, Work
from surgery.stream.checkpoint import Checkpoint, TensorRef
from surgery.stream.roles import Architecture

SOLVED_ROLES = ("attention", "dense_mlp", "shared_expert", "routed_expert")
_IN_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(.+)\.weight$")
_LAST = ("o_proj", "out_proj", "dense", "down_proj", "w2", "c_proj", "fc2", "wo")
"""Projections whose input another projection of the same block makes."""


def is_matrix(ref: TensorRef) -> bool:
    """Whether a tensor is the weight of a linear map."""
    return len(ref.shape) == 2 and min(ref.shape) > 1 and ref.name.endswith(".weight")


def place_in_layer(ref: TensorRef, architecture: Architecture, work: Work) -> Matrix:
    """The matrix that a tensor of a decoder layer is. PlanError where its module cannot be told."""
    if ref.info.role == "routed_expert":
        rules = architecture.experts
        projection = ref.name.removesuffix(".weight").rpartition(".")[2]
        if rules is None or ref.info.expert is None or projection not in rules.projections:
            raise PlanError(f"{ref.name}: which projection of an expert it is is not known")
        site: Site = "inner" if projection == rules.projections[2] else "in"
        return Matrix(ref, work, None, ref.info.expert, site)
    found = _IN_LAYER.search(ref.name)
    if found is None:
        raise PlanError(
            f"{ref.name} is in no decoder layer: nothing is known of what goes into it",
            hint="leave it as it is (`keep`)",
        )
    return Matrix(ref, work, found[1], None, "in")


def by_layer(checkpoint: Checkpoint) -> dict[int, list[TensorRef]]:
    """The tensors of each decoder layer, prediction layers left out."""
    found: dict[int, list[TensorRef]] = {}
    for ref in checkpoint.tensors.values():
        if ref.info.layer is not None and not ref.info.mtp:
            found.setdefault(ref.info.layer, []).append(ref)
    return found


def stage_of(matrix: Matrix) -> int:
    """Its turn in a layer that is solved in sequence: 0 what reads the attention's input, 1 its output
    projection, 2 what reads the MLP's input, 3 the down projections."""
    role = matrix.ref.info.role
    last = matrix.site == "inner"
    if matrix.module is not None:
        last = matrix.module.rpartition(".")[2] in _LAST
    return (0 if role == "attention" else 2) + last


def waves(matrices: Sequence[Matrix], room_bytes: int, *, gram: bool, sequential: bool) -> list[list[Matrix]]:
    """The matrices in the order in which their inputs are taken: what fits into `room_bytes` at once, dense
    ones first, stage by stage where they are solved in sequence. Never empty lists."""
    stages: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        stages.setdefault(stage_of(matrix) if sequential else 0, []).append(matrix)
    found: list[list[Matrix]] = []
    for _, members in sorted(stages.items()):
        dense = [matrix for matrix in members if matrix.expert is None]
        used = 0
        wave = dense
        for group in _experts(members):
            inputs = {matrix.site: matrix.ref.shape[1] for matrix in group}
            need = sum(sums_bytes(columns, gram=gram) for columns in inputs.values())
            if wave and used + need > room_bytes:
                found.append(wave)
                wave, used = [], 0
            wave = [*wave, *group]
            used += need
        if wave:
            found.append(wave)
    return found


def sums_bytes(columns: int, *, gram: bool) -> int:
    """Bytes of the sums over the inputs of one matrix."""
    return 4 * columns * (columns + 2 if gram else 2)


def _experts(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """The matrices of each routed expert."""
    found: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        if matrix.expert is not None:
            found.setdefault(matrix.expert, []).append(matrix)
    return [found[expert] for expert in sorted(found)]
