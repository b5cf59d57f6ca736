"""Which model a walk was taken on."""

from __future__ import annotations

import json
from hashlib import sha256

from surgery.stream.checkpoint import Checkpoint
from surgery.stream.files import DataFile

SAMPLE = 128
"""Bytes of each tensor that are looked at to tell models apart."""


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """The same for the same weights in files of the same names, made by the same steps, wherever they lie.

    Of every file its size and its header, and what tells models of one shape apart: the etag of a file of
    the hub, of others some bytes out of the middle of every tensor.
    """
    digest = sha256()
    for source in checkpoint.inputs:
        for file in source.files:
            digest.update(f"{file.name}:{file.size}:{file.header_hash}:{file.etag or ''}\n".encode())
    places = {
        (part.stored.file.name, part.stored.offset, part.stored.nbytes): part.stored.file
        for ref in checkpoint.tensors.values()
        for source_ref in ref.sources()
        for part in map(source_ref.place, source_ref.parts)
        if part.stored.file is not None and not part.stored.file.etag and part.stored.nbytes
    }
    for (_, offset, nbytes), file in sorted(places.items(), key=lambda each: each[0]):
        digest.update(_bytes_at(file, offset, nbytes))
    for step in checkpoint.history:
        kept = {key: value for key, value in step.items() if key not in ("parents", "result")}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


def _bytes_at(file: DataFile, offset: int, nbytes: int) -> bytes:
    import numpy as np

    size = min(SAMPLE, nbytes)
    buffer = np.empty(size, np.uint8)
    file.read_into(buffer, offset + (nbytes - size) // 2)
    return buffer.tobytes()
