"""Push: what is refused before anything is asked, what is uploaded, and what failures are told as."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import loopback_hub
import pytest
import yaml
from hub_client import BASE, REASONER, Client

from surgery.errors import PlanError, SurgeryError, UsageError, VerificationError
from surgery.recipe.push import plan_push, push
from surgery.stream.hub import Hub
from surgery.stream.source import open_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output(parents: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output of a local parent."""
    folder = tmp_path_factory.mktemp("push") / "out"
    return open_checkpoint(parents["base"], "base").save(folder, shard_bytes=1 << 21).folder


@pytest.fixture
def copy(output: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    target = tmp_path / "copy"
    target.mkdir()
    for path in output.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def commands(server: loopback_hub.Hub, tmp_path: Path, *arguments: str, **more: str) -> Any:
    """The command line in a process of its own, with the loopback hub in its environment."""
    places = {
        "HF_ENDPOINT": server.endpoint, "HF_TOKEN": loopback_hub.TOKEN, "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "surgery", *arguments],
        cwd=ROOT, env={**os.environ, **places, **more}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_a_new_repo_is_private_and_holds_the_folder(client: Client, output: Path) -> None:
    plan = plan_push(output, "me/child")
    assert {name for name, _ in plan.files} == {path.name for path in output.iterdir()}
    address = push(plan, client.hub())
    repo = client.server.repos["me/child"]
    assert repo.private
    assert address == f"{client.server.endpoint}/me/child/commit/1"
    assert repo.files == {path.name: path.read_bytes() for path in output.iterdir()}


def test_public_on_demand(client: Client, output: Path) -> None:
    push(plan_push(output, "me/child", public=True), client.hub())
    assert not client.server.repos["me/child"].private


@pytest.mark.parametrize("private", [True, False])
def test_a_repo_that_others_see_otherwise_is_left_alone(client: Client, output: Path, private: bool) -> None:
    client.server.repos["me/child"] = loopback_hub.Repo({}, "e" * 40, private=private)
    now = "private" if private else "public"
    with pytest.raises(PlanError, match=f"exists and is {now}"):
        push(plan_push(output, "me/child", public=private), client.hub())
    assert not client.server.repos["me/child"].files
    push(plan_push(output, "me/child", public=not private), client.hub())
    assert client.server.repos["me/child"].files


def test_pushing_again_commits_nothing(client: Client, output: Path) -> None:
    push(plan_push(output, "me/child"), client.hub())
    commits = len(client.server.commits)
    push(plan_push(output, "me/child"), client.hub())
    assert len(client.server.commits) == commits


def test_what_is_not_the_outputs_stays_here(client: Client, copy: Path) -> None:
    for name in (".secret", "surgery-lock", "surgery-journal.jsonl"):
        (copy / name).write_text("x")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "token").write_text("x")
    (copy / "notes[1].txt").write_text("goes along")
    push(plan_push(copy, "me/child"), client.hub())
    files = client.server.repos["me/child"].files
    assert "notes[1].txt" in files
    assert not {".secret", "surgery-lock", "surgery-journal.jsonl", ".cache/token"} & set(files)


def test_a_folder_that_is_not_whole_is_refused_before_anything_is_asked(client: Client, copy: Path) -> None:
    shard = next(copy.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(VerificationError, match=f"{shard.name} has {len(whole) - 1} bytes"):
        plan_push(copy, "me/child")
    shard.unlink()
    with pytest.raises(VerificationError, match=f"{shard.name} is missing"):
        plan_push(copy, "me/child")
    shard.write_bytes(whole)
    (copy / "other.safetensors").write_bytes(b"")
    with pytest.raises(VerificationError, match=r"other\.safetensors is not in the manifest"):
        plan_push(copy, "me/child")
    (copy / "surgery_manifest.json").unlink()
    with pytest.raises(VerificationError, match="no surgery_manifest"):
        plan_push(copy, "me/child")
    assert not client.server.seen


@pytest.mark.parametrize("repo", ["child", "me/child@main", "a/b/c", "/x", ""])
def test_names_that_are_no_repo(output: Path, repo: str) -> None:
    with pytest.raises(UsageError, match="is no repo"):
        plan_push(output, repo)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        plan_push(tmp_path / "absent", "me/child")


def test_refusals_of_the_hub_say_what_to_do(client: Client, output: Path) -> None:
    plan = plan_push(output, "me/child")
    with pytest.raises(PlanError, match="401") as caught:
        push(plan, client.hub(token=False))
    assert "hf auth login" in caught.value.hint
    with pytest.raises(PlanError, match=r"401.*token that is not valid"):
        push(plan, client.hub(token="hf_wrong"))
    client.server.tokens |= {"hf_reader"}
    client.server.read_only = frozenset({"hf_reader"})
    with pytest.raises(PlanError, match=r"403.*rights to create") as caught:
        push(plan, client.hub(token="hf_reader"))
    assert "right" in caught.value.hint
    client.server.repos["me/child"] = loopback_hub.Repo({}, "e" * 40, private=True)
    with pytest.raises(SurgeryError, match=r"403.*rights to write") as failed:
        push(plan, client.hub(token="hf_reader"))
    assert "the same command resumes" in failed.value.hint
    assert not client.server.repos["me/child"].files


def test_no_network(output: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        hub = Hub(f"http://127.0.0.1:{unused.getsockname()[1]}", "hf_x", tmp_path)
        with pytest.raises(PlanError, match="cannot be reached"):
            push(plan_push(output, "me/child"), hub)


def test_a_dry_run_lists_files_and_asks_nothing(
    server: loopback_hub.Hub, output: Path, tmp_path: Path, parents: dict[str, Path]
) -> None:
    done = commands(server, tmp_path, "push", str(output), "me/child", "--dry-run")
    assert done.returncode == 0, done.stderr
    for path in output.iterdir():
        assert path.name in done.stdout
    assert "would go to me/child (private)" in done.stdout
    assert str(parents["base"]) in done.stderr  # the upload would make that folder's name known
    told = json.loads(commands(server, tmp_path, "push", str(output), "me/x", "--dry-run", "--json").stdout)
    assert {each["name"]: each["bytes"] for each in told["files"]} == {
        path.name: path.stat().st_size for path in output.iterdir()
    }
    assert told["commit"] is None
    assert not server.seen


def test_weights_go_to_storage_without_the_token_and_an_upload_resumes(
    server: loopback_hub.Hub, output: Path, tmp_path: Path
) -> None:
    server.lfs = True

    def no_commit(handler: loopback_hub.Handler, seen: loopback_hub.Seen) -> bool:
        if "/commit/" not in seen.path:
            return False
        handler.body()
        handler.answer(500)
        return True

    server.faults.append(no_commit)
    failed = commands(server, tmp_path, "push", str(output), "me/child")
    assert failed.returncode == 1
    assert "500" in failed.stderr and "the same command resumes" in failed.stderr
    shards = {path.name for path in output.glob("*.safetensors")}
    assert len(server.of("PUT", "storage")) == len(shards)
    server.faults.clear()
    done = commands(server, tmp_path, "push", str(output), "me/child")
    assert done.returncode == 0, done.stderr
    uploads = server.of("PUT", "storage")
    assert len(uploads) == len(shards)  # none a second time
    assert not [each for each in uploads if each.authorized]
    files = server.repos["me/child"].files
    assert files == {path.name: path.read_bytes() for path in output.iterdir()}


def test_the_card_names_parents_of_the_hub_alone(
    client: Client, parents: dict[str, Path], tmp_path: Path, output: Path
) -> None:
    """The hub refuses a card whose base model is a folder, or has a revision."""
    front = yaml.safe_load((output / "README.md").read_text().split("---")[1])
    assert "base_model" not in front and "base_model_relation" not in front
    made = client.child().save(tmp_path / "child").folder
    front = yaml.safe_load((made / "README.md").read_text().split("---")[1])
    assert front["base_model"] == [BASE, REASONER]
    assert front["base_model_relation"] == "merge"
    made = client.open(f"{BASE}@main").save(tmp_path / "copy").folder
    front = yaml.safe_load((made / "README.md").read_text().split("---")[1])
    assert front["base_model"] == [BASE]
