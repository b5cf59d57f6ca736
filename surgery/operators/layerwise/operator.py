"""Base of the operators that solve a layer matrix by matrix: params, plan, walk, result.

The result of a walk are spool files with the solved matrices in their final form; `finish` puts them in the
place of the old ones. The decision in the manifest names the files' hashes: without the files (when an output
is verified) solved tensors can be told of but not made again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from surgery.calibrate.data import Calibration, find_file
from surgery.codecs.codec import Codec
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.nf4 import Bnb4
from surgery.codecs.plain import Opaque, Plain
from surgery.codecs.schemes import IntScheme
from surgery.errors import CheckpointError, PlanError
from surgery.operators.protocol import Decision, LayerOperator, Participant, RunContext, record_step
from surgery.stream.checkpoint import Checkpoint, Event, TensorRef
from surgery.stream.files import StoredTensor, file_hash
from surgery.stream.recode import stored_as

if TYPE_CHECKING:
    from surgery.calibrate.walk import Walk
    from surgery.operators.layerwise.problem import Matrix, Problem, Solved, Work
    from surgery.operators.layerwise.scaled import Prepare
    from surgery.operators.layerwise.step import Solving
    from surgery.operators.layerwise.wave import Plan, WaveStep

REPORT = "surgery_matrices.json"


@dataclass(frozen=True)
class Measured:
    """A table that was found on the way and goes into the manifest as it is."""

    row: Mapping[str, Any]

    def measure(self) -> Mapping[str, Any]:
        return self.row


Tensors = Mapping[str, TensorRef]


class MatrixOperator(LayerOperator):
    """Params that all solving operators share."""

    experts_share: ClassVar[float] = 0.25

    calibration: Calibration
    """Texts or conversations: a file, a list of files, {domain: file}, or a mapping with more settings."""
    propagate: Literal["changed", "original"] = "changed"
    """Whether later layers see what the solved layers give or what the layers as they were gave."""
    sequential: bool = Field(default=False, strict=True)
    """Solve a layer in four turns (queries, keys, values; their output; gate and up; down), each on inputs
    behind the turns before it: four passes a layer instead of one."""
    min_tokens: int = Field(default=16, ge=1)
    """An expert that fewer tokens were routed to is rounded or cut without looking at its inputs."""
    mtp: Literal["keep", "rtn"] = "keep"
    """The prediction (MTP) layer, which has no inputs in a walk: `keep` its bytes, or treat it without."""

    @property
    def name(self) -> str:
        return self.op

    @property
    def needs_gram(self) -> bool:
        """Whether the solver works from Σ x xᵀ, not from its diagonal alone."""
        return True

    @property
    def asked_damping(self) -> float:
        """The damping that the factorisation begins with."""
        return 0.0

    def work(self, ref: TensorRef) -> Work | None:
        """What is to become of a tensor; None where it stays. Raises PlanError where that cannot be."""
        raise TypeError(f"{type(self).__name__} does not say what it works on")

    def without_inputs(self, ref: TensorRef, work: Work) -> TensorRef:
        """A tensor of the prediction layer, or outside of all layers, treated by its weights alone."""
        return stored_as(ref, work.codec)

    def described(self, checkpoint: Checkpoint, tensors: Tensors) -> tuple[Tensors, Mapping[str, Any]]:
        """The solved tensors with those that stay, under the names that go together, and their config."""
        return tensors, checkpoint.config

    def solve(self, problem: Problem) -> Solved:
        raise TypeError(f"{type(self).__name__} cannot solve")

    def fall_back(self, problem: Problem) -> Solved:
        raise TypeError(f"{type(self).__name__} has nothing to fall back on")

    def prepare(self, checkpoint: Checkpoint) -> Prepare | None:
        """What looks at all matrices of a wave before they are solved, and may scale them; None: nothing."""
        return None

    def may_change(self, checkpoint: Checkpoint) -> frozenset[str]:
        """Names of the tensors beside the solved ones that `prepare` may change, from headers."""
        return frozenset()

    def walk_key(self) -> tuple[Any, ...] | None:
        return (self.calibration, self.propagate)

    def data_hashes(self, context: RunContext) -> Mapping[str, str]:
        names = [name for files in self.calibration.files.values() for name in files]
        return {name: file_hash(find_file(name, context.beside)) for name in names}

    def outline(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Checkpoint:
        from surgery.stream.spool import pending_ref

        (checkpoint,) = inputs.values()
        return self._with(
            checkpoint, lambda ref, codec: pending_ref(ref, codec, self.op), self.may_change(checkpoint),
            Decision({}),
        )  # fmt: skip

    def finish(
        self, inputs: Mapping[str, Checkpoint], decision: Decision, folder: Path | None = None
    ) -> Checkpoint:
        from surgery.operators.layerwise.step import open_spools
        from surgery.stream.spool import made_ref

        (checkpoint,) = inputs.values()
        spool: dict[str, StoredTensor] | None = None
        if folder is not None or "folder" in decision.data:
            spool = open_spools(folder or Path(decision.data["folder"]), decision.data["files"])
        data = {key: value for key, value in decision.data.items() if key != "folder"}
        kept = Decision(data, decision.texts, decision.measurements, decision.events)
        return self._with(
            checkpoint, lambda ref, codec: made_ref(ref, codec, self.op, spool),
            frozenset(data.get("changed", ())), kept,
        )  # fmt: skip

    def estimate(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Mapping[str, Any]:
        (checkpoint,) = inputs.values()
        plan = self.plan(checkpoint, context)
        found = estimate_waves(self.calibration, checkpoint, context, plan, gram=self.needs_gram)
        outlined = self.outline(inputs, context)
        names = {matrix.ref.name for waves in plan.values() for wave in waves for matrix in wave}
        return {**found, "spool_bytes": sum(outlined.tensors[name].nbytes for name in names)}

    def plan(self, checkpoint: Checkpoint, context: RunContext) -> dict[int, list[list[Matrix]]]:
        """The waves of each layer, from headers. Raises PlanError where there is nothing to do."""
        from surgery.operators.layerwise.select import waves

        room = sums_room(context)
        return {
            layer: waves(matrices, room, gram=self.needs_gram, sequential=self.sequential)
            for layer, matrices in self.matrices(checkpoint).items()
        }

    def matrices(self, checkpoint: Checkpoint) -> dict[int, list[Matrix]]:
        """What this operator works on in each layer, from headers. Raises PlanError where that is nothing."""
        from surgery.operators.layerwise.select import by_layer, place_in_layer

        found: dict[int, list[Matrix]] = {}
        for layer, refs in by_layer(checkpoint).items():
            matrices = []
            for ref in refs:
                work = self.work(ref)
                if work is not None:
                    matrices.append(place_in_layer(ref, checkpoint.architecture, work))
            if any(matrix.expert is not None for matrix in matrices):
                self._check_experts(checkpoint)
            if matrices:
                found[layer] = matrices
        if not found:
            raise PlanError(
                f"{self.op} finds nothing to work on in {checkpoint.label}: no matrix of a decoder layer is "
                "selected",
                hint="surgery inspect shows the roles of its tensors",
            )
        return found

    def join(self, checkpoint: Checkpoint, context: RunContext) -> Participant:
        from surgery.calibrate.skeleton import placement
        from surgery.operators.layerwise.step import Solving

        check_one_process(self.op, context)
        folder = context.folder or Path(tempfile.mkdtemp(prefix="surgery-"))
        device, _ = placement(context.device, context.dtype)
        solving = Solving(
            self, self.plan(checkpoint, context), folder, device, solver_room(context),
            self.prepare(checkpoint),
        )  # fmt: skip
        return Solver(self, solving, keeps_folder=context.folder is not None)

    def events_of(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Event, ...]:
        """What users should hear of: matrices that fell back, and such as needed more damping."""
        names: dict[str, list[str]] = {}
        for row in rows:
            if row["fallback"] is not None:
                few = row["fallback"].endswith(" tokens")
                reason = f"{'fewer than ' + str(self.min_tokens) + ' tokens' if few else row['fallback']}"
                names.setdefault(f"treated without their inputs: {reason}", []).append(row["tensor"])
            elif row["damping"] is not None and row["damping"] > self.asked_damping:
                what = f"solved with more damping than {self.asked_damping:g}"
                names.setdefault(what, []).append(row["tensor"])
        return tuple(
            Event("fallback", f"{self.op}: {len(tensors)} matrices were {what}", tuple(tensors))
            for what, tensors in names.items()
        )

    def _check_experts(self, checkpoint: Checkpoint) -> None:
        rules = checkpoint.architecture.experts
        if rules is None or not rules.observable:
            raise CheckpointError(
                f"transformers runs all experts of {checkpoint.config.get('model_type')!r} in one operation: "
                "what goes into each of them cannot be observed",
                hint="leave them as they are (routed_expert: keep), or use an operator that needs no inputs",
            )

    def _with(
        self,
        checkpoint: Checkpoint,
        change: Callable[[TensorRef, Codec], TensorRef],
        beside: frozenset[str],
        decision: Decision,
    ) -> Checkpoint:
        """The checkpoint with every tensor that this operator works on changed, and those `beside` them,
        which keep their form."""
        tensors: dict[str, TensorRef] = {}
        for name, ref in checkpoint.tensors.items():
            work = None if ref.info.mtp and self.mtp == "keep" else self.work(ref)
            if work is None:
                tensors[name] = change(ref, ref.codec) if name in beside else ref
            elif ref.info.mtp or ref.info.layer is None:
                tensors[name] = self.without_inputs(ref, work)
            else:
                tensors[name] = change(ref, work.codec)
        label, history = record_step(
            self.op, self.summary(), {self.input_names()[0]: checkpoint.label}, [checkpoint],
            decision.data if decision.data else None,
        )  # fmt: skip
        named, config = self.described(checkpoint, tensors)
        return checkpoint.replace(
            tensors=named,
            config=config,
            label=label,
            history=history,
            events=(*checkpoint.events, *decision.events),
            probes=(*checkpoint.probes, *(Measured(row) for row in decision.measurements)),
            texts={**checkpoint.texts, **decision.texts},
        )


@dataclass
class Solver:
    """The part of a solving operator in a walk."""

    operator: MatrixOperator
    solving: Solving
    keeps_folder: bool

    @property
    def steps(self) -> Sequence[WaveStep]:
        return self.solving.steps

    def decision(self, walk: Walk) -> Decision:
        rows = self.solving.rows
        data: dict[str, Any] = {"files": dict(sorted(self.solving.files.items()))}
        if self.solving.changed:
            data["changed"] = sorted(self.solving.changed)
        if not self.keeps_folder:
            data["folder"] = str(self.solving.folder)
        table = {
            "kind": "matrices", "op": self.operator.op, "calibration": walk.fingerprint["calibration"],
            "columns": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows],
        }  # fmt: skip
        return Decision(data, measurements=(table,), events=self.operator.events_of(rows))


def check_one_process(what: str, context: RunContext) -> None:
    """Refuse to walk for `what` in several processes."""
    if context.ranks.count > 1:
        raise PlanError(
            f"{what} runs in one process; torchrun started {context.ranks.count}",
            hint="run it without torchrun",
        )


def sums_room(context: RunContext) -> int:
    """Bytes of input sums that are taken in one pass: a share of the budget, or of the GPU's memory."""
    import torch

    if context.device != "cpu" and torch.cuda.is_available():
        return int(0.3 * torch.cuda.get_device_properties(0).total_memory)
    return context.memory_bytes // 4


def solver_room(context: RunContext) -> int:
    """Bytes that a batch of matrices may take while it is solved."""
    return sums_room(context)


def estimate_waves(
    calibration: Calibration, checkpoint: Checkpoint, context: RunContext, plan: Plan, *, gram: bool
) -> dict[str, Any]:
    """What a walk needs that takes the inputs of these waves, and works with those of a batch of matrices."""
    from surgery.operators.layerwise.assemble import problem_bytes
    from surgery.operators.together import estimate_together

    found = dict(estimate_together(calibration, checkpoint, context))
    every = [wave for waves in plan.values() for wave in waves]
    largest = max(problem_bytes([matrix.ref.shape], gram=gram) for wave in every for matrix in wave)
    sums = max(wave_bytes(wave, gram=gram) for wave in every)
    room = max(largest, solver_room(context))
    found["parts"] = {**found["parts"], "input_sums": sums, "solver": room}
    for key in ("device_bytes", *(("host_bytes",) if found["device"] == "cpu" else ())):
        found[key] += sums + room
    return {**found, "matrices": sum(map(len, every)), "waves": max(map(len, plan.values()))}


def wave_bytes(wave: Sequence[Matrix], *, gram: bool) -> int:
    """Bytes of the sums of one wave, at most: as if no module shared its inputs."""
    from surgery.operators.layerwise.select import sums_bytes

    inputs: dict[tuple[Any, ...], int] = {}
    for matrix in wave:
        inputs[matrix.module, matrix.expert, matrix.site] = matrix.ref.shape[1]
    return sum(sums_bytes(columns, gram=gram) for columns in inputs.values())


def check_plain(ref: TensorRef, op: str) -> None:
    """Refuse tensors that are already in few bits."""
    if not isinstance(ref.codec, Plain | Fp8Block) and not ref.codec.name.startswith("fp8"):
        raise PlanError(
            f"{ref.name} is already stored as {ref.codec.name}",
            hint=f"{op} starts from bf16, fp16, fp32 or FP8: decode it first with output.format=bf16",
        )


def check_groups(ref: TensorRef, scheme: IntScheme) -> None:
    """Refuse groups that do not divide a matrix's columns."""
    try:
        scheme.groups(ref.shape[1])
    except ValueError as error:
        raise PlanError(
            f"{ref.name}: {error}",
            hint="choose a group_size that does, -1 for one scale a row, or another of `schemes` for it",
        ) from error


def quantized_together(checkpoint: Checkpoint, tensors: Tensors) -> tuple[Tensors, Mapping[str, Any]]:
    """Tensors of which some are quantized now, and the config that says how all are stored. What stays in FP8
    blocks keeps its bytes, under the names of the format that holds the others. Raises PlanError where no
    published format holds all of their forms."""
    from surgery.stream.formats import FORMS, to_compressed_tensors
    from surgery.stream.quantization_configs import cannot_express

    kinds = {type(ref.codec) for ref in tensors.values() if not isinstance(ref.codec, Plain | Opaque)}
    form = "compressed-tensors"
    if kinds == {Fp8Block}:
        form = "fp8-block"
    elif Bnb4 in kinds:
        form = "bnb-nf4"
        other = next(
            (ref for ref in tensors.values() if not isinstance(ref.codec, Bnb4 | Plain | Opaque)), None
        )
        if other is not None:
            raise cannot_express(form, other)
    else:
        tensors = {name: to_compressed_tensors(ref) for name, ref in tensors.items()}
    describe = FORMS[form][1]
    if describe is None:
        raise TypeError(f"{form} has no quantization_config")
    return tensors, {**checkpoint.config, "quantization_config": describe(checkpoint, tensors)}
