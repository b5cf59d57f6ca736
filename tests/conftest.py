"""Parents that many tests read and none may write: three DeepSeek-V3-shaped folders near each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from tiny_models import Build, build_model
from walk_models import Families

# The tensors are small: a second thread costs more than it brings, ten times as much on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """FP8, a dense first layer, an MTP layer, ragged edges, some scales and weights in different shards."""
    folder = tmp_path_factory.mktemp("parents")
    return {
        "base": factories.deepseek_v3(folder / "base", 1),
        "reasoner": factories.deepseek_v3(folder / "reasoner", 2, base=1, delta=0.3),
        "third": factories.deepseek_v3(folder / "third", 3, base=1, delta=0.6),
    }


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """build(family, seed, **config): the folder of a tiny model, in this test's own folder."""

    def make(family: str, seed: int = 0, **config: Any) -> Path:
        return build_model(tmp_path / f"{family}-{seed}", family, seed, **config)

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """tiny(family, **config): the folder of a tiny model that many tests read and none may write."""
    root = tmp_path_factory.mktemp("tiny")
    built: dict[str, Path] = {}

    def find(family: str, **config: Any) -> Path:
        key = f"{family} {sorted(config.items())}"
        if key not in built:
            built[key] = build_model(root / str(len(built)), family, **config)
        return built[key]

    return find
