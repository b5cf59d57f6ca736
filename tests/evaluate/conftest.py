"""build(family, seed, **config): the folder of a tiny model, in this test's own folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Build, build_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other slow tiny models down tenfold where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(family: str, seed: int = 0, **config: Any) -> Path:
        return build_model(tmp_path / f"{family}-{seed}", family, seed, **config)

    return make
