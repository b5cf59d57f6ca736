"""What storage and hub do wrong: passing faults cost a retry, lasting ones one clear error."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import loopback_hub
import pytest
import torch
from hub_client import BASE, HALF, REASONER, Client, local_child, weights_of
from loopback_hub import Handler, Seen

from surgery.errors import CheckpointError
from surgery.stream.hub import Hub
from surgery.stream.source import open_checkpoint
from surgery.stream.transfer import Fault, Limits, Transfer, pause_of, used_up

NORM = "model.norm.weight"


def data_of(handler: Handler, seen: Seen) -> tuple[bytes, int, int]:
    """A file's bytes and the range that is asked of it."""
    _, owner, repo, rest = seen.path.split("/", 3)
    assert seen.range
    return handler.hub.repos[f"{owner}/{repo}"].files[rest.partition("?")[0]], *seen.range


def whole_file(handler: Handler, seen: Seen) -> None:
    handler.answer(200, data_of(handler, seen)[0])


def other_range(handler: Handler, seen: Seen) -> None:
    data, start, stop = data_of(handler, seen)
    told = {"Content-Range": f"bytes {start + 1}-{stop}/{len(data)}"}
    handler.answer(206, data[start + 1 : stop + 1].ljust(stop - start, b"x"), told)


def later_range(handler: Handler, seen: Seen) -> None:
    """Bytes from within the range, told honestly, that do not begin where it does."""
    data, start, stop = data_of(handler, seen)
    told = {"Content-Range": f"bytes {start + 1}-{stop - 1}/{len(data)}"}
    handler.answer(206, data[start + 1 : stop], told)


def longer_range(handler: Handler, seen: Seen) -> None:
    data, start, stop = data_of(handler, seen)
    stop += 1
    told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
    handler.answer(206, data[start:stop].ljust(stop - start, b"x"), told)


def no_range(handler: Handler, seen: Seen) -> None:
    data, start, stop = data_of(handler, seen)
    handler.answer(206, data[start:stop], {"Content-Range": "bytes"})


def shorter_than_told(handler: Handler, seen: Seen) -> None:
    """Half of the body, then the connection is closed."""
    data, start, stop = data_of(handler, seen)
    told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
    handler.answer(206, data[start : (start + stop) // 2], told, length=stop - start)
    handler.close_connection = True


def length_of_half(handler: Handler, seen: Seen) -> None:
    data, start, stop = data_of(handler, seen)
    told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
    handler.answer(206, data[start : (start + stop) // 2], told)


def half_of_the_range(handler: Handler, seen: Seen) -> None:
    """A shorter range than asked for, told honestly."""
    data, start, stop = data_of(handler, seen)
    stop = (start + stop + 1) // 2
    told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
    handler.answer(206, data[start:stop], told)


def compressed(handler: Handler, seen: Seen) -> None:
    data, start, stop = data_of(handler, seen)
    told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", "Content-Encoding": "gzip"}
    handler.answer(206, data[start:stop], told)


def broken(handler: Handler, seen: Seen) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def status(code: int, **headers: str) -> Callable[[Handler, Seen], None]:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda handler, seen: handler.answer(code, b"", named)


ALWAYS_BAD = {
    "the whole file": (whole_file, "the whole file came"),
    "another range": (other_range, "came instead of"),
    "a later range": (later_range, "came instead of"),
    "a longer range": (longer_range, "came instead of"),
    "a range that is none": (no_range, "Content-Range says"),
    "a wrong length": (length_of_half, "are announced for a range of"),
    "compressed": (compressed, "encoded as gzip"),
    "broken": (broken, "disconnected|reset|closed"),
    "500": (status(500), "500"),
    "503": (status(503), "503"),
    "429": (status(429), "429"),
    "403": (status(403), "403"),
    "418": (status(418), "418"),
}
PASSING = {name: act for name, (act, _) in ALWAYS_BAD.items()} | {
    "a short body": shorter_than_told,
    "half of the range": half_of_the_range,
    "503 with a pause": status(503, Retry_After="0"),
    "429 with a limit": status(429, RateLimit='"resolvers";r=0;t=0'),
}


class Faulty:
    """A fault of storage: for the first `times` requests, or (None) for the first request of each range."""

    def __init__(self, act: Callable[[Handler, Seen], None], times: int | None = None) -> None:
        self.act, self.times = act, times
        self.hit = 0
        self.asked: set[tuple[str, tuple[int, int] | None]] = set()

    def __call__(self, handler: Handler, seen: Seen) -> bool:
        if seen.host != "storage" or seen.method != "GET":
            return False
        key = (seen.path.partition("?")[0], seen.range)
        with handler.hub.lock:
            hit = key not in self.asked if self.times is None else self.hit < self.times
            self.asked.add(key)
            self.hit += hit
        if hit:
            self.act(handler, seen)
        return hit


ALWAYS = 1 << 30


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_changes_nothing(
    client: Client, parents: dict[str, Path], tmp_path: Path, name: str
) -> None:
    fault = Faulty(PASSING[name])
    client.server.faults.append(fault)
    result = client.child(HALF, attempts=8).save(tmp_path / "out", shard_bytes=1 << 20)
    want = local_child(parents, HALF).save(tmp_path / "local", shard_bytes=1 << 20)
    assert weights_of(result.folder) == weights_of(want.folder)
    assert fault.hit > 5
    if name != "half of the range":
        assert result.manifest["run"]["remote"]["retries"] >= fault.hit
    assert not [each for each in client.server.seen if each.host == "storage" and each.authorized]


@pytest.mark.parametrize("name", ALWAYS_BAD)
def test_a_lasting_fault_is_one_error_that_says_which(client: Client, name: str) -> None:
    act, told = ALWAYS_BAD[name]
    ref = client.open(BASE).tensors[NORM]
    fault = Faulty(act, times=ALWAYS)
    client.server.faults.append(fault)
    with pytest.raises(CheckpointError, match=told) as caught:
        ref.read()
    assert fault.hit == 4  # the attempts of the tests' client
    assert "failed 4 times in a row" in caught.value.message
    assert f"{BASE}@bbbbbbbbbbbb/model-" in caught.value.message
    assert "same command again" in caught.value.hint


def test_a_broken_body_is_continued_behind_its_last_byte(client: Client) -> None:
    ref = client.open(BASE).tensors["model.embed_tokens.weight"]
    want = client.open(BASE).tensors["model.embed_tokens.weight"].read()
    client.server.seen.clear()
    client.server.faults.append(Faulty(shorter_than_told, times=1))
    assert torch.equal(ref.read(), want)
    first, second = (each.range for each in client.server.of("GET", "storage"))
    assert first and second
    assert second == ((first[0] + first[1]) // 2, first[1])


def test_expired_addresses_are_asked_for_again(
    client: Client, parents: dict[str, Path], tmp_path: Path
) -> None:
    client.server.lifetime = 2
    result = client.child(HALF, attempts=8).save(tmp_path / "out", shard_bytes=1 << 20)
    want = local_child(parents, HALF).save(tmp_path / "local", shard_bytes=1 << 20)
    assert weights_of(result.folder) == weights_of(want.folder)
    asked = [each for each in client.server.of("HEAD") if each.name.endswith(".safetensors")]
    shards = [name for repo in (BASE, REASONER) for name in client.server.repos[repo].files]
    assert len(asked) > len([name for name in shards if name.endswith(".safetensors")])
    assert all(each.authorized for each in asked)
    assert not [each for each in client.server.seen if each.host == "storage" and each.authorized]


def change(repo: loopback_hub.Repo, *, longer: bool) -> None:
    for name, data in repo.files.items():
        if name.endswith(".safetensors"):
            repo.files[name] = data + b"x" if longer else data[:-1] + bytes([data[-1] ^ 1])


def test_a_file_that_changed_is_refused_when_its_address_is_renewed(client: Client) -> None:
    ref = client.open(BASE).tensors[NORM]
    repo = client.server.repos[BASE]
    was = {repo.etag(name) for name in repo.files}
    change(repo, longer=False)
    client.server.signatures.clear()
    with pytest.raises(CheckpointError, match="changed since it was opened: etag was") as caught:
        ref.read()
    before, after = caught.value.message.partition("etag was ")[2].split(", is ")
    assert before in was
    assert after in {repo.etag(name) for name in repo.files}
    assert "--fresh" in caught.value.hint


@pytest.mark.parametrize("longer", [False, True], ids=["content", "size"])
def test_a_file_that_changed_under_its_address_is_refused(client: Client, longer: bool) -> None:
    ref = client.open(BASE).tensors[NORM]
    ref.read()
    change(client.server.repos[BASE], longer=longer)
    told = r"size was \d+, is \d+" if longer else "the etag of 127.0.0.2:.* was .*, is "
    with pytest.raises(CheckpointError, match=f"changed since it was opened: {told}"):
        ref.read()


def test_a_file_that_shrank_is_refused(client: Client) -> None:
    ref = client.open(BASE).tensors[NORM]
    repo = client.server.repos[BASE]
    for name in list(repo.files):
        if name.endswith(".safetensors"):
            repo.files[name] = repo.files[name][:100]
    with pytest.raises(CheckpointError, match=r"size was \d+, is 100"):
        ref.read()


def test_storage_that_redirects_is_followed_without_the_token(client: Client) -> None:
    def elsewhere(handler: Handler, seen: Seen) -> None:
        port = handler.hub.storage.rpartition(":")[2]
        handler.answer(307, b"", {"Location": f"http://127.0.0.2:{port}{seen.path}&again=1"})

    def redirect(handler: Handler, seen: Seen) -> bool:
        if seen.host == "storage" and "again" not in seen.path:
            elsewhere(handler, seen)
            return True
        return False

    want = client.open(BASE).tensors[NORM].read()
    client.server.faults.append(redirect)
    assert torch.equal(client.open(BASE).tensors[NORM].read(), want)
    assert not [each for each in client.server.seen if each.host == "storage" and each.authorized]


def test_the_token_does_not_follow_a_redirect_off_the_endpoint(client: Client) -> None:
    """An endpoint that serves a shard itself at first and sends readers to storage later."""
    repo = client.server.repos[BASE]
    repo.inline = frozenset(name for name in repo.files if name.endswith(".safetensors"))
    ref = client.open(BASE).tensors[NORM]
    want = ref.read()
    repo.inline = frozenset()
    client.server.seen.clear()
    # Storage has an etag of its own; only the token matters here.
    assert torch.equal(ref.read(), want)
    assert [each.authorized for each in client.server.of("GET")] == [True, False]


def test_redirects_in_a_circle_end(client: Client) -> None:
    ref = client.open(BASE).tensors[NORM]
    client.server.faults.append(
        Faulty(lambda handler, seen: handler.answer(302, b"", {"Location": seen.path}), times=ALWAYS)
    )
    with pytest.raises(CheckpointError, match="more than 5 redirects"):
        ref.read()


# The hub itself


@pytest.mark.parametrize("code", [429, 500, 503])
def test_passing_faults_of_the_hub_are_waited_out(client: Client, code: int) -> None:
    hit: dict[str, int] = {}

    def once(handler: Handler, seen: Seen) -> bool:
        if seen.host == "endpoint" and hit.setdefault(seen.method + seen.path, 0) < 1:
            hit[seen.method + seen.path] += 1
            handler.answer(code, headers={"Retry-After": "0"})
            return True
        return False

    client.server.faults.append(once)
    client.open(BASE).tensors[NORM].read()
    assert len(hit) > 10


def refused(client: Client, model: str, told: str, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError, match=told) as caught:
        client.open(model, **options)
    return caught.value


def test_what_the_hub_does_not_give_is_one_error_with_a_way_on(client: Client) -> None:
    client.server.repos[BASE].private = True
    client.server.repos[REASONER].gated = True
    anonymous = {"token": False}
    assert "HF_TOKEN" in refused(client, BASE, "401.*only its members", **anonymous).hint
    assert "accept its terms" in refused(client, REASONER, "gated", **anonymous).hint
    assert "check the name" in refused(client, "org/absent", "404").hint
    assert "log in" in refused(client, BASE, "401.*not valid", token="hf_wrong").hint
    assert "after the @" in refused(client, f"{BASE}@nowhere", "no such revision").hint
    client.server.faults.append(
        lambda handler, seen: seen.host == "endpoint" and not handler.answer(403, headers={})
    )
    assert "right" in refused(client, BASE, "403").hint


def test_a_hub_that_cannot_be_reached_is_one_error_at_once(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        hub = Hub(f"http://127.0.0.1:{port}", False, tmp_path, Transfer(Limits()))
        started = time.monotonic()
        with pytest.raises(CheckpointError, match="cannot be reached") as caught:
            open_checkpoint("org/base", None, hub)
        assert "check the network" in caught.value.hint
        assert time.monotonic() - started < 5


def test_a_pause_of_hours_ends_the_run(client: Client) -> None:
    ref = client.open(BASE).tensors[NORM]
    client.server.faults.append(Faulty(status(429, Retry_After="7200"), times=ALWAYS))
    with pytest.raises(CheckpointError, match="a pause of 7200 s"):
        ref.read()


def test_a_pause_holds_back_the_host_that_asked_for_it(client: Client) -> None:
    ref = client.open(BASE).tensors[NORM]
    client.server.faults.append(Faulty(status(429, Retry_After="1"), times=1))
    started = time.monotonic()
    ref.read()
    assert time.monotonic() - started >= 1
    first, second = client.server.of("GET", "storage")[-2:]
    assert first.range == second.range


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors.index.json"])
def test_a_repo_that_is_not_whole_is_refused(client: Client, missing: str) -> None:
    del client.server.repos[BASE].files[missing]
    refused(client, BASE, missing)


def test_a_shard_that_the_index_names_and_the_repo_lacks(client: Client) -> None:
    repo = client.server.repos[BASE]
    shard = next(name for name in repo.files if name.endswith(".safetensors"))
    del repo.files[shard]
    refused(client, BASE, f"lacks 1 of .* shards that its index names: {shard}")


@pytest.mark.parametrize(
    "head", [b"\xff" * 8, (1 << 20).to_bytes(8, "little"), b"\x10" + bytes(7) + b"{" * 16]
)
def test_a_damaged_header_is_one_error(client: Client, head: bytes) -> None:
    repo = client.server.repos[BASE]
    shard = next(name for name in repo.files if name.endswith(".safetensors"))
    repo.files[shard] = head + repo.files[shard][len(head) :]
    refused(client, BASE, f"{shard} is no usable safetensors file")


def test_a_file_without_an_etag_is_refused(client: Client) -> None:
    def bare(handler: Handler, seen: Seen) -> bool:
        if seen.method == "HEAD" and seen.name.endswith(".safetensors"):
            handler.answer(200, b"", {"X-Repo-Commit": "b" * 40})
            return True
        return False

    client.server.faults.append(bare)
    refused(client, BASE, "does not say its etag and size")


def test_how_long_servers_ask_to_wait() -> None:
    assert pause_of(503, {}) is None
    assert pause_of(503, {"retry-after": "12"}) == 12
    assert pause_of(503, {"retry-after": "soon"}) is None
    assert pause_of(503, {"retry-after": "-3"}) is None
    found = pause_of(503, {"retry-after": formatdate(time.time() + 30, usegmt=True)})
    assert found is not None and 28 <= found <= 31
    assert pause_of(503, {"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0
    assert pause_of(429, {"ratelimit": '"resolvers";r=0;t=55', "retry-after": "2"}) == 55
    assert pause_of(429, {"ratelimit": '"resolvers";r=9;t=55', "retry-after": "2"}) == 2
    assert used_up({"ratelimit": '"resolvers";r=0;t=55'}) == 55
    assert used_up({"ratelimit": '"resolvers";r=1;t=55'}) is None
    assert used_up({}) is None


def test_waits_grow_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    transfer = Transfer(Limits(attempts=9, first_wait_s=1, longest_wait_s=20))
    monkeypatch.setattr(transfer._cancelled, "wait", waits.append)

    def fail() -> None:
        raise Fault("no")

    with pytest.raises(CheckpointError, match="failed 9 times"):
        transfer.persist("reading", fail)
    assert len(waits) == 8
    for number, seconds in enumerate(waits):
        full = min(20, 2.0**number)
        assert full / 2 <= seconds <= full
    assert len({round(seconds / min(20, 2.0**n), 6) for n, seconds in enumerate(waits)}) > 1
