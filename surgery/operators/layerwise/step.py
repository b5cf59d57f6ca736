"""The part of a solving operator in a walk: take the inputs of a layer, solve, put the results in place.

The matrices of a wave (see `wave.py`) are solved in batches of one shape, and their final bytes go into a
spool file. Once all waves of a layer are through, its new tensors stand in for the old ones; where the
operator solves in sequence, after every wave. An operator that scales matrices (`scaled.py`) looks at all of
a wave before any of it is solved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import torch

from surgery.calibrate.inputs import LayerInputs
from surgery.codecs.codec import Codec, IntCodec
from surgery.codecs.grid import Quantized
from surgery.operators.layerwise.assemble import problems
from surgery.operators.layerwise.problem import Matrix, Problem, Solved
from surgery.operators.layerwise.scaled import Prepare, Scaled, Stacked
from surgery.operators.layerwise.wave import Plan, WaveStep, wave_steps
from surgery.stream.checkpoint import TensorRef
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

    def solve(self, problem: Problem) -> Solved: ...

    def fall_back(self, problem: Problem) -> Solved:
        """Without inputs."""


@dataclass
class Solving:
    """A solver at work on the layers of a model. `plan` has the waves of each layer; what is solved at once
    takes about `room_bytes`."""

    solver: Solver
    plan: Plan
    folder: Path
    device: torch.device
    room_bytes: int
    prepare: Prepare | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the spool files by name."""
    changed: list[str] = field(default_factory=list)
    """Tensors that are no solved matrices but lie in the spool files as well."""
    _held: dict[str, TensorRef] = field(default_factory=dict)
    """The solved tensors of the layer at hand."""

    @property
    def steps(self) -> list[WaveStep]:
        return wave_steps(self)

    @property
    def needs_gram(self) -> bool:
        return self.solver.needs_gram

    def state(self) -> dict[str, Any]:
        return {"rows": self.rows, "files": self.files, "changed": self.changed}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rows[:] = state["rows"]
        self.files.clear()
        self.files.update(state["files"])
        self.changed[:] = state["changed"]

    def take(
        self, layer: int, number: int, refs: Sequence[TensorRef], inputs: LayerInputs
    ) -> Sequence[TensorRef] | None:
        """Solve a wave whose inputs are taken; the layer's tensors once they change."""
        # A snapshot that an interrupt left in the middle of a layer holds rows that are made again.
        again = {matrix.ref.name for matrix in self.plan[layer][number]}
        self.rows[:] = [row for row in self.rows if row["tensor"] not in again]

        def stacked() -> Stacked:
            return problems(
                layer, self.plan[layer][number], refs, inputs, self.device, self.room_bytes,
                gram=self.solver.needs_gram,
            )  # fmt: skip

        scaled = self.prepare(layer, refs, stacked()) if self.prepare else Scaled()
        made = list(scaled.made)
        self.changed += [each.ref.name for each in made if each.ref.name not in self.changed]
        for batch, problem in stacked():
            made += self._solved(batch, problem, scaled)
        name = f"solved-{layer:05d}-{number:02d}{SUFFIX}"
        self.files[name] = write_spool(self.folder / name, made)
        spool = read_spool(self.folder / name)
        for each in made:
            self._held[each.ref.name] = made_ref(each.ref, each.codec, self.solver.name, spool)
        if not self.solver.sequential and number + 1 < len(self.plan[layer]):
            return None
        held, self._held = self._held, {}
        return [held.get(ref.name, ref) for ref in refs]

    def _solved(self, batch: Sequence[Sequence[Matrix]], problem: Problem, scaled: Scaled) -> list[Made]:
        poor = [tokens < self.solver.min_tokens for tokens in problem.tokens]
        given = scaled.problem(batch, problem)
        unprepared = self.solver.fall_back(problem)
        plain = unprepared if given is problem else self.solver.fall_back(given)
        found = plain if all(poor) else self.solver.solve(given)
        reasons = list(found.unsolved or [None] * len(batch))
        reasons = [
            f"{tokens} tokens" if few else reason
            for few, tokens, reason in zip(poor, problem.tokens, reasons, strict=True)
        ]
        made: list[Made] = []
        for index, group in enumerate(batch):
            source = found if reasons[index] is None else plain
            one, only = problem.of(index), slice(index, index + 1)
            reached = source.values[only]
            if given is not problem:
                reached = scaled.undone(batch[only], one, reached)
            errors = relative_errors(one, reached)
            before = relative_errors(one, unprepared.values[only])
            damping = found.damping[index] if found.damping and reasons[index] is None else None
            begin = 0
            for place, matrix in enumerate(group):
                ref = matrix.ref
                rows = slice(begin, begin + ref.shape[0])
                begin += ref.shape[0]
                values = source.values[index, rows]
                codes = _rows_of(source.quantized, index, rows)
                made.append(Made(ref, matrix.work.codec, packed(matrix.work.codec, values, codes)))
                self.rows.append({
                    "tensor": ref.name, "form": str(matrix.work.codec.name), "error": errors[place],
                    "error_plain": before[place], "zeros": int((values == 0).sum()) / values.numel(),
                    "tokens": problem.tokens[index], "damping": damping, "fallback": reasons[index],
                    **scaled.told.get(ref.name, {}),
                })  # fmt: skip
        return made


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
    return {**codec.pack(Quantized(*(each.contiguous() for each in codes))), **constants}


def open_spools(folder: Path, files: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The stored parts of all spool files of a step."""
    found: dict[str, StoredTensor] = {}
    for name in files:
        found |= read_spool(folder / name)
    return found


def _rows_of(codes: Quantized | None, index: int, rows: slice) -> Quantized | None:
    return None if codes is None else Quantized(*(each[index, rows] for each in codes))
