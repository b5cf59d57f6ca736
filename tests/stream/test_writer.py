"""One shard on its way to disk: order, backpressure, and what becomes of an error, without any model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from surgery.errors import SurgeryError
from surgery.stream import writer as writer_module
from surgery.stream.writer import ShardWriter

PIECE = 1000


def pieces(count: int) -> list[np.ndarray[Any, Any]]:
    return list(np.random.default_rng().integers(0, 256, (count, PIECE), dtype=np.uint8))


def opened(path: Path, count: int, told: list[str | None], **options: Any) -> ShardWriter:
    return ShardWriter(path, b"head", 4 + count * PIECE, hashed=True, finished=told.append, **options)


@pytest.mark.parametrize("last", [False, True])
def test_pieces_in_any_order_from_several_threads(
    last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "LAG", 3 * PIECE)
    monkeypatch.setattr(writer_module, "READ_BACK", 333)
    data, told = pieces(60), []
    shard = opened(tmp_path / "s", len(data), told, last=last)
    order = np.random.default_rng().permutation(len(data))

    def work(mine: np.ndarray[Any, Any]) -> None:
        for index in mine:
            shard.write(4 + int(index) * PIECE, data[index])

    threads = [Thread(target=work, args=(order[start::3],)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    shard.join()
    whole = b"head" + b"".join(piece.tobytes() for piece in data)
    assert (tmp_path / "s").read_bytes() == whole and told == [hashlib.sha256(whole).hexdigest()]


def test_a_last_shard_is_not_written_far_ahead_of_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "LAG", 3 * PIECE)
    free, told = Event(), []
    read = os.preadv

    def slow(*arguments: Any) -> int:
        free.wait(20)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    data = pieces(20)
    shard = opened(tmp_path / "s", len(data), told, last=True)
    done: list[int] = []

    def work() -> None:
        for index, piece in enumerate(data):
            shard.write(4 + index * PIECE, piece)
            done.append(index)

    thread = Thread(target=work)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and len(done) == 3
    free.set()
    thread.join(20)
    shard.join()
    assert len(done) == 20 and len(told) == 1


@pytest.mark.parametrize("last", [False, True])
def test_an_error_of_the_hash_frees_the_writers_and_is_the_one_that_is_told(
    last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "LAG", 2 * PIECE)

    def broken(*arguments: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    told: list[str | None] = []
    shard = opened(tmp_path / "s", 30, told, last=last)

    def work() -> None:
        for index, piece in enumerate(pieces(20)):
            shard.write(4 + index * PIECE, piece)

    thread = Thread(target=work)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    shard.no_more()
    with pytest.raises(SurgeryError, match="Input/output error"):
        shard.join()
    assert not told and not (tmp_path / "s").exists()


def test_bytes_that_nobody_wrote_are_missed(tmp_path: Path) -> None:
    told: list[str | None] = []
    shard = opened(tmp_path / "s", 3, told)
    shard.write(4 + PIECE, pieces(1)[0])
    shard.no_more()
    with pytest.raises(SurgeryError, match="lacks bytes from 4 on"):
        shard.join()
    assert not told
