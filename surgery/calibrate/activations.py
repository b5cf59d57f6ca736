"""Hidden states of all batches between two layers, in host memory or in a mapped file; and snapshots of them.

A snapshot is what a walk needs to go on after a kill: the hidden states in front of a layer, as they are, and
the state of its steps. Two generations are kept at most, so that a kill while writing one leaves the other.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from surgery.stream.writer import disk_error, write_json

GENERATIONS = 2
_NAME = re.compile(r"snapshot-(\d{5})\.json")
_PIECE = 64 << 20


class Activations:
    """Hidden states [batch, tokens, hidden] of several batches in one buffer.

    `file` puts the buffer into a mapped file instead of memory; memory is page-locked where the walk computes
    on a GPU, so that copies need not wait.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        hidden: int,
        dtype: torch.dtype,
        *,
        file: Path | None,
        pin: bool,
    ) -> None:
        self.shapes = [(*shape, hidden) for shape in shapes]
        self._begins = [0]
        for shape in self.shapes:
            self._begins.append(self._begins[-1] + prod(shape))
        total = self._begins[-1]
        if file is None:
            self.flat = torch.empty(total, dtype=dtype, pin_memory=pin)
        else:
            _reserve(file, total * (torch.finfo(dtype).bits // 8))
            self.flat = torch.from_file(str(file), shared=True, size=total, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes

    def get(self, batch: int, device: torch.device) -> torch.Tensor:
        return self._slot(batch).to(device, non_blocking=True)

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        self._slot(batch).copy_(hidden)

    def _slot(self, batch: int) -> torch.Tensor:
        return self.flat[self._begins[batch] : self._begins[batch + 1]].view(self.shapes[batch])


def _reserve(file: Path, nbytes: int) -> None:
    """Take the disk space now: a mapped file that meets a full disk later kills the process."""
    try:
        with open(file, "wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, max(nbytes, 1))
    except OSError as error:
        raise disk_error(error, file) from error


def write_snapshot(folder: Path, layer: int, hidden: Activations, state: Mapping[str, Any]) -> None:
    """Keep what is needed to go on with `layer`. The file with the state is renamed into place last."""
    _clear(folder)
    data = folder / f"snapshot-{layer:05d}.bin"
    text = folder / f"snapshot-{layer:05d}.json"
    try:
        raw = hidden.flat.view(torch.uint8).numpy()
        with open(data, "wb") as file:
            for begin in range(0, raw.size, _PIECE):
                file.write(raw[begin : begin + _PIECE].data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, data) from error
    write_json(text, {"layer": layer, "bytes": raw.size, **state})


def _clear(folder: Path) -> None:
    """Leave the newest whole snapshot alone: with the one to come there are two."""
    kept = _snapshots(folder)[-1:]
    for path in folder.glob("snapshot-*"):
        if path.with_suffix(".json") not in kept:
            path.unlink()


def read_states(folder: Path) -> list[dict[str, Any]]:
    """The states of all whole snapshots, the newest first."""
    states = []
    for path in reversed(_snapshots(folder)):
        try:
            states.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            continue
    return states


def fill_from(folder: Path, state: Mapping[str, Any], hidden: Activations) -> bool:
    """Put the hidden states of a snapshot into `hidden`; False where its file is not whole."""
    data = folder / f"snapshot-{state['layer']:05d}.bin"
    if not (data.is_file() and data.stat().st_size == state["bytes"] == hidden.nbytes):
        return False
    with open(data, "rb") as file:
        file.readinto(hidden.flat.view(torch.uint8).numpy().data)
    return True


def _snapshots(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("snapshot-*.json") if _NAME.fullmatch(path.name))
