"""Tensors that a step of a walk has made: kept in files of their own until the output is written.

A spool file is a safetensors file with the parts of some tensors in their final stored form; it appears under
its name when it is whole. What is written to the output are copies of its bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import Codec
from surgery.errors import CheckpointError
from surgery.stream.checkpoint import ComputedRef, Decision, Part, ReadContext, StoredRef, Sums, TensorRef
from surgery.stream.files import DataFile, StoredTensor
from surgery.stream.header import build_header, read_header
from surgery.stream.recode import stored_as
from surgery.stream.reshape import MovedRef
from surgery.stream.writer import disk_error

if TYPE_CHECKING:
    import numpy as np
    import torch

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Made:
    """A tensor as a step has made it: whose place it takes, its form, and the bytes of each part."""

    ref: TensorRef
    codec: Codec
    raw: Mapping[str, np.ndarray[Any, Any]]


class MadeRef(MovedRef):
    """A tensor that lies in a spool file. `origin` is the operator that made it."""

    __slots__ = ()

    def __init__(
        self, ref: TensorRef, codec: Codec, op: str, parts: tuple[Part, ...], places: tuple[Part, ...]
    ) -> None:
        StoredRef.__init__(self, ref.name, ref.shape, ref.info, codec, parts, op)
        self.places = places

    def lineage(self) -> dict[str, Any]:
        return {"op": self.origin}

    @property
    def lost(self) -> bool:
        """Whether the files are gone."""
        return any(part.stored.file is None for part in self.places)

    def place(self, part: Part) -> Part:
        found = super().place(part)
        if found.stored.file is None:
            raise CheckpointError(
                f"{self.name} was made by {self.origin} from activations: only a walk can make it again"
            )
        return found


@dataclass(frozen=True)
class Pending:
    """The kernel that stands for a tensor which a walk is going to make."""

    op: str

    def decide(self, inputs: Sequence[TensorRef], context: ReadContext) -> Decision:
        return Decision()

    def combine(self, tiles: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sums]:
        return tiles[0], ()

    def metrics(self, sums: Sums, numel: int) -> dict[str, Any]:
        return {}

    def lineage(self) -> dict[str, Any]:
        return {"op": self.op}


def pending_ref(ref: TensorRef, codec: Codec, op: str) -> TensorRef:
    """The outline of a tensor that `op` is going to make in the form of `codec`."""
    return ComputedRef(ref, (ref,), Pending(op)).with_form(codec, stored_as(ref, codec).parts)


def write_spool(path: Path, tensors: Sequence[Made]) -> str:
    """Write the parts of `tensors` to `path`; the SHA-256 of the file. Raises PlanError on a full disk."""
    import numpy as np

    entries, pieces = [], []
    for made in tensors:
        for spec in made.codec.parts(made.ref.shape):
            entries.append((_name(made.ref.name, spec.key), spec.dtype, spec.shape))
            pieces.append(made.raw[spec.key])
    temporary = path.with_suffix(".tmp")
    digest = sha256()
    try:
        with open(temporary, "wb") as file:
            for piece in (np.frombuffer(build_header(entries, {}), np.uint8), *pieces):
                data = memoryview(piece)  # type: ignore[arg-type]
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError as error:
        raise disk_error(error, path) from error
    return digest.hexdigest()


def read_spool(path: Path) -> dict[str, StoredTensor]:
    """The stored parts in a spool file, by name. Raises CheckpointError where it is not whole."""
    header = read_header(path)
    file = DataFile(path, header.raw)
    return {
        entry.name: StoredTensor(entry.name, entry.dtype, entry.shape, entry.nbytes, file, entry.offset)
        for entry in header.entries
    }


def made_ref(ref: TensorRef, codec: Codec, op: str, spool: Mapping[str, StoredTensor] | None) -> MadeRef:
    """The tensor that `op` made in place of `ref`, in the files that `spool` was read from; None where they
    are gone, so that it can be told of but not read."""
    parts: list[Part] = []
    places: list[Part] = []
    for spec, part in zip(codec.parts(ref.shape), stored_as(ref, codec).parts, strict=True):
        stored = StoredTensor(_name(ref.name, spec.key), spec.dtype, spec.shape, part.stored.nbytes)
        if spool is not None:
            found = spool.get(stored.name)
            if found is None or (found.dtype, found.shape) != (stored.dtype, stored.shape):
                raise CheckpointError(f"the work folder lacks {stored.name}", hint="restart with --fresh")
            stored = found
        places.append(Part(part.key, stored, None))
        out = part.stored if part.view else replace(part.stored, file=stored.file, offset=stored.offset)
        parts.append(Part(part.key, out, part.view))
    return MadeRef(ref, codec, op, tuple(parts), tuple(places))


def _name(tensor: str, key: str) -> str:
    return f"{tensor}#{key}"
