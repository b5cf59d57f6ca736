"""From a layer's matrices and the sums of their inputs to problems: what shares its inputs is stacked, and
stacks that are alike in shape and work are solved in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from surgery.calibrate.inputs import InputSums, LayerInputs
from surgery.calibrate.state import decode
from surgery.errors import CheckpointError
from surgery.operators.layerwise.problem import Matrix, Problem
from surgery.stream.checkpoint import TensorRef


def problems(
    layer: int,
    matrices: Sequence[Matrix],
    refs: Sequence[TensorRef],
    inputs: LayerInputs,
    device: torch.device,
    room_bytes: int,
    *,
    gram: bool,
) -> Iterator[tuple[list[list[Matrix]], Problem]]:
    """(the matrices of each of the B, their problem) in batches that take about `room_bytes` to solve. `refs`
    are the layer's tensors as they are now. Raises CheckpointError for NaN and infinity."""
    current = {ref.name: ref for ref in refs}
    groups: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        place: Any = (matrix.expert, matrix.site)
        if matrix.module is not None:
            place = inputs.of_module(matrix.module)[0]
        groups.setdefault((place, matrix.work), []).append(matrix._replace(ref=current[matrix.ref.name]))
    alike: dict[Any, list[list[Matrix]]] = {}
    for group in groups.values():
        shapes = tuple(matrix.ref.shape for matrix in group)
        alike.setdefault((shapes, group[0].work), []).append(group)
    for (shapes, _), members in alike.items():
        size = max(1, room_bytes // problem_bytes(shapes, gram=gram))
        for begin in range(0, len(members), size):
            batch = members[begin : begin + size]
            problem = _problem(layer, batch, [_sums(group[0], inputs) for group in batch], device, gram)
            _check_finite(problem, batch)
            yield batch, problem


def problem_bytes(shapes: Sequence[tuple[int, ...]], *, gram: bool) -> int:
    """Bytes that one of a batch takes while it is solved: weights, values, errors, codes; gram and factor."""
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    return 4 * rows * columns * 5 + (4 * columns * columns * 4 if gram else 0)


def _problem(
    layer: int,
    batch: Sequence[Sequence[Matrix]],
    sums: Sequence[InputSums | None],
    device: torch.device,
    gram: bool,
) -> Problem:
    weights = torch.stack([
        torch.cat([decode(each.ref, torch.float32, device).view(each.ref.shape) for each in group])
        for group in batch
    ])  # fmt: skip
    zero = InputSums.zeros(weights.shape[2], device, gram=gram)
    known = [each or zero for each in sums]
    grams = [each.gram for each in known if each.gram is not None]
    return Problem(
        layer,
        batch[0][0].work.wanted,
        weights,
        tuple(matrix.ref.shape[0] for matrix in batch[0]),
        torch.stack([each.squares for each in known]),
        torch.stack([each.magnitudes for each in known]),
        torch.stack(grams) if grams else None,
        [each.tokens for each in known],
    )


def _check_finite(problem: Problem, batch: Sequence[Sequence[Matrix]]) -> None:
    for values, what in ((problem.weights, "its weights hold"), (problem.squares, "its inputs hold")):
        fine = torch.isfinite(values).flatten(1).all(dim=1).tolist()
        if not all(fine):
            raise CheckpointError(
                f"{batch[fine.index(False)][0].ref.name} cannot be solved: {what} NaN or infinity",
                hint="look at the model (surgery verify), or compute in float32 (--dtype float32)",
            )


def _sums(matrix: Matrix, inputs: LayerInputs) -> InputSums | None:
    if matrix.module is not None:
        return inputs.of_module(matrix.module)[1]
    return None if matrix.expert is None else inputs.of_expert(matrix.expert, matrix.site)
