"""The part of a solving operator in a walk: take the inputs of a layer, solve, put the results in place.

For each layer, wave by wave (what fits into memory at once, see `select.waves`): the calibration tokens run
through the layer as it was, the inputs of the wave's matrices are summed up, the matrices are solved in
batches of one shape, and their final bytes go into a spool file. Once all waves of a layer are through, its
new tensors stand in for the old ones; where the operator solves in sequence, after every wave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import torch

from surgery.calibrate.inputs import InputSums, LayerInputs
from surgery.calibrate.state import decode
from surgery.calibrate.walk import LayerObserver, Replay
from surgery.codecs.codec import Codec, IntCodec
from surgery.codecs.grid import Quantized
from surgery.errors import CheckpointError
from surgery.operators.layerwise.problem import Matrix, Problem, Solution
from surgery.stream.checkpoint import Checkpoint, TensorRef
from surgery.stream.files import StoredTensor
from surgery.stream.spool import SUFFIX, Made, made_ref, read_spool, write_spool


class Solver(Protocol):
    """What the step needs of its operator."""

    @property
    def name(self) -> str: ...

    @property
    def needs_gram(self) -> bool: ...

    @property
    def min_tokens(self) -> int:
        """With fewer tokens a matrix is not solved but falls back."""

    @property
    def sequential(self) -> bool: ...

    def solve(self, problem: Problem) -> Solution: ...

    def fall_back(self, problem: Problem) -> Solution:
        """Without inputs."""


@dataclass
class Solving:
    """A solver at work on the layers of a model. `plan` has the waves of each layer; what is solved at once
    takes about `room_bytes`."""

    solver: Solver
    plan: Mapping[int, Sequence[Sequence[Matrix]]]
    folder: Path
    device: torch.device
    room_bytes: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the spool files by name."""
    _held: dict[str, TensorRef] = field(default_factory=dict)
    """The solved tensors of the layer at hand."""

    @property
    def steps(self) -> list[WaveStep]:
        """One for each wave of the layer that has most."""
        return [WaveStep(self, number) for number in range(max(map(len, self.plan.values()), default=0))]

    def solve(
        self, layer: int, number: int, refs: Sequence[TensorRef], inputs: LayerInputs
    ) -> Sequence[TensorRef] | None:
        """Solve a wave whose inputs are taken; the layer's tensors once they change."""
        matrices = self.plan[layer][number]
        current = {ref.name: ref for ref in refs}
        made: list[Made] = []
        for batch, sums in self._batches(matrices, inputs):
            made += self._solved(layer, [[(m, current[m.ref.name]) for m in group] for group in batch], sums)
        name = f"solved-{layer:05d}-{number:02d}{SUFFIX}"
        self.files[name] = write_spool(self.folder / name, made)
        spool = read_spool(self.folder / name)
        for each in made:
            self._held[each.ref.name] = made_ref(each.ref, each.codec, self.solver.name, spool)
        if not self.solver.sequential and number + 1 < len(self.plan[layer]):
            return None
        held, self._held = self._held, {}
        return [held.get(ref.name, ref) for ref in refs]

    def _batches(
        self, matrices: Sequence[Matrix], inputs: LayerInputs
    ) -> Iterator[tuple[list[list[Matrix]], list[InputSums | None]]]:
        """Groups of matrices that share their inputs, those of equal shapes together, with their inputs."""
        groups: dict[tuple[Any, ...], list[Matrix]] = {}
        for matrix in matrices:
            if matrix.module is not None:
                place: Any = inputs.of_module(matrix.module)[0]
            else:
                place = (matrix.expert, matrix.site)
            groups.setdefault((place, matrix.work), []).append(matrix)
        alike: dict[tuple[Any, ...], list[list[Matrix]]] = {}
        for group in groups.values():
            shapes = tuple(matrix.ref.shape for matrix in group)
            alike.setdefault((shapes, group[0].work), []).append(group)
        for shape, members in alike.items():
            size = max(1, self.room_bytes // problem_bytes(shape[0], gram=self.solver.needs_gram))
            for begin in range(0, len(members), size):
                batch = members[begin : begin + size]
                yield batch, [_sums(group[0], inputs) for group in batch]

    def _solved(
        self,
        layer: int,
        batch: Sequence[Sequence[tuple[Matrix, TensorRef]]],
        sums: Sequence[InputSums | None],
    ) -> list[Made]:
        problem = self._problem(layer, batch, sums)
        self._check_finite(problem, batch)
        poor = [tokens < self.solver.min_tokens for tokens in problem.tokens]
        plain = self.solver.fall_back(problem)
        found = plain if all(poor) else self.solver.solve(problem)
        reasons = list(found.unsolved or [None] * len(batch))
        reasons = [
            f"{tokens} tokens" if few else reason
            for few, tokens, reason in zip(poor, problem.tokens, reasons, strict=True)
        ]
        made: list[Made] = []
        for index, group in enumerate(batch):
            source = found if reasons[index] is None else plain
            one = problem.of(index)
            errors = relative_errors(one, source.values[index : index + 1])
            before = relative_errors(one, plain.values[index : index + 1])
            damping = found.damping[index] if found.damping and reasons[index] is None else None
            begin = 0
            for place, (matrix, ref) in enumerate(group):
                rows = slice(begin, begin + ref.shape[0])
                begin += ref.shape[0]
                values = source.values[index, rows]
                codes = _rows_of(source.quantized, index, rows)
                made.append(Made(ref, matrix.work.codec, packed(matrix.work.codec, values, codes)))
                self.rows.append({
                    "tensor": ref.name, "form": str(matrix.work.codec.name), "error": errors[place],
                    "error_plain": before[place], "zeros": int((values == 0).sum()) / values.numel(),
                    "tokens": problem.tokens[index], "damping": damping, "fallback": reasons[index],
                })  # fmt: skip
        return made

    def _problem(
        self,
        layer: int,
        batch: Sequence[Sequence[tuple[Matrix, TensorRef]]],
        sums: Sequence[InputSums | None],
    ) -> Problem:
        weights = torch.stack([
            torch.cat([decode(ref, torch.float32, self.device).view(ref.shape) for _, ref in group])
            for group in batch
        ])  # fmt: skip
        zero = InputSums.zeros(weights.shape[2], self.device, gram=self.solver.needs_gram)
        known = [each or zero for each in sums]
        grams = [each.gram for each in known if each.gram is not None]
        return Problem(
            layer,
            batch[0][0][0].work.wanted,
            weights,
            tuple(ref.shape[0] for _, ref in batch[0]),
            torch.stack([each.squares for each in known]),
            torch.stack([each.magnitudes for each in known]),
            torch.stack(grams) if grams else None,
            [each.tokens for each in known],
        )

    def _check_finite(self, problem: Problem, batch: Sequence[Sequence[tuple[Matrix, TensorRef]]]) -> None:
        for values, what in ((problem.weights, "its weights hold"), (problem.squares, "its inputs hold")):
            fine = torch.isfinite(values).flatten(1).all(dim=1).tolist()
            if not all(fine):
                name = batch[fine.index(False)][0][0].ref.name
                raise CheckpointError(
                    f"{name} cannot be solved: {what} NaN or infinity",
                    hint="look at the model (surgery verify), or compute in float32 (--dtype float32)",
                )


@dataclass
class WaveStep:
    """Wave number `number` of each layer. The first of the waves keeps the state of all."""

    solving: Solving
    number: int
    _taking: LayerInputs | None = None

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint

    def observe(self, layer: int, *, has_experts: bool) -> LayerObserver | None:
        waves = self.solving.plan.get(layer, ())
        if self.number >= len(waves):
            return None
        wave = waves[self.number]
        modules = [matrix.module for matrix in wave if matrix.module is not None]
        experts = {matrix.expert for matrix in wave if matrix.expert is not None}
        self._taking = LayerInputs(layer, modules, experts, gram=self.solving.solver.needs_gram)
        return self._taking

    def finish(self, layer: int, refs: Sequence[TensorRef], replay: Replay) -> Sequence[TensorRef] | None:
        if self._taking is None:
            return None
        inputs, self._taking = self._taking, None
        return self.solving.solve(layer, self.number, refs, inputs)

    def state(self) -> dict[str, Any]:
        return {"rows": self.solving.rows, "files": self.solving.files} if self.number == 0 else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        if self.number == 0:
            self.solving.rows[:] = state["rows"]
            self.solving.files.clear()
            self.solving.files.update(state["files"])


def problem_bytes(shapes: Sequence[tuple[int, ...]], *, gram: bool) -> int:
    """Bytes that one of a batch takes while it is solved: weights, values, errors, codes; gram and factor."""
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    return 4 * rows * columns * 5 + (4 * columns * columns * 4 if gram else 0)


def relative_errors(problem: Problem, values: torch.Tensor) -> list[float]:
    """‖(W − W')X‖ / ‖WX‖ of each matrix of a problem of one; without a gram, as if its inputs were
    independent of one another."""
    weights = problem.weights[0]
    pairs = (torch.split(each, list(problem.splits)) for each in (weights - values[0], weights))
    found = []
    for change, whole in zip(*pairs, strict=True):
        lost, total = _energy(problem, change), _energy(problem, whole)
        found.append(sqrt(lost / total) if total else 0.0)
    return found


def _energy(problem: Problem, weights: torch.Tensor) -> float:
    """‖WX‖² from the sums over X."""
    through = weights * problem.squares[0] if problem.gram is None else weights @ problem.gram[0]
    return max(0.0, float((weights * through).sum()))


def packed(codec: Codec, values: torch.Tensor, codes: Quantized | None) -> Mapping[str, Any]:
    """The stored bytes of a solved matrix: of its codes where there are any."""
    constants = codec.constants(tuple(values.shape))
    if codes is None:
        return {**codec.encode(values.cpu().contiguous()), **constants}
    if not isinstance(codec, IntCodec):
        raise TypeError(f"{codec.name} stores no codes")
    return {**codec.pack(Quantized(*(each.cpu().contiguous() for each in codes))), **constants}


def open_spools(folder: Path, files: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The stored parts of all spool files of a step."""
    found: dict[str, StoredTensor] = {}
    for name in files:
        found |= read_spool(folder / name)
    return found


def _sums(matrix: Matrix, inputs: LayerInputs) -> InputSums | None:
    if matrix.module is not None:
        return inputs.of_module(matrix.module)[1]
    return None if matrix.expert is None else inputs.of_expert(matrix.expert, matrix.site)


def _rows_of(codes: Quantized | None, index: int, rows: slice) -> Quantized | None:
    return None if codes is None else Quantized(*(each[index, rows] for each in codes))
