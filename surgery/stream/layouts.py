"""Where logical tensors sit inside fused stored tensors.

Some families store all experts of a layer in one tensor whose dimension 0 is the expert, with gate and up
projections side by side. The toolkit addresses experts one by one, under the names that other families use on
disk (`...experts.7.up_proj.weight`), so every operator sees one layout. A `FusedRule` (data, from
architectures/*.yaml) says how one stored tensor splits; `split` turns it into one `View` per expert and
projection. A view is invertible: reading through `View.of` gives the logical tensor, writing through it fills
the stored slab in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import numpy.typing as npt

Rows = Literal["all", "first_half", "second_half", "even", "odd"]


@dataclass(frozen=True, slots=True)
class View:
    """One logical tensor inside a fused stored tensor `[experts, ...]`.

    `index` picks the slab `stored[index]`. `start:stop:step` then picks the logical output rows: along axis 0
    of the slab, or along axis 1 where the slab is stored `[in, out]` (`transpose`). `stop` None is the end.
    """

    index: int
    start: int
    stop: int | None
    step: int
    transpose: bool

    def of(self, slab: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The logical tensor `[out, ...]` as a numpy view of `slab` = `stored[index]`; writes go through."""
        rows = slice(self.start, self.stop, self.step)
        return slab[:, rows].T if self.transpose else slab[rows]

    def shape(self, stored_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the logical tensor (of this part of it, where it is stored in parts)."""
        slab = stored_shape[1:]
        axis = 1 if self.transpose else 0
        rows = len(range(*slice(self.start, self.stop, self.step).indices(slab[axis])))
        return (rows, slab[0]) if self.transpose else (rows, *slab[1:])

    def contiguous(self, stored_shape: tuple[int, ...]) -> bool:
        """Whether one byte range of the stored tensor holds the logical tensor, in its own row-major order.

        A whole transposed slab is one range of bytes too, but in another order, so not contiguous.
        """
        return not self.transpose and (self.step == 1 or self.shape(stored_shape)[0] == 1)

    def span(self, stored_shape: tuple[int, ...], itemsize: int) -> tuple[int, int]:
        """That byte range, `(begin, end)` from the start of the stored tensor.

        Raises ValueError where the view is not contiguous.
        """
        if not self.contiguous(stored_shape):
            raise ValueError(f"{self} is not one byte range of a stored tensor of shape {stored_shape}")
        begin = (self.index * stored_shape[1] + self.start) * prod(stored_shape[2:]) * itemsize
        return begin, begin + prod(self.shape(stored_shape)) * itemsize


@dataclass(frozen=True, slots=True)
class FusedRule:
    """How one kind of stored tensor splits into logical tensors.

    `stored` is its name inside the decoder with indices as `N` (see roles.py), `part` the key under which a
    codec knows its bytes ("weight", "blocks", "scales", "bias"), `transpose` whether a slab is stored
    `[in, out]`, `rows` the output rows that belong to each logical name (`gate_proj.weight`, ...).
    """

    stored: str
    part: str
    transpose: bool
    rows: tuple[tuple[str, Rows], ...]


def split(rule: FusedRule, stored_name: str, shape: tuple[int, ...]) -> list[tuple[str, str, View]]:
    """The logical tensors inside a stored tensor that `rule` is for, as (logical name, part key, view).

    Expert by expert. A stored `<prefix>.experts.<tensor>` gives `<prefix>.experts.<N>.<projection>`.
    Raises CheckpointError where the rule cannot split the shape.
    """
    halved = any(rows != "all" for _, rows in rule.rows)
    axis = 2 if rule.transpose else 1
    wrong_rank = len(shape) != 3 if rule.transpose else len(shape) < 2
    if wrong_rank or 0 in shape or (halved and shape[axis] % 2):
        wanted = "[experts, in, out]" if rule.transpose else "[experts, out, ...]"
        if halved:
            wanted += " with an even number of outputs (gate and up)"
        raise CheckpointError(
            f"fused experts {stored_name!r} have shape {list(shape)}, expected {wanted}",
            hint="the file is damaged, or config.json names another architecture than the tensors are of",
        )
    prefix = stored_name.rpartition(".")[0]
    slices = [(name, *_slice(rows, shape[axis])) for name, rows in rule.rows]
    return [
        (f"{prefix}.{expert}.{name}", rule.part, View(expert, start, stop, step, rule.transpose))
        for expert in range(shape[0])
        for name, start, stop, step in slices
    ]


def _slice(rows: Rows, count: int) -> tuple[int, int | None, int]:
    match rows:
        case "all":
            return 0, None, 1
        case "first_half":
            return 0, count // 2, 1
        case "second_half":
            return count // 2, None, 1
        case "even":
            return 0, None, 2
        case "odd":
            return 1, None, 2
