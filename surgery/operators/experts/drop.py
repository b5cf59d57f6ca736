"""Drop experts by a keep-list from a file: one that `surgery prune` wrote, or one of your own.

    {"kind": "surgery-keep-list", "schema": 1, "n_group": 1, "topk_group": 1,
     "layers": {"3": [0, 5, 7, …], "4": […], …}}

The experts stand in the order that they get; with n_group above 1, consecutive ones form a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from surgery.calibrate.data import find_file
from surgery.operators.experts.keep import expert_shape, read_keep_list
from surgery.operators.experts.pruning import DropExperts
from surgery.operators.protocol import Decision, RunContext
from surgery.stream.checkpoint import Checkpoint
from surgery.stream.files import file_hash


class DropByList(DropExperts):
    """Params of `experts.drop`."""

    op: ClassVar[str] = "experts.drop"

    keep_list: str
    """The file with the keep-list."""

    def outline(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Checkpoint:
        return self.finish(inputs, self.decide(inputs, context))

    def estimate(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Mapping[str, Any]:
        return {}

    def decide(self, inputs: Mapping[str, Checkpoint], context: RunContext) -> Decision:
        (checkpoint,) = inputs.values()
        keep = read_keep_list(find_file(self.keep_list, context.beside))
        expert_shape(checkpoint)
        return Decision(keep.as_dict())

    def data_hashes(self, context: RunContext) -> Mapping[str, str]:
        return {self.keep_list: file_hash(find_file(self.keep_list, context.beside))}
