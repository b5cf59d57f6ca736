"""build(family, seed, **config): the folder of a tiny model, in this test's own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import Build, build_model


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(family: str, seed: int = 0, **config: Any) -> Path:
        return build_model(tmp_path / f"{family}-{seed}", family, seed, **config)

    return make
