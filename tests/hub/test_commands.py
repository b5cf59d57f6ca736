"""The command line against the hub, reached as users reach it: by the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import loopback_hub
import pytest
import yaml
from hub_client import BASE, REASONER, local_child, weights_of
from huggingface_hub import snapshot_download

ROOT = Path(__file__).parents[2]
PARENTS = ("--set", f"parents.base={BASE}", "--set", f"parents.reasoner={REASONER}@main")


class Shell:
    def __init__(self, server: loopback_hub.Hub, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.environment = {
            **os.environ,
            "HF_ENDPOINT": server.endpoint,
            "HF_TOKEN": loopback_hub.TOKEN,
            "HF_HOME": str(folder / "home"),
            "PYTHONPATH": str(ROOT),
        }

    def __call__(self, *arguments: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "surgery", *arguments],
            cwd=self.folder, env={**self.environment, **more}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done


@pytest.fixture
def surgery(server: loopback_hub.Hub, tmp_path: Path) -> Shell:
    for repo in server.repos.values():
        repo.private = True
    return Shell(server, tmp_path)


def test_from_plan_to_verify_on_the_hub_alone(surgery: Shell, parents: dict[str, Path]) -> None:
    plan = json.loads(surgery("plan", "chimera", *PARENTS, "--json").stdout)
    assert [(each["local"], each["revision"][0]) for each in plan["parents"]] == [(False, "b"), (False, "d")]
    want = local_child(parents)
    reads = dict.fromkeys(("base", "reasoner"), 0)
    for ref in want.tensors.values():
        reads[ref.sources()[0].origin] += ref.nbytes
    assert {each["name"]: each["bytes_read"] for each in plan["parents"]} == reads
    assert "(remote)" in surgery("plan", "chimera", *PARENTS).stdout
    surgery("run", "chimera", *PARENTS, "-o", "out")
    out = surgery.folder / "out"
    assert weights_of(out) == weights_of(want.save(surgery.folder / "local").folder)
    pinned = yaml.safe_load((out / "surgery_recipe.yaml").read_text())["parents"]
    assert pinned == {"base": f"{BASE}@{'b' * 40}", "reasoner": f"{REASONER}@{'d' * 40}"}
    checks = json.loads(surgery("verify", "out", "--no-load", "--json").stdout)["checks"]
    assert {each["check"]: each["state"] for each in checks}["lineage"] == "passed"
    assert (surgery.folder / "home" / "hub").is_dir()
    assert not [each for each in surgery.server.seen if each.host == "storage" and each.authorized]
    # At the commit it was made from, though the branch has moved since.
    moved = surgery.server.repos[REASONER].commit = "9" * 40
    surgery.server.repos[REASONER].history = frozenset({"d" * 40})
    checks = json.loads(surgery("verify", "out", "--no-load", "--json").stdout)["checks"]
    assert {each["check"]: each["state"] for each in checks}["lineage"] == "passed"
    assert moved not in json.dumps([each.path for each in surgery.server.seen])
    # The resolved recipe makes the same again, whatever the branch is by then.
    surgery("run", "out/surgery_recipe.yaml", "-o", "again")
    assert weights_of(surgery.folder / "again") == weights_of(out)


def test_a_first_look(surgery: Shell) -> None:
    told = json.loads(surgery("plan", "chimera", *PARENTS, "--index-only", "--json").stdout)
    assert [each["revision"] for each in told["parents"]] == ["b" * 40, "d" * 40]
    assert all(each["local_shards"] == 0 and each["bytes"] > 0 for each in told["parents"])
    assert len(surgery.server.seen) == 10
    assert not surgery.server.of("GET", "storage")
    assert "routed_expert (MTP)" in surgery("plan", "chimera", *PARENTS, "--index-only").stdout


def test_without_a_token_private_repos_are_refused(surgery: Shell) -> None:
    failed = surgery("plan", "chimera", *PARENTS, code=4, HF_TOKEN="")
    assert "401" in failed.stderr and "HF_TOKEN" in failed.stderr


def test_offline_the_cache_is_used_and_nothing_is_asked(surgery: Shell) -> None:
    server = surgery.server
    failed = surgery("plan", "chimera", *PARENTS, code=4, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in failed.stderr
    assert not server.seen
    for repo in (BASE, REASONER):
        snapshot_download(
            repo, endpoint=server.endpoint, token=loopback_hub.TOKEN,
            cache_dir=surgery.folder / "home" / "hub",
        )  # fmt: skip
    server.seen.clear()
    surgery("run", "chimera", *PARENTS, "-o", "out", HF_HUB_OFFLINE="1")
    assert not server.seen


def test_the_branch_moves_while_a_run_is_stopped(surgery: Shell) -> None:
    """What was begun on one commit is not ended on another, and the refusal names both."""
    (surgery.folder / "r.yaml").write_text(
        f"parents: {{base: {BASE}, reasoner: {REASONER}}}\n"
        "steps: [{op: merge.aoe, base: base, weights: {reasoner: 1.0}, select: [routed_expert]}]\n"
        "output: {shard_size: 1MB}\n"
    )

    def fail(handler: loopback_hub.Handler, seen: loopback_hub.Seen) -> bool:
        if seen.host != "storage" or not list((surgery.folder / "out.partial").glob("*")):
            return False
        handler.answer(429, headers={"Retry-After": "4000"})
        return True

    surgery.server.faults.append(fail)
    failed = surgery("run", "r.yaml", "-o", "out", code=4)
    assert "a pause of 4000 s" in failed.stderr
    surgery.server.faults.clear()
    surgery.server.repos[REASONER].commit = "9" * 40
    refused = surgery("run", "r.yaml", "-o", "out", code=5)
    assert "d" * 40 in refused.stderr and "9" * 40 in refused.stderr
    surgery("run", "r.yaml", "-o", "out", "--fresh")
