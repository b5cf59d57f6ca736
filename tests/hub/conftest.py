"""A hub on loopback with two parents, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import loopback_hub
import pytest
from hub_client import BASE, REASONER, Client


@pytest.fixture
def server(parents: dict[str, Path]) -> Iterator[loopback_hub.Hub]:
    with loopback_hub.running() as found:
        found.add(BASE, parents["base"], "b" * 40)
        found.add(REASONER, parents["reasoner"], "d" * 40)
        yield found


@pytest.fixture
def client(server: loopback_hub.Hub, tmp_path: Path) -> Client:
    return Client(server, tmp_path / "cache")
