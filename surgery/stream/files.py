"""Files that tensors lie in: opened on first use, read by position, shared by threads."""

from __future__ import annotations

import os
import re
import weakref
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np


HASHED = 8 << 20
"""Bytes hashed at a time."""
_DIGITS = re.compile(r"(\d+)")
_LEFT_BEHIND = re.compile(
    r"\.(safetensors|bin|pt|pth|gguf|onnx|msgpack|h5)$|\.index\.json$"
    r"|^(README\.md|SHA256SUMS|surgery_(manifest|experts|keep)\.json|surgery_(recipe\.yaml|report\.html)"
    r"|surgery-(journal\.jsonl|lock))$",
    re.I,
)


def natural_key(name: str) -> list[str | int]:
    """Sort key that puts layer 2 before layer 10."""
    return [int(piece) if i % 2 else piece for i, piece in enumerate(_DIGITS.split(name))]


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = sha256()
    with open(path, "rb") as file:
        while data := file.read(HASHED):
            digest.update(data)
    return digest.hexdigest()


def travels(name: str) -> bool:
    """Whether a file of a model folder goes with its weights: tokenizer, template, generation config,
    remote code. `name` is relative to the folder, with slashes."""
    path = PurePosixPath(name)
    hidden = any(piece.startswith(".") for piece in path.parts)
    nested_weights = len(path.parts) > 1 and path.parts[0] in ("original", "metal", "onnx")
    return not (hidden or nested_weights or _LEFT_BEHIND.search(path.name))


class DataFile:
    """A local shard. `header_hash` (SHA-256 of its header bytes) identifies its layout, `etag` its content
    where it came from the hub."""

    local = True

    def __init__(self, path: Path, header: bytes, etag: str | None = None) -> None:
        self.path = path
        self.name = path.name
        status = os.stat(path)
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns
        self.header_hash = sha256(header).hexdigest()
        self.etag = etag
        self._descriptor: int | None = None
        self._lock = Lock()

    def descriptor(self) -> int:
        """The open file descriptor; it is closed with this object."""
        with self._lock:
            if self._descriptor is None:
                try:
                    self._descriptor = os.open(self.path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"cannot open {self.path}: {error.strerror}") from error
                weakref.finalize(self, os.close, self._descriptor)
            return self._descriptor

    def read_into(self, buffer: np.ndarray[Any, Any], offset: int) -> None:
        """Fill a uint8 buffer with the bytes from `offset` on."""
        view = buffer.data
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self.descriptor(), [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"reading {self.path} at byte {offset + done} failed: {error.strerror}",
                    hint="check the disk, then run the same command again: it resumes",
                ) from error
            if got == 0:
                raise CheckpointError(
                    f"{self.path} ends at byte {offset + done}, though its header promises more",
                    hint="the file changed while it was read; fetch it again",
                )
            done += got

    def identity(self) -> dict[str, Any]:
        """What a resumed run compares: another size, time or header is another input. A file of the hub
        is known by its etag, wherever it is read from."""
        if self.etag:
            return {"size": self.size, "etag": self.etag}
        return {"size": self.size, "mtime_ns": self.mtime_ns, "header_sha256": self.header_hash}


@dataclass(frozen=True)
class Source:
    """One opened model: what it was asked for as, where it lies, and its shards."""

    label: str
    model: str
    """The path or hub id it was opened by."""
    folder: Path | None
    """None for a model that is not, or not whole, on this machine."""
    revision: str | None
    files: tuple[DataFile, ...]
    notes: tuple[str, ...] = ()
    """What was odd about the folder but did not stop it from being opened."""

    @property
    def local(self) -> bool:
        """Whether every shard is on this machine."""
        return all(file.local for file in self.files)

    def identity(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "revision": self.revision,
            "files": {file.name: file.identity() for file in self.files},
        }


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file holds it, or (with no file) as it is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: DataFile | None = field(default=None, compare=False, repr=False)
    offset: int = field(default=0, compare=False)
