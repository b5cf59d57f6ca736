"""Checkpoint and TensorRef: an immutable, lazy view of a model's tensors.

A logical tensor is what the model computes with; how it is stored (codec, parts, views into fused
tensors) stays behind the ref. Operators make new refs from old ones; nothing is read until somebody
pulls rows, usually the sink.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from surgery.codecs.codec import WHOLE, Codec, matrix_shape
from surgery.errors import CheckpointError, UsageError
from surgery.stream.buffers import ThreadBuffers
from surgery.stream.files import Source, StoredTensor
from surgery.stream.layouts import View
from surgery.stream.roles import Architecture, TensorInfo
from surgery.stream.team import Team

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.stream.lanes import Lanes
    from surgery.stream.save import SaveResult

TILE_WEIGHTS = 1 << 20
"""Weights in a tile. Tiles are fixed by shape alone, so that no budget changes a result."""

Sums = tuple[float, ...]
"""Float64 partial sums of one tile, added up in tile order."""


class Part(NamedTuple):
    """One stored tensor behind a ref; `view` says where in it, None for all of it."""

    key: str
    stored: StoredTensor
    view: View | None


@dataclass(frozen=True)
class Event:
    """Something a user must hear of: a fallback, an oddity. Under --strict an error."""

    kind: str
    message: str
    tensors: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "message": self.message, "tensors": list(self.tensors)}


@dataclass
class ReadContext:
    """How a pull behaves: whether NaN and infinity pass, and where tile sums go."""

    allow_nonfinite: bool = True
    record: Callable[[ComputedRef, int, Sums], None] | None = None
    buffers: ThreadBuffers = field(default_factory=ThreadBuffers)
    batch: Lock = field(default_factory=Lock)
    """Held by the one thread that computes a batch of small tensors: two would only pass the
    interpreter's lock to and fro."""
    several: bool = False
    """Whether several outputs are made of the same tiles, one after another (see `ThreadBuffers.recall`)."""
    lanes: Lanes | None = None
    """To a GPU that computes, where one is to."""
    team: Team | None = None
    """While a kernel decides: who helps."""


class TensorRef:
    """Base of stored and computed tensors; see the module docstring."""

    __slots__ = ("codec", "info", "name", "parts", "rows", "shape")

    def __init__(
        self, name: str, shape: tuple[int, ...], info: TensorInfo, codec: Codec, parts: tuple[Part, ...]
    ) -> None:
        self.name = name
        self.shape = shape
        self.rows = matrix_shape(shape)[0]
        self.info = info
        self.codec = codec
        self.parts = parts

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {list(self.shape)}, {self.codec.name})"

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of this logical tensor as stored."""
        return sum(self.part_nbytes(part) for part in self.parts)

    @staticmethod
    def part_nbytes(part: Part) -> int:
        if part.view is None:
            return part.stored.nbytes
        count = prod(part.stored.shape)
        return part.stored.nbytes * prod(part.view.shape(part.stored.shape)) // count if count else 0

    @property
    def granule(self) -> int:
        """Rows that are coded together, here or in what this tensor is made from."""
        return self.codec.granule

    @property
    def is_view(self) -> bool:
        return any(part.view is not None for part in self.parts)

    def tile_rows(self) -> int:
        """Rows of a full tile: a multiple of 128, or all rows where views or the codec forbid slicing."""
        rows, cols = matrix_shape(self.shape)
        if self.is_view or self.granule >= WHOLE:
            return max(rows, 1)
        return max(128, TILE_WEIGHTS // max(cols, 1) // 128 * 128)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Row ranges that cover the tensor, in order."""
        rows = self.rows
        step = self.tile_rows() if rows > 128 else 128
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def read(self, rows: slice | None = None, context: ReadContext | None = None) -> torch.Tensor:
        """float32 values: [rows, cols] for two or more dimensions, [rows] for one.

        `rows` must start at a multiple of the codec's granule; None reads all.
        """
        start, stop, step = (rows or slice(None)).indices(self.rows)
        if self.granule >= WHOLE and (start, stop) != (0, self.rows):
            raise UsageError(
                f"{self.name} is stored as {self.codec.name}: it can only be read whole, not rows {start} to "
                f"{stop} of {self.rows}"
            )
        if start % self.granule or step != 1:
            raise UsageError(
                f"{self.name} is stored as {self.codec.name}: rows must be consecutive and start at a "
                f"multiple of {self.granule}, not {start}"
            )
        if start >= stop:
            import torch

            return torch.empty((0, *matrix_shape(self.shape)[1:])[: min(2, max(1, len(self.shape)))])
        return self.pull(start, stop, context or ReadContext())

    def pull(self, start: int, stop: int, context: ReadContext) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} cannot be read")

    def sources(self) -> tuple[StoredRef, ...]:
        """The stored tensors that this one is made from."""
        raise TypeError(f"{type(self).__name__} has no sources")

    def lineage(self) -> dict[str, Any]:
        """How this tensor comes about, for manifests; parents by label."""
        raise TypeError(f"{type(self).__name__} has no lineage")

    def same_form(self, other: TensorRef) -> bool:
        """Whether the stored bytes of both mean the same and lie in the same places."""
        return self.codec == other.codec and self.parts == other.parts


class StoredRef(TensorRef):
    """A tensor as it lies in a parent."""

    __slots__ = ("origin",)

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        info: TensorInfo,
        codec: Codec,
        parts: tuple[Part, ...],
        origin: str,
    ) -> None:
        super().__init__(name, shape, info, codec, parts)
        self.origin = origin

    def place(self, part: Part) -> Part:
        """Where the bytes of a part lie; moved tensors are written elsewhere than they lie."""
        return part

    def raw(
        self, part: Part, start: int, stop: int, context: ReadContext | None = None, slot: int | None = None
    ) -> np.ndarray[Any, Any]:
        """The stored bytes (uint8) of one part that belong to rows start..stop; with `slot` in that buffer
        of the context's."""
        import numpy as np

        part = self.place(part)
        stored = part.stored
        if stored.file is None:
            raise CheckpointError(f"{stored.name} lies in no file")
        if not stored.nbytes or start == stop:
            return np.empty(0, np.uint8)
        if part.view is None:
            ahead = context.buffers.ahead.get((id(stored.file), stored.offset)) if context else None
            if ahead is not None and stop - start == self.rows:
                return ahead
            first, last = self._span(part, start, stop)
            if first == last:
                return np.empty(0, np.uint8)
            if context is None or slot is None:
                buffer = np.empty(last - first, np.uint8)
            else:
                buffer = context.buffers.take(last - first, slot)
            stored.file.read_into(buffer, stored.offset + first)
            return buffer
        slab_nbytes = stored.nbytes // stored.shape[0]
        slab = np.empty(slab_nbytes, np.uint8)
        stored.file.read_into(slab, stored.offset + part.view.index * slab_nbytes)
        itemsize = slab_nbytes // prod(stored.shape[1:])
        shaped = slab.view(f"V{itemsize}" if itemsize > 1 else np.uint8).reshape(stored.shape[1:])
        return np.ascontiguousarray(part.view.of(shaped)[start:stop]).reshape(-1).view(np.uint8)

    def _span(self, part: Part, start: int, stop: int) -> tuple[int, int]:
        if start == 0 and stop == self.rows:
            return 0, part.stored.nbytes
        return self.codec.spans(self.shape, start, stop)[part.key]

    def pull(self, start: int, stop: int, context: ReadContext) -> torch.Tensor:
        raw = {part.key: self.raw(part, start, stop, context) for part in self.parts}
        self.check_finite(raw, context)
        return self.codec.decode(self.shape, start, stop, raw)

    def check_finite(self, raw: Mapping[str, np.ndarray[Any, Any]], context: ReadContext) -> None:
        """Raise CheckpointError where bytes hold NaN or infinity and the context forbids them."""
        if context.allow_nonfinite:
            return
        for key, data in raw.items():
            if not self.codec.finite(key, data):
                raise nonfinite(self, key)

    def sources(self) -> tuple[StoredRef, ...]:
        return (self,)

    def lineage(self) -> dict[str, Any]:
        return {"copy": self.origin}


def nonfinite(ref: StoredRef, key: str) -> CheckpointError:
    """The refusal of a tensor that holds NaN or infinity."""
    stored = next(part.stored for part in ref.parts if part.key == key)
    where = f" in {stored.file.path}" if stored.file else ""
    return CheckpointError(
        f"{stored.name} of {ref.origin} holds NaN or infinity{where}",
        hint="use another parent, or allow it with --set output.allow_nonfinite=true",
    )


class Decision(NamedTuple):
    """What a kernel chose after looking at whole tensors: copy this input as stored, or compute."""

    copy: int | None = None
    reason: str = ""
    metrics: Mapping[str, Any] | None = None


class Kernel(Protocol):
    """The arithmetic of a computed tensor, tile by tile."""

    def decide(self, inputs: Sequence[TensorRef], context: ReadContext) -> Decision:
        """Asked once per tensor before its first tile; may stream through the inputs."""

    def combine(self, tiles: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sums]:
        """One tile of the result from the same rows of every input, with its partial sums."""

    def metrics(self, sums: Sums, numel: int) -> dict[str, Any]:
        """What the summed partials say about the whole tensor."""

    def lineage(self) -> dict[str, Any]: ...


class ComputedRef(TensorRef):
    """A tensor to be computed from the same rows of its inputs and stored in the form of `parts`."""

    __slots__ = ("_decision", "_lock", "_team", "inputs", "kernel")

    def __init__(self, like: TensorRef, inputs: tuple[TensorRef, ...], kernel: Kernel) -> None:
        super().__init__(like.name, like.shape, like.info, like.codec, like.parts)
        self.inputs = inputs
        self.kernel = kernel
        self._decision: Decision | None = None
        self._lock = Lock()
        self._team: Team | None = None

    def with_form(self, codec: Codec, parts: tuple[Part, ...]) -> ComputedRef:
        """The same arithmetic, stored otherwise."""
        other = ComputedRef(self, self.inputs, self.kernel)
        other.codec, other.parts = codec, parts
        return other

    def decision(self, context: ReadContext) -> Decision:
        """Made once, by whichever thread comes first; those that come meanwhile help."""
        while (made := self._decision) is None:
            team = self._team
            if team is not None:
                team.help()
            with self._lock:
                if self._decision is None:
                    self._decision = self._decide(context)
        return made

    def _decide(self, context: ReadContext) -> Decision:
        self._team = Team()
        try:
            return self.kernel.decide(self.inputs, replace(context, team=self._team))
        finally:
            self._team.close()
            self._team = None

    def pull(self, start: int, stop: int, context: ReadContext) -> torch.Tensor:
        choice = self.decision(context).copy
        if choice is not None:
            return self.inputs[choice].pull(start, stop, context)
        tile, sums = self.kernel.combine([each.pull(start, stop, context) for each in self.inputs])
        if context.record:
            context.record(self, start, sums)
        return tile

    @property
    def granule(self) -> int:
        return max(self.codec.granule, *(each.granule for each in self.inputs))

    def tile_rows(self) -> int:
        return max(super().tile_rows(), *(each.tile_rows() for each in self.inputs))

    def sources(self) -> tuple[StoredRef, ...]:
        return tuple(source for each in self.inputs for source in each.sources())

    def lineage(self) -> dict[str, Any]:
        return {**self.kernel.lineage(), "inputs": [each.lineage() for each in self.inputs]}


class Probe(Protocol):
    """A measurement that an operator asks for beside its tensors (e.g. parent distances)."""

    def measure(self) -> Mapping[str, Any]:
        """One row of the manifest's `measurements`."""


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization_config of a config, empty where there is none."""
    found = config.get("quantization_config")
    return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Checkpoint:
    """Logical names to refs in natural order, with the config and side files they travel with."""

    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any]
    architecture: Architecture
    side_files: Mapping[str, Path]
    label: str
    inputs: tuple[Source, ...]
    history: tuple[Mapping[str, Any], ...] = ()
    """The steps that made it, oldest first: op, params and the labels of its inputs."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the base that are not here, with the reason."""
    events: tuple[Event, ...] = ()
    probes: tuple[Probe, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    """Small files that steps add to the output, by name."""

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors.values())

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The config's quantization_config, empty where there is none."""
        return quantization_of(self.config)

    def replace(self, **changes: Any) -> Checkpoint:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def save(self, folder: str | Path, **options: Any) -> SaveResult:
        """Write the checkpoint to `folder`; options are those of `surgery.stream.save.SaveOptions`."""
        from surgery.stream.save import SaveOptions, save

        return save(self, Path(folder), SaveOptions(**options))
