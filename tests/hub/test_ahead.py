"""Reading ahead: what jobs will read is what they read, in few requests, whatever the layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import numpy as np
import packed_folders
import pytest
from hub_client import Client, pieces, weights_of

from surgery.codecs.schemes import IntScheme
from surgery.operators.merge.aoe import AssemblyOfExperts
from surgery.stream.ahead import LEAST_REQUEST, ReadAhead, ahead_bytes
from surgery.stream.jobs import compile_jobs
from surgery.stream.reads import Extent, reads_of, small_runs
from surgery.stream.remote import RemoteFile
from surgery.stream.source import open_checkpoint
from surgery.stream.targets import pack, plan_targets

MADE: dict[str, Callable[..., Path]] = {
    "deepseek_v3": factories.deepseek_v3,
    "llama": factories.llama,
    "qwen3_moe": factories.qwen3_moe,
    "gpt_oss_bf16": factories.gpt_oss_bf16,
    "gpt_oss_mxfp4": factories.gpt_oss_mxfp4,
    "llama4_text": factories.llama4_text,
    "llama_nf4": lambda folder, seed: packed_folders.nf4(folder)[0],
    "llama_gptq": lambda folder, seed: packed_folders.integers(folder, "gptq", IntScheme(4, 32))[0],
}


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("name", MADE)
def test_jobs_read_what_was_foreseen_and_nothing_else(
    client: Client, tmp_path: Path, name: str, weight: float
) -> None:
    """Nothing is asked for twice, and nothing beyond the planner's ranges, on every layout."""
    folders = {"a": MADE[name](tmp_path / "a", 1), "b": MADE[name](tmp_path / "b", 2)}
    for label, folder in folders.items():
        client.server.add(f"org/{label}", folder, label * 40)
    params: dict[str, Any] = {"base": "a", "weights": {"b": weight}}
    if weight == 1.0 and not name.startswith("llama"):
        params["select"] = ("routed_expert",)
    merge = AssemblyOfExperts(**params)
    local = merge.apply({label: open_checkpoint(folder, label) for label, folder in folders.items()})
    hub = client.hub()
    remote = merge.apply({label: open_checkpoint(f"org/{label}", label, hub) for label in folders})
    opening = len(client.server.seen)
    found = remote.save(tmp_path / "out")
    assert weights_of(found.folder) == weights_of(local.save(tmp_path / "local").folder)
    foreseen: dict[str, list[tuple[int, int]]] = {}
    for shard in pack(plan_targets(local.tensors.values()), 5_000_000_000):
        for job in compile_jobs(shard):
            for file, start, nbytes in reads_of(job):
                key = f"/org/{file.path.parent.name}/{file.name}"
                foreseen.setdefault(key, []).append((start, start + nbytes))
    asked: dict[str, list[tuple[int, int]]] = {}
    for each in client.server.seen[opening:]:
        assert each.range
        asked.setdefault(each.path.partition("?")[0], []).append(each.range)
    assert set(asked) == {key for key, ranges in foreseen.items() if pieces(ranges)[0]}
    for key, ranges in asked.items():
        total, joined = pieces(ranges)
        assert joined == pieces(foreseen[key])[1]
        assert total == sum(stop - start for start, stop in joined)


def test_scales_that_lie_together_come_together(client: Client, tmp_path: Path) -> None:
    """Published FP8 shards have all scales first and experts in another order than they are written in;
    a request for each scale would double the requests."""
    folder = factories.deepseek_v3(
        tmp_path / "m", 4, layers=2, experts=120, mtp=False, shards=1, split_scales=False
    )
    reorder(folder)
    client.server.add("org/m", folder, "3" * 40)
    remote = client.open("org/m")
    scales = [name for name in tensors_of(remote) if name.endswith("_scale_inv")]
    opening = len(client.server.seen)
    saved = remote.save(tmp_path / "out")
    assert weights_of(saved.folder) == weights_of(open_checkpoint(folder).save(tmp_path / "l").folder)
    ranges = [each.range for each in client.server.seen[opening:] if each.range]
    assert len(scales) > 200
    assert len(ranges) < 6
    whole = sum(ref.nbytes for ref in remote.tensors.values())
    assert sum(stop - start for start, stop in ranges) == whole


def tensors_of(checkpoint: Any) -> list[str]:
    return [part.stored.name for ref in checkpoint.tensors.values() for part in ref.parts]


def reorder(folder: Path) -> None:
    """Write the folder's one shard as safetensors' own writer does: by falling element size, then name."""
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    save_file(load_file(path), path, {"format": "pt"})


def test_no_room_no_reading_ahead() -> None:
    assert ahead_bytes(256_000_000, 4 << 20) == 128_000_000
    assert ahead_bytes(1 << 30, 1 << 29) == 1 << 29
    assert ahead_bytes(256_000_000, 256_000_000 - LEAST_REQUEST + 1) == 0


class Memory(RemoteFile):
    """A remote file in memory, which counts what is fetched."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.window = None
        self.fetched: list[tuple[int, int]] = []

    def fetch(self, view: memoryview, offset: int) -> None:
        self.fetched.append((offset, offset + len(view)))
        view[:] = self.data[offset : offset + len(view)]

    class _Transfer:
        def cancel(self) -> None: ...

        def resume(self) -> None: ...

    transfer = _Transfer()  # type: ignore[assignment]


def test_small_runs_join_neighbours_in_any_order() -> None:
    file, other = Memory(b""), Memory(b"")
    large = 2 << 20
    jobs: list[list[Extent]] = [
        [(file, 30, 10), (file, 100, 5)],
        [(file, 10, 20), (other, 40, 10)],
        [(file, 40, large), (file, 30, 10)],
        [(other, 0, 0)],
    ]
    runs = small_runs(jobs, 1 << 23)
    assert set(runs) == {(id(file), 10), (id(file), 30)}
    run = runs[id(file), 10]
    assert runs[id(file), 30] is run
    assert (run.start, run.stop, run.users) == (10, 40, 3)
    parts = small_runs([[(file, 100 * number, 100)] for number in range(50)], 1000)
    spans = Counter((run.start, run.stop) for run in parts.values())
    assert spans == {(1000 * number, 1000 * (number + 1)): 10 for number in range(5)}


@pytest.mark.parametrize("seed", range(8))
def test_any_reads_are_right_whatever_was_planned(seed: int) -> None:
    """Reads of other places than were foreseen, across blocks, before and behind them, are still right."""
    rng = np.random.default_rng([seed, int(np.random.default_rng().integers(1 << 30))])
    file = Memory(rng.bytes(40_000))
    ahead = ReadAhead([], 1 << 20, 2)
    ahead._request = 3000
    planned = []
    with ahead.attached([file]):
        for _ in range(40):
            extents: list[Extent] = []
            for _ in range(int(rng.integers(0, 4))):
                start = int(rng.integers(0, 39_000))
                extents.append((file, start, int(rng.integers(1, min(5000, 40_000 - start)))))
            runs = small_runs([extents], 3000)
            assert ahead._add(extents, runs)
            planned.append(extents)
        for number, extents in enumerate(planned):
            if rng.random() < 0.3:
                ahead.finished(number)
                continue
            ahead.starting(number)
            for _, start, nbytes in extents:
                low = max(0, start - int(rng.integers(0, 3) * 700))
                high = min(40_000, start + nbytes + int(rng.integers(0, 3) * 700))
                buffer = np.zeros(high - low, np.uint8)
                file.read_into(buffer, low)
                assert buffer.tobytes() == file.data[low:high]
            ahead.finished(number)
        assert ahead._used == ahead._kept == 0
        assert not any(shelf.blocks for shelf in ahead._shelves.values())
    assert file.window is None
