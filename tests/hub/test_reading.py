"""Models on the hub: the same tensors as in the folder, for the bytes that are needed and no others."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import loopback_hub
import numpy as np
import pytest
import torch
from hub_client import BASE, CHIMERA, HALF, REASONER, Client, local_child, pieces, weights_of
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.numpy import save_file

from surgery.errors import CheckpointError, InterruptedRun, PlanError
from surgery.stream.ahead import LARGEST_REQUEST, LEAST_REQUEST, ahead_bytes
from surgery.stream.checkpoint import Checkpoint, StoredRef
from surgery.stream.glance import glance
from surgery.stream.source import open_checkpoint


def needed(child: Checkpoint, label: str) -> dict[str, list[tuple[int, int]]]:
    """The ranges of a parent's shards that hold what a child of copies takes from it."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for ref in child.tensors.values():
        assert isinstance(ref, StoredRef)
        if ref.origin == label:
            for part in ref.parts:
                assert part.stored.file is not None
                start = part.stored.offset
                ranges.setdefault(part.stored.file.name, []).append((start, start + part.stored.nbytes))
    return ranges


def test_a_model_on_the_hub_is_the_one_in_the_folder(client: Client, parents: dict[str, Path]) -> None:
    remote, local = client.open(BASE, "m"), open_checkpoint(parents["base"], "m")
    assert remote.config == local.config
    assert remote.architecture == local.architecture
    assert {name: path.read_bytes() for name, path in remote.side_files.items()} == {
        name: path.read_bytes() for name, path in local.side_files.items()
    }
    assert list(remote.tensors) == list(local.tensors)
    for name, ref in local.tensors.items():
        assert remote.tensors[name].parts == ref.parts
        assert torch.equal(remote.tensors[name].read(), ref.read()), name
    source = remote.inputs[0]
    assert source.revision == "b" * 40
    assert not source.local
    assert not remote.events
    repo = client.server.repos[BASE]
    assert source.identity()["files"] == {
        file.name: {"size": len(repo.files[file.name]), "etag": repo.etag(file.name)} for file in source.files
    }


def test_opening_asks_once_for_each_file_and_never_gives_the_token_away(client: Client) -> None:
    remote = client.open(BASE)
    for ref in remote.tensors.values():
        ref.read()
    server = client.server
    asked = Counter(each.name for each in server.of("HEAD"))
    assert set(asked.values()) == {1}
    assert set(asked) == {*remote.side_files, "model.safetensors.index.json"} | {
        file.name for file in remote.inputs[0].files
    }
    assert [each.path.partition("?")[0] for each in server.seen if "/api/" in each.path] == [
        f"/api/models/{BASE}"
    ]
    assert all("b" * 40 in each.path for each in server.of("HEAD"))  # the commit, not the branch
    at_storage = [each for each in server.seen if each.host == "storage"]
    assert at_storage
    for each in at_storage:
        assert not each.authorized
        assert loopback_hub.TOKEN not in json.dumps([each.path, each.headers])
    assert all(each.authorized for each in server.seen if each.host == "endpoint")


def test_shards_that_the_endpoint_serves_itself_are_read_with_the_token(
    client: Client, parents: dict[str, Path]
) -> None:
    repo = client.server.repos[BASE]
    repo.private = True
    repo.inline = frozenset(name for name in repo.files if name.endswith(".safetensors"))
    saved = client.open(BASE).tensors
    for name, ref in open_checkpoint(parents["base"]).tensors.items():
        assert torch.equal(saved[name].read(), ref.read())
    assert not client.server.of("GET", "storage")


def test_a_chimera_reads_the_experts_of_one_and_the_rest_of_the_other(
    client: Client, parents: dict[str, Path], tmp_path: Path
) -> None:
    child = client.child()
    opening = len(client.server.seen)
    result = child.save(tmp_path / "out")
    wanted = local_child(parents).save(tmp_path / "local")
    assert weights_of(result.folder) == weights_of(wanted.folder)
    during = client.server.seen[opening:]
    assert {each.host for each in during} == {"storage"}
    for label, repo in (("base", BASE), ("reasoner", REASONER)):
        for name, ranges in needed(child, label).items():
            asked = [each.range for each in during if each.path.startswith(f"/{repo}/{name}?")]
            total, joined = pieces([each for each in asked if each])
            assert joined == pieces(ranges)[1]
            assert total == sum(stop - start for start, stop in ranges)  # no byte twice
    told = result.manifest["run"]["remote"]
    assert told["requests"] == len(client.server.seen) - len(
        [each for each in client.server.seen if each.name in child.side_files]
    ) - 2 * len([1 for each in client.server.of("HEAD") if each.name.endswith(".index.json")])
    assert told["retries"] == 0


@pytest.mark.parametrize("params", [HALF, HALF | {"threshold": 1e-3}, CHIMERA | {"threshold": 1e-3}])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_computed_from_the_hub_equals_what_is_computed_from_folders(
    client: Client, parents: dict[str, Path], tmp_path: Path, params: dict[str, Any], threads: int
) -> None:
    want = local_child(parents, params).save(tmp_path / "local", shard_bytes=1 << 20)
    found = client.child(params).save(tmp_path / "out", shard_bytes=1 << 20, threads=threads)
    assert weights_of(found.folder) == weights_of(want.folder)
    names = {path.name for path in want.folder.iterdir()}
    assert {path.name for path in found.folder.iterdir()} == names
    for manifest in (want.manifest, found.manifest):
        assert all(row["rms"] is None or row["weights"] for row in manifest["measurements"])


def test_samples_are_not_fetched_for_their_own_sake(client: Client, tmp_path: Path) -> None:
    rows = client.child().save(tmp_path / "out").manifest["measurements"]
    assert rows
    assert all(row["rms"] is None and row["weights"] == 0 for row in rows)


@pytest.fixture
def large(client: Client, tmp_path: Path) -> Path:
    """One shard of 53 MB, of which no tensor is a multiple of a request."""
    rng = np.random.default_rng()
    folder = tmp_path / "large"
    folder.mkdir()
    sizes = {"a": 11_000_003, "b": 7, "c": 23_000_001, "d": 900_001, "e": 18_000_000}
    tensors = {f"model.{name}": rng.integers(0, 255, size, np.uint8) for name, size in sizes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "none"}')
    client.server.add("org/large", folder, "1" * 40)
    return folder


def test_large_copies_come_in_large_requests_within_the_memory(
    client: Client, large: Path, tmp_path: Path
) -> None:
    budget = 256_000_000
    ahead = ahead_bytes(budget, 4 << 20)
    written = 0
    outstanding: list[int] = []
    asked = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal written
        written = done

    def watch(handler: loopback_hub.Handler, seen: loopback_hub.Seen) -> bool:
        nonlocal asked
        if seen.host == "storage" and seen.range:
            asked += seen.range[1] - seen.range[0]
            outstanding.append(asked - written)
        return False

    remote = client.open("org/large")
    client.server.seen.clear()
    client.server.faults.append(watch)
    result = remote.save(tmp_path / "out", memory_bytes=budget, threads=2, progress=progress)
    want = open_checkpoint(large).save(tmp_path / "local")
    assert weights_of(result.folder) == weights_of(want.folder)
    sizes = sorted(stop - start for start, stop in client.server.data_ranges("model.safetensors"))
    assert sum(sizes) == sum(ref.nbytes for ref in remote.tensors.values())
    assert LEAST_REQUEST <= sizes[-1] <= LARGEST_REQUEST
    assert len(sizes) <= 8  # 53 MB in requests of 8.4 MB
    assert max(outstanding) <= ahead + 2 * (4 << 20)


def test_a_small_budget_holds_back_what_is_read_ahead(
    client: Client, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for two requests no more than two are ever in hand, and the run still comes to its end."""
    room = 2 * LEAST_REQUEST + (LEAST_REQUEST * 2) // 3 + 4
    monkeypatch.setattr("surgery.stream.save.ahead_bytes", lambda memory, peak: room)
    asked = written = most = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal written
        written = done

    def watch(handler: loopback_hub.Handler, seen: loopback_hub.Seen) -> bool:
        nonlocal asked, most
        if seen.host == "storage" and seen.range:
            asked += seen.range[1] - seen.range[0]
            most = max(most, asked - written)
        return False

    remote = client.open("org/large")
    client.server.faults.append(watch)
    result = remote.save(tmp_path / "out", threads=2, progress=progress)
    assert weights_of(result.folder) == weights_of(open_checkpoint(large).save(tmp_path / "local").folder)
    assert most <= room + 3 * (4 << 20)


def test_a_budget_without_room_reads_directly(
    client: Client, parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.stream.save.ahead_bytes", lambda memory, peak: 0)
    found = client.child(HALF).save(tmp_path / "out")
    assert weights_of(found.folder) == weights_of(local_child(parents, HALF).save(tmp_path / "l").folder)


def test_cached_shards_are_read_from_the_cache(
    client: Client, parents: dict[str, Path], tmp_path: Path
) -> None:
    server = client.server
    before = client.open(REASONER).inputs[0].identity()
    shards = sorted(name for name in server.repos[REASONER].files if name.endswith(".safetensors"))
    options: dict[str, Any] = {"endpoint": server.endpoint, "cache_dir": client.cache, "token": False}
    hf_hub_download(REASONER, shards[0], **options)
    server.seen.clear()
    child = client.child()
    assert [file.local for file in child.inputs[1].files] == [True, *[False] * (len(shards) - 1)]
    assert child.inputs[1].identity() == before
    result = child.save(tmp_path / "out")
    assert weights_of(result.folder) == weights_of(local_child(parents).save(tmp_path / "local").folder)
    assert not [each for each in server.seen if each.path.startswith((f"/{REASONER}/{shards[0]}",))]
    assert not [each for each in server.of("HEAD", name=shards[0]) if REASONER in each.path]
    # The whole model there: nothing is asked at all, and it is still the same input.
    snapshot_download(REASONER, **options)
    server.seen.clear()
    whole = client.open(REASONER)
    assert not server.seen
    assert whole.inputs[0].local
    assert whole.inputs[0].identity() == before


def test_offline_the_cache_is_all_there_is(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot_download(BASE, endpoint=client.server.endpoint, cache_dir=client.cache, token=False)
    client.server.seen.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    client.open(f"{BASE}@{'b' * 40}").tensors["model.norm.weight"].read()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as caught:
        client.open(f"{REASONER}@main")
    assert f"hf download {REASONER} --revision main" in caught.value.hint
    assert not client.server.seen


def interrupted(client: Client, tmp_path: Path, params: dict[str, Any]) -> list[str]:
    """A run that storage ends somewhere behind the second shard; the shards that are finished."""
    passed = 0

    def fail(handler: loopback_hub.Handler, seen: loopback_hub.Seen) -> bool:
        nonlocal passed
        if seen.host != "storage":
            return False
        done = list((tmp_path / "out.partial").glob("model-*.safetensors"))
        if len(done) < 2:
            return False
        handler.answer(503)
        return True

    child = client.child(params)
    client.server.faults.append(fail)
    with pytest.raises(CheckpointError, match="503") as caught:
        child.save(tmp_path / "out", shard_bytes=1 << 19, threads=1, memory_bytes=256_000_000)
    assert "same command again" in caught.value.hint
    client.server.faults.clear()
    return sorted(path.name for path in (tmp_path / "out.partial").glob("model-*.safetensors"))


def test_a_run_resumes_and_reads_only_what_is_missing(
    client: Client, parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.stream.save.ahead_bytes", lambda memory, peak: 0)
    finished = interrupted(client, tmp_path, HALF)
    assert len(finished) >= 2
    child = client.child(HALF)
    client.server.seen.clear()
    result = child.save(tmp_path / "out", shard_bytes=1 << 19)
    assert result.manifest["run"]["resumed_shards"] == finished
    want = local_child(parents, HALF).save(tmp_path / "local", shard_bytes=1 << 19)
    assert weights_of(result.folder) == weights_of(want.folder)
    asked = sum(each.range[1] - each.range[0] for each in client.server.of("GET", "storage") if each.range)
    whole = sum(ref.nbytes for source in (BASE, REASONER) for ref in client.open(source).tensors.values())
    assert asked < whole * 0.9


@pytest.mark.parametrize("what", ["commit", "content"])
def test_a_run_on_something_else_is_not_resumed(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("surgery.stream.save.ahead_bytes", lambda memory, peak: 0)
    interrupted(client, tmp_path, HALF)
    repo = client.server.repos[REASONER]
    if what == "commit":
        repo.commit = "f" * 40
        told = f'inputs.reasoner.revision was "{"d" * 40}", is "{"f" * 40}"'
    else:
        name = next(name for name in sorted(repo.files) if name.endswith(".safetensors"))
        was = repo.etag(name)
        repo.files[name] = repo.files[name][:-1] + bytes([repo.files[name][-1] ^ 1])
        told = f'inputs.reasoner.files.{name}.etag was "{was}", is "{repo.etag(name)}"'
    with pytest.raises(PlanError) as caught:
        client.child(HALF).save(tmp_path / "out", shard_bytes=1 << 19)
    assert told in caught.value.message


def test_a_first_look_takes_a_few_requests(client: Client, parents: dict[str, Path]) -> None:
    found = glance(BASE, "base", client.hub())
    local = glance(parents["base"], "base")
    assert found.roles == local.roles
    assert (found.nbytes, found.shards, found.local_shards) == (local.nbytes, local.shards, 0)
    assert found.revision == "b" * 40
    assert len(client.server.seen) == 5  # the repo, and two requests each for config and index
    assert not client.server.of("GET", "storage")
    tensors = open_checkpoint(parents["base"]).tensors.values()
    assert sum(found.roles.values()) == len(tensors)
    roles = Counter((ref.info.role, ref.info.mtp) for ref in tensors)
    assert found.roles == roles


@pytest.mark.usefixtures("large")
def test_a_first_look_at_a_model_in_one_file_reads_its_header(client: Client) -> None:
    found = glance("org/large", None, client.hub())
    assert sum(found.roles.values()) == 5
    asked = client.server.data_ranges("model.safetensors")
    assert asked == [(0, 4096)]


def test_a_header_longer_than_the_first_request_is_read_whole(client: Client) -> None:
    remote = client.open(BASE, header_bytes=64)
    assert torch.equal(
        remote.tensors["model.norm.weight"].read(), client.open(BASE).tensors["model.norm.weight"].read()
    )


def test_a_wait_ends_when_the_run_is_stopped(client: Client, tmp_path: Path) -> None:
    """A pause that a server asked for does not keep a stopped run."""
    remote = client.open(BASE)
    client.server.faults.append(
        lambda handler, seen: (
            seen.host == "storage" and not handler.answer(429, headers={"Retry-After": "600"})
        )
    )
    hub = remote.inputs[0].files[0].transfer  # type: ignore[attr-defined]
    timer = threading.Timer(0.3, hub.cancel)
    timer.start()
    started = time.monotonic()
    with pytest.raises(InterruptedRun):
        remote.tensors["model.norm.weight"].read()
    timer.join()
    assert time.monotonic() - started < 5
