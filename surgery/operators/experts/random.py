"""Random experts (baseline): what dropping experts costs without looking at them.

Each layer draws from a generator of its own, seeded by `seed` and the layer's number. Router groups are
respected as by every criterion: the draw gives each expert a score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from surgery.operators.experts.keep import KeepList, expert_shape
from surgery.operators.experts.pruning import RankedExperts
from surgery.operators.protocol import Decision, RunContext
from surgery.stream.checkpoint import Checkpoint


def random_scores(num_experts: int, seed: int, layer: int) -> list[float]:
    """A score in [0, 1) for each expert of a layer."""
    drawn: list[float] = np.random.default_rng([seed, layer]).random(num_experts).tolist()
    return drawn


class RandomExperts(RankedExperts):
    """Params of `experts.random`."""

    op: ClassVar[str] = "experts.random"

    seed: int = Field(default=0, ge=0)

    def estimate(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Mapping[str, Any]:
        return {}

    def decide(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Decision:
        (checkpoint,) = inputs.values()
        shape = expert_shape(checkpoint)
        kept = {
            layer: self.choose(random_scores(shape.count, self.seed, layer), shape) for layer in shape.layers
        }
        return Decision(KeepList(kept, self.groups_after(shape)).as_dict())
