"""Which bits are to be chosen: the units of a model, and what each candidate takes of them, from headers.

A unit are the matrices of one role in one layer, which share a scheme: vLLM asks for that of a layer's
experts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from surgery.errors import PlanError, UsageError
from surgery.operators.protocol import PREVIOUS
from surgery.recipe.budget import Budget, parse_budget
from surgery.recipe.build import outline
from surgery.recipe.entries import UnitScheme, scheme_entries
from surgery.recipe.load import one_step
from surgery.stream.checkpoint import Checkpoint, TensorRef
from surgery.stream.formats import Format, apply_format
from surgery.stream.recode import stored_as
from surgery.stream.source import open_checkpoint
from surgery.stream.survey import survey
from surgery.stream.units import format_bytes

if TYPE_CHECKING:
    from surgery.codecs.schemes import Scheme
    from surgery.operators.layerwise.problem import Matrix
    from surgery.operators.quantize.gptq import GPTQ

PLACEHOLDER = "int8-channel"
"""A scheme that any matrix can have, while none is chosen."""
OWN = ("bits", "scheme", "group_size")
"""Params that say what is to be found."""


@dataclass(frozen=True)
class Unit:
    """The matrices of one role in one layer: by scheme, in order of the schemes, what they take."""

    layer: int
    role: str
    names: tuple[str, ...]
    weights: int
    sizes: tuple[int, ...]


def open_task(
    model: str | Path,
    calibration: Any,
    schemes: Sequence[str],
    protect: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> Task:
    """What is to be chosen, see `allocate`. Reads headers only."""
    from surgery.codecs.schemes import IntScheme, parse_scheme
    from surgery.operators.quantize.gptq import GPTQ

    params = {"calibration": calibration, "schemes": dict.fromkeys(protect, "keep")}
    loaded = one_step("quantize.gptq", str(model), params, {}, overrides)
    given = cast("GPTQ", loaded.recipe.steps[0].operator)
    for name in OWN:
        if name in given.model_fields_set:
            raise UsageError(f"`{name}` is what is to be found", hint="name the candidates with --schemes")
    parsed: dict[str, Scheme] = {}
    for text in schemes:
        try:
            scheme = parse_scheme(text, 128, given.symmetric)
        except ValueError as error:
            raise UsageError(f"--schemes: {error}") from error
        if scheme is None:
            raise UsageError("`keep` is no candidate", hint="leave matrices out with --protect")
        parsed[str(scheme)] = scheme
    if len(parsed) < 2:
        raise UsageError("with one scheme there is nothing to choose", hint="name two or more")
    whole = all(isinstance(scheme, IntScheme) for scheme in parsed.values())
    walking = GPTQ.model_validate({**given.model_dump(exclude_unset=True), "scheme": PLACEHOLDER})
    checkpoint = open_checkpoint(model, "model")
    return Task(str(model), checkpoint, walking, parsed, "quantize.gptq" if whole else "quantize.rtn")


@dataclass(frozen=True)
class Task:
    """A model, the candidates by name, and `walking`: the operator that says which matrices take part, and
    which of them `schemes` settles."""

    model: str
    checkpoint: Checkpoint
    walking: GPTQ
    schemes: Mapping[str, Scheme]
    op: str

    @cached_property
    def matrices(self) -> dict[int, list[Matrix]]:
        """Those whose bits are to be found, by layer; each wants the name of its role."""
        from surgery.codecs.schemes import IntScheme
        from surgery.operators.layerwise.operator import check_groups
        from surgery.operators.layerwise.problem import Work

        self._check_experts()
        found: dict[int, list[Matrix]] = {}
        for layer, matrices in self.walking.matrices(self.checkpoint).items():
            for matrix in matrices:
                if self.walking.entry_of(matrix.ref) is None:
                    work = Work(matrix.ref.codec, matrix.ref.info.role)
                    found.setdefault(layer, []).append(matrix._replace(work=work))
        if not found:
            raise PlanError("every matrix is settled: there is nothing to choose")
        for scheme in self.schemes.values():
            for matrices in found.values():
                for matrix in matrices:
                    if isinstance(scheme, IntScheme):
                        check_groups(matrix.ref, scheme)
        return found

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """In the order of layers."""
        from surgery.codecs.forms import codec_of

        codecs = [codec_of(scheme, self.walking.scale_dtype) for scheme in self.schemes.values()]
        members: dict[tuple[int, str], list[TensorRef]] = {}
        for layer, matrices in self.matrices.items():
            for matrix in matrices:
                members.setdefault((layer, matrix.ref.info.role), []).append(matrix.ref)
        return tuple(
            Unit(
                layer, role, tuple(ref.name for ref in refs), sum(ref.numel for ref in refs),
                tuple(sum(stored_as(ref, codec).nbytes for ref in refs) for codec in codecs),
            )
            for (layer, role), refs in members.items()
        )  # fmt: skip

    def _check_experts(self) -> None:
        """Refuse to choose for some of a layer's experts alone."""
        from surgery.operators.layerwise.select import is_matrix

        settled: dict[int | None, bool] = {}
        for ref in self.checkpoint.tensors.values():
            if ref.info.role == "routed_expert" and not ref.info.mtp and is_matrix(ref):
                entry = self.walking.entry_of(ref)
                if settled.setdefault(ref.info.layer, entry is not None) != (entry is not None):
                    raise PlanError(
                        f"some experts' matrices of layer {ref.info.layer} are settled and others are not: "
                        "a layer's experts share one scheme",
                        hint="settle all of them (routed_expert, layers:…), or none",
                    )

    @property
    def least(self) -> int:
        """Bytes of the units at the fewest bits."""
        return sum(min(unit.sizes) for unit in self.units)

    @property
    def most(self) -> int:
        """Bytes of the units where more buys nothing."""
        return sum(max(unit.sizes) for unit in self.units)

    @cached_property
    def beside_bytes(self) -> int:
        """Bytes of the output's weight files but for the units: headers, and what is settled or stays. Raises
        PlanError where the candidates cannot stand in one checkpoint."""
        count = len(self.schemes)
        mixed = [number % count for number in range(len(self.units))]
        try:
            apply_format(self._outlined(mixed), self.form)
        except PlanError as error:
            kept = (
                any(ref.info.mtp for ref in self.checkpoint.tensors.values()) and self.walking.mtp == "keep"
            )
            if not kept:
                raise
            hint = "where it is the MTP layer: --set mtp=rtn --set schemes.mtp=int8-g64"
            raise PlanError(error.message, hint=hint, table=error.table) from error
        largest = [unit.sizes.index(max(unit.sizes)) for unit in self.units]
        return survey(self._outlined(largest), 1 << 62).output_bytes - self.most

    @cached_property
    def _fixed(self) -> list[TensorRef]:
        """Matrices that are quantized as `schemes` says, in their new form."""
        free = {name for unit in self.units for name in unit.names}
        found = []
        for ref in self.checkpoint.tensors.values():
            if ref.info.mtp and self.walking.mtp == "keep":
                continue
            work = self.walking.work(ref)
            if work is not None and ref.name not in free:
                if self.walking.entry_of(ref) is None:
                    raise PlanError(
                        f"no walk goes through the MTP layer: {ref.name} has no scheme",
                        hint="give it one: --set schemes.mtp=int8-g64",
                    )
                found.append(stored_as(ref, work.codec))
        return found

    @property
    def fixed_bytes(self) -> int:
        return sum(ref.nbytes for ref in self._fixed)

    @property
    def weights(self) -> int:
        """Weights of all quantized matrices."""
        return sum(unit.weights for unit in self.units) + sum(ref.numel for ref in self._fixed)

    @property
    def form(self) -> Format:
        """The output format of the recipe."""
        from surgery.codecs.forms import codec_of
        from surgery.stream.quantization_configs import is_compressed

        codecs = (codec_of(scheme, self.walking.scale_dtype) for scheme in self.schemes.values())
        return "compressed-tensors" if all(map(is_compressed, codecs)) else "source"

    def bpw(self, nbytes: int) -> float:
        """Bits per weight of quantized matrices that take so many bytes."""
        return 8 * nbytes / self.weights

    def ends(self) -> dict[str, Any]:
        """The budgets that can be met, and how many units share them."""
        found: dict[str, Any] = {"units": len(self.units)}
        for name, nbytes in (("least", self.least), ("most", self.most)):
            found[f"{name}_bpw"] = self.bpw(nbytes + self.fixed_bytes)
            found[f"{name}_output_bytes"] = nbytes + self.beside_bytes
        return found

    def budget(self, text: str) -> Budget:
        """The bytes that a budget leaves for the units. Raises PlanError where they do not suffice."""
        asked, beside = parse_budget(text), self.beside_bytes
        if asked.bits is not None:
            asked = replace(asked, nbytes=int(asked.bits * self.weights / 8) - self.fixed_bytes)
        else:
            asked = replace(asked, nbytes=asked.nbytes - beside)
        if asked.nbytes < self.least:
            ends = self.ends()
            least, most = (
                f"{ends[f'{end}_bpw']:.4g}bpw (files of {format_bytes(ends[f'{end}_output_bytes'])})"
                for end in ("least", "most")
            )
            raise PlanError(
                f"{text} is less than these schemes can do: budgets lie between {least} and {most}",
                hint="raise the budget, or name schemes of fewer bits with --schemes",
            )
        return asked

    def entries(self, chosen: Sequence[int], errors: Sequence[float]) -> dict[str, list[UnitScheme]]:
        names = list(self.schemes)
        units = [
            UnitScheme(unit.layer, unit.role, unit.names, names[index], error)
            for unit, index, error in zip(self.units, chosen, errors, strict=True)
        ]
        free = {name for unit in self.units for name in unit.names}
        others = [
            ref.name for ref in self.checkpoint.tensors.values()
            if len(ref.shape) == 2 and ref.name not in free and self.walking.entry_of(ref) is None
        ]  # fmt: skip
        return scheme_entries(units, others)

    def step(self, entries: Mapping[str, Sequence[UnitScheme]]) -> dict[str, Any]:
        """The step of the recipe."""
        given = self.walking.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"scheme"})
        fixed = given.pop("schemes", {})
        calibration = _in_short(given.pop("calibration"))
        if self.op == "quantize.rtn":
            from surgery.operators.quantize.rtn import RoundToNearest

            lost = sorted(set(given) - set(RoundToNearest.model_fields))
            if lost:
                raise UsageError(
                    f"`{lost[0]}` is no param of quantize.rtn, which schemes that are no whole numbers need"
                )
            calibration = None
        return {
            "op": self.op, **({} if calibration is None else {"calibration": calibration}), **given,
            "schemes": {**fixed, **{entry: units[0].scheme for entry, units in entries.items()}},
        }  # fmt: skip

    def document(self, entries: Mapping[str, Sequence[UnitScheme]]) -> dict[str, Any]:
        """The recipe as plain data."""
        place = os.path.abspath(self.model) if Path(self.model).is_dir() else self.model
        return {
            "parents": {"model": place}, "steps": [self.step(entries)], "output": {"format": self.form},
        }  # fmt: skip

    def _outlined(self, chosen: Sequence[int]) -> Checkpoint:
        """The result of a choice, from headers."""
        step = self.step(self.entries(chosen, [0.0] * len(chosen)))
        operator = one_step(step.pop("op"), self.model, step, {}).recipe.steps[0].operator
        return outline(0, operator, {PREVIOUS: self.checkpoint})


def _in_short(calibration: Mapping[str, Any]) -> Any:
    """Calibration data as people write them, files by absolute paths."""
    files = {
        domain: [each if "://" in each else os.path.abspath(each) for each in given]
        for domain, given in calibration["files"].items()
    }
    short: Any = files
    if set(files) == {"all"}:
        short = files["all"][0] if len(files["all"]) == 1 else files["all"]
    rest = {key: value for key, value in calibration.items() if key != "files"}
    return {"files": short, **rest} if rest else short
