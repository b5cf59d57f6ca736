"""Hidden states in memory and in files, and snapshots that survive whatever a kill leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.calibrate.activations import (
    GENERATIONS,
    Activations,
    fill_from,
    read_states,
    write_snapshot,
)
from surgery.errors import SurgeryError

SHAPES = [(2, 5), (1, 3), (3, 1)]
CPU = torch.device("cpu")


def read_snapshot(folder: Path, hidden: Activations) -> dict[str, Any] | None:
    """The newest snapshot whose hidden states are whole, put into `hidden`."""
    return next((state for state in read_states(folder) if fill_from(folder, state, hidden)), None)


def make(file: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> Activations:
    return Activations(SHAPES, 7, dtype, file=file, pin=False)


def fill(activations: Activations, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(*shape, 7, generator=generator).to(activations.flat.dtype) for shape in SHAPES]
    for number, each in enumerate(values):
        activations.put(number, each)
    return values


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_do_not_overlap(tmp_path: Path, on_disk: bool, dtype: torch.dtype) -> None:
    held = make(tmp_path / "h.bin" if on_disk else None, dtype)
    values = fill(held, 1)
    assert all(torch.equal(held.get(number, CPU), each) for number, each in enumerate(values))
    assert held.nbytes == 16 * 7 * dtype.itemsize
    assert (tmp_path / "h.bin").exists() == on_disk
    if on_disk:
        assert (tmp_path / "h.bin").stat().st_size == held.nbytes


def test_snapshots_read_back(tmp_path: Path) -> None:
    values = fill(held := make(), 1)
    write_snapshot(tmp_path, 4, held, {"a": [1, 2.5]})
    other = make(tmp_path / "other.bin")
    assert read_snapshot(tmp_path, other) == {"layer": 4, "bytes": held.nbytes, "a": [1, 2.5]}
    assert all(torch.equal(other.get(number, CPU), each) for number, each in enumerate(values))


def test_the_newest_of_two_generations(tmp_path: Path) -> None:
    for layer in (1, 2, 3, 10, 11):
        fill(held := make(), layer)
        write_snapshot(tmp_path, layer, held, {})
        assert len(list(tmp_path.glob("snapshot-*.json"))) <= GENERATIONS
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "snapshot-00010.bin", "snapshot-00010.json", "snapshot-00011.bin", "snapshot-00011.json",
    ]  # fmt: skip
    state = read_snapshot(tmp_path, other := make())
    assert state is not None and state["layer"] == 11
    assert torch.equal(other.get(0, CPU), fill(make(), 11)[0])


@pytest.mark.parametrize("damage", ["no state", "torn state", "no data", "short data", "temporary"])
def test_a_kill_while_writing_leaves_the_one_before(tmp_path: Path, damage: str) -> None:
    values = fill(held := make(), 1)
    write_snapshot(tmp_path, 1, held, {})
    fill(held, 2)
    write_snapshot(tmp_path, 2, held, {})
    data, text = tmp_path / "snapshot-00002.bin", tmp_path / "snapshot-00002.json"
    if damage == "no state":
        text.unlink()
    elif damage == "torn state":
        text.write_text(text.read_text()[:10])
    elif damage == "no data":
        data.unlink()
    elif damage == "short data":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        text.rename(text.with_suffix(".tmp"))
    state = read_snapshot(tmp_path, other := make())
    assert state is not None and state["layer"] == 1
    assert all(torch.equal(other.get(number, CPU), each) for number, each in enumerate(values))


def test_nothing_whole_is_nothing(tmp_path: Path) -> None:
    fill(held := make(), 3)
    before = held.flat.clone()
    assert read_snapshot(tmp_path, held) is None
    (tmp_path / "snapshot-00001.json").write_text(json.dumps({"layer": 1, "bytes": 8}))
    (tmp_path / "snapshot-00001.bin").write_bytes(b"12345678")
    assert read_snapshot(tmp_path, held) is None
    assert torch.equal(held.flat, before)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    fill(held := make(), 3)
    with pytest.raises(SurgeryError, match="snapshot-00001"):
        write_snapshot(tmp_path / "gone", 1, held, {})
