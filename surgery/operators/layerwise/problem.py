"""The matrices of a layer that a solver works on, and what it gives back."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from surgery.calibrate.inputs import Site
from surgery.codecs.codec import Codec
from surgery.codecs.grid import Quantized
from surgery.stream.checkpoint import TensorRef

if TYPE_CHECKING:
    import torch


class Work(NamedTuple):
    """What is to become of a matrix: the form that it is stored in, and what the operator wants of it (bits,
    sparsity). Matrices are solved together where both are equal."""

    codec: Codec
    wanted: Hashable


class Matrix(NamedTuple):
    """A matrix of a layer: a linear module's by its path, or a routed expert's by what goes into it."""

    ref: TensorRef
    work: Work
    module: str | None
    expert: int | None
    site: Site


@dataclass
class Problem:
    """Matrices of one shape with their inputs.

    weights [B, R, C] in float32: B experts (or one), R the rows of all matrices that share an input, `splits`
    of each. squares and magnitudes [B, C] and gram [B, C, C] (None where the operator asked for none) are
    those of `surgery.calibrate.inputs`, tokens [B] how many came by.
    """

    layer: int
    wanted: Hashable
    weights: torch.Tensor
    splits: tuple[int, ...]
    squares: torch.Tensor
    magnitudes: torch.Tensor
    gram: torch.Tensor | None
    tokens: list[int]

    @property
    def known_gram(self) -> torch.Tensor:
        """The gram of an operator that asked for it."""
        if self.gram is None:
            raise TypeError("no Gram matrix was taken")
        return self.gram

    def of(self, index: int) -> Problem:
        """The problem of one of the B alone."""
        one = slice(index, index + 1)
        return Problem(
            self.layer, self.wanted, self.weights[one], self.splits, self.squares[one], self.magnitudes[one],
            None if self.gram is None else self.gram[one], self.tokens[one],
        )  # fmt: skip


@dataclass
class Solved:
    """values [B, R, C] in float32, as readers will have them; their codes where there are any; the damping
    that each of the B took; and why one of them could not be solved (None: it was)."""

    values: torch.Tensor
    quantized: Quantized | None = None
    damping: list[float] | None = None
    unsolved: list[str | None] | None = None
