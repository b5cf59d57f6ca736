"""What the sparsifying operators share: how many weights go, of which matrices, and layer by layer.

`sparsity` is the share of weights that become zero, `pattern` n:m instead (`2:4`: two of every four columns).
`layer_sparsity` is a share for each decoder layer instead; `allocate` finds one for each (`allocating.py`).

Sparse weights are stored dense, with zeros, in the form that they had: no published engine loads another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

from pydantic import Field, field_validator, model_validator

from surgery.errors import PlanError
from surgery.operators.layerwise.operator import check_plain
from surgery.operators.layerwise.problem import Problem, Work
from surgery.operators.layerwise.select import SOLVED_ROLES, is_matrix
from surgery.operators.protocol import Operator
from surgery.stream.recode import stored_as
from surgery.stream.reshape import WholeRef
from surgery.stream.select import Matcher, check_entry, matcher

if TYPE_CHECKING:
    from surgery.codecs.codec import Codec
    from surgery.operators.sparsify.masks import Sparsity
    from surgery.stream.checkpoint import TensorRef

Share = Annotated[float, Field(gt=0, lt=1)]


def parse_pattern(text: str) -> tuple[int, int]:
    """(n, m) of `n:m`: n of every m columns go. Raises ValueError for what is none."""
    n, colon, m = text.partition(":")
    if not colon or not n.isdecimal() or not m.isdecimal() or not 0 < int(n) < int(m):
        raise ValueError(f"`{text}` is no pattern; write n:m with n below m, such as 2:4")
    return int(n), int(m)


class Sparsifying(Operator):
    """Params that all sparsifying operators share. Exactly one of `sparsity` and `pattern` is given."""

    sparsity: Share | None = None
    """The share of each matrix's weights that become zero."""
    pattern: str | None = None
    """n:m, the n of every m columns of a row that become zero: 2:4, 4:8."""
    layer_sparsity: tuple[Share, ...] | None = None
    """A share for each decoder layer instead of one for all."""
    select: tuple[str, ...] = SOLVED_ROLES
    """Roles or selectors of the matrices that take part."""
    keep: tuple[str, ...] = ()
    """Selectors of matrices that stay as they are: `layers:0`, `re:down_proj`."""

    @field_validator("select", "keep")
    @classmethod
    def _entries(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_entry(entry) for entry in value)

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            parse_pattern(value)
        return value

    @model_validator(mode="after")
    def _one_amount(self) -> Sparsifying:
        given = [
            name for name in ("sparsity", "pattern", "layer_sparsity") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"give one of `sparsity` (0.5), `pattern` (2:4) and `layer_sparsity`: "
                f"{' and '.join(given) if given else 'none'} given"
            )
        return self

    def codec_of(self, ref: TensorRef) -> Codec:
        """The form that a sparse matrix is stored in: its own."""
        return ref.codec

    def work(self, ref: TensorRef) -> Work | None:
        if not is_matrix(ref) or ref.info.layer is None or not _any(self.select, ref) or _any(self.keep, ref):
            return None
        check_plain(ref, self.op)
        pattern = parse_pattern(self.pattern) if self.pattern else None
        if pattern is not None and ref.shape[1] % pattern[1]:
            raise PlanError(
                f"{ref.name} has {ref.shape[1]} columns, which {self.pattern} does not divide",
                hint="leave it out with `keep`, or give `sparsity`",
            )
        return Work(self.codec_of(ref), pattern or self._share(ref))

    def without_inputs(self, ref: TensorRef, work: Work) -> TensorRef:
        """A matrix whose inputs no walk sees, cut by magnitude."""
        from surgery.operators.sparsify.magnitude import Cut

        return stored_as(WholeRef(ref, Cut(wanted_of(work))), work.codec)

    def _share(self, ref: TensorRef) -> float | None:
        if self.layer_sparsity is None or ref.info.layer is None or ref.info.mtp:
            return self.sparsity if not self.layer_sparsity else self.layer_sparsity[-1]
        if ref.info.layer >= len(self.layer_sparsity):
            raise PlanError(
                f"layer_sparsity has {len(self.layer_sparsity)} entries, the model more layers: {ref.name}",
                hint="give a share for every decoder layer",
            )
        return self.layer_sparsity[ref.info.layer]


def sparsity_of(problem: Problem) -> Sparsity:
    """What is wanted of the matrices of a problem."""
    return cast("Sparsity", problem.wanted)


def wanted_of(work: Work) -> Sparsity:
    """What is wanted of one matrix."""
    return cast("Sparsity", work.wanted)


def _any(entries: tuple[str, ...], ref: TensorRef) -> bool:
    matchers: list[Matcher] = [matcher(entry) for entry in entries]
    return any(matches(ref) for matches in matchers)
