"""What the quantizing operators share: which matrix gets which scheme.

One scheme for all (`bits`, `group_size`, `symmetric`, or by name: `scheme: nf4`), and `schemes` for those
that differ, by role or selector, the first that matches wins:

    schemes:
      layers:0-2: int8
      routed_expert: int2-g64
      attention: int8
      router: keep

By default attention, dense MLPs, shared and routed experts are quantized; routers, norms, embeddings and the
head stay as they are unless `schemes` names them. Names of schemes are in `surgery.codecs.schemes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from surgery.codecs.forms import ScaleDtype, codec_of
from surgery.codecs.schemes import FloatScheme, IntScheme, Scheme, parse_scheme
from surgery.errors import PlanError
from surgery.operators.layerwise.operator import Tensors, check_groups, check_plain, quantized_together
from surgery.operators.layerwise.problem import Problem, Work
from surgery.operators.layerwise.select import SOLVED_ROLES, is_matrix
from surgery.operators.protocol import Operator
from surgery.stream.select import check_entry, matcher

if TYPE_CHECKING:
    from surgery.stream.checkpoint import Checkpoint, TensorRef


class Precision(Operator):
    """Params that all quantizing operators share."""

    bits: int = Field(default=4, ge=2, le=8)
    """Bits of a code."""
    group_size: int = Field(default=128, ge=-1)
    """Columns that share a scale; -1 or 0: one scale for a row."""
    symmetric: bool = Field(default=True, strict=True)
    """Whether 0 is the middle of the grid; else every group has a zero point."""
    scheme: str | None = None
    """A scheme by name instead of bits: fp8, fp8-block, nf4, mxfp4, int4-g64."""
    schemes: dict[str, str] = Field(default_factory=dict)
    """Other schemes for some matrices: role or selector to the name of a scheme, or `keep`."""
    scale_dtype: ScaleDtype = "bfloat16"
    """The dtype that scales of whole-number schemes are stored in, and computed with."""

    @field_validator("scheme")
    @classmethod
    def _is_scheme(cls, value: str | None) -> str | None:
        if value is not None and parse_scheme(value) is None:
            raise ValueError("`keep` leaves nothing to do; name a scheme")
        return value

    @field_validator("schemes")
    @classmethod
    def _are_schemes(cls, value: dict[str, str]) -> dict[str, str]:
        for entry, text in value.items():
            check_entry(entry)
            parse_scheme(text)
        return value

    @model_validator(mode="after")
    def _one_spelling(self) -> Precision:
        if self.scheme is not None and self.model_fields_set & {"bits"}:
            raise ValueError("give `bits` or `scheme`, not both")
        return self

    def entry_of(self, ref: TensorRef) -> str | None:
        """The entry of `schemes` that a matrix falls under; None where there is none."""
        for entry in self.schemes:
            named = entry == ref.info.role or entry.startswith("re:")
            if (named or ref.info.role in SOLVED_ROLES) and matcher(entry)(ref):
                return entry
        return None

    def scheme_of(self, ref: TensorRef) -> Scheme | None:
        """The scheme of a tensor; None where it stays."""
        if not is_matrix(ref):
            return None
        entry = self.entry_of(ref)
        if entry is not None:
            return self._parsed(self.schemes[entry])
        return self._parsed(self.scheme or f"int{self.bits}") if ref.info.role in SOLVED_ROLES else None

    def work(self, ref: TensorRef) -> Work | None:
        """The form and the scheme of a tensor; None where it stays. PlanError where that cannot be."""
        scheme = self.scheme_of(ref)
        if scheme is None:
            return None
        check_plain(ref, self.op)
        if ref.is_view:
            raise PlanError(
                f"{ref.name} is one expert of a fused tensor, which no packed form is published for",
                hint="leave the experts as they are: schemes.routed_expert=keep",
            )
        if isinstance(scheme, IntScheme):
            check_groups(ref, scheme)
        return Work(codec_of(scheme, self.scale_dtype), scheme)

    def described(self, checkpoint: Checkpoint, tensors: Tensors) -> tuple[Tensors, Mapping[str, Any]]:
        """See `MatrixOperator`: with the quantization_config of these tensors."""
        return quantized_together(checkpoint, tensors)

    def check_whole_numbers(self) -> None:
        """Raises ValueError for schemes that are none of whole numbers."""
        for text in (self.scheme, *self.schemes.values()):
            if text is not None and isinstance(parse_scheme(text), FloatScheme):
                raise ValueError(f"`{text}`: {self.op} rounds to whole numbers; quantize.rtn takes {text}")

    def _parsed(self, text: str) -> Scheme | None:
        return parse_scheme(text, max(0, self.group_size), self.symmetric)


def int_scheme_of(problem: Problem) -> IntScheme:
    """The scheme of a problem's matrices, for solvers of whole numbers."""
    if not isinstance(problem.wanted, IntScheme):
        raise TypeError(f"{problem.wanted} is no scheme of whole numbers")
    return problem.wanted
