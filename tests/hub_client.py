"""How tests reach the hub on loopback, and what they compare."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import loopback_hub

from surgery.operators.merge.aoe import AssemblyOfExperts
from surgery.stream.checkpoint import Checkpoint
from surgery.stream.hub import Hub
from surgery.stream.source import open_checkpoint
from surgery.stream.transfer import Limits, Transfer

BASE, REASONER = "org/base", "org/reasoner"
CHIMERA: dict[str, Any] = {"weights": {"reasoner": 1.0}, "select": ("routed_expert",)}
HALF: dict[str, Any] = {"weights": {"reasoner": 0.5}}


@dataclass
class Client:
    """How tests reach the loopback hub; headers are asked for in requests of 4 kB, so that few bytes of
    the small shards come with them."""

    server: loopback_hub.Hub
    cache: Path

    def hub(self, *, token: str | bool = loopback_hub.TOKEN, **limits: Any) -> Hub:
        fast = {"first_wait_s": 0.01, "longest_wait_s": 0.05, "header_bytes": 4096, "attempts": 4}
        return Hub(self.server.endpoint, token, self.cache, Transfer(Limits(**(fast | limits))))

    def open(self, model: str, name: str | None = None, **options: Any) -> Checkpoint:
        return open_checkpoint(model, name, self.hub(**options))

    def child(self, params: dict[str, Any] = CHIMERA, **limits: Any) -> Checkpoint:
        """A merge of the two remote parents through one client."""
        hub = self.hub(**limits)
        parents = {
            "base": open_checkpoint(BASE, "base", hub),
            "reasoner": open_checkpoint(REASONER, "reasoner", hub),
        }
        return AssemblyOfExperts(base="base", **params).apply(parents)


def local_child(parents: dict[str, Path], params: dict[str, Any] = CHIMERA) -> Checkpoint:
    """The same merge of the folders."""
    opened = {name: open_checkpoint(parents[name], name) for name in ("base", "reasoner")}
    return AssemblyOfExperts(base="base", **params).apply(opened)


def weights_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every shard."""
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def pieces(ranges: list[tuple[int, int]]) -> tuple[int, list[tuple[int, int]]]:
    """Total bytes of ranges, and the ranges joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return sum(stop - start for start, stop in ranges), joined
