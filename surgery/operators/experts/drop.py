"""Drop experts by a keep-list from a file: one that `surgery prune` wrote, or one of your own.

    {"kind": "surgery-keep-list", "schema": 1, "n_group": 1, "topk_group": 1,
     "layers": {"3": [0, 5, 7, …], "4": […], …}}

The experts stand in the order that they get; with n_group above 1, consecutive ones form a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from surgery.errors import UsageError
from surgery.operators.experts.keep import KeepList, expert_shape, read_keep_list
from surgery.operators.experts.pruning import DropExperts
from surgery.operators.protocol import Decision, RunContext
from surgery.stream.checkpoint import Checkpoint


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
        keep = self._read(context)
        expert_shape(checkpoint)
        return Decision(keep.as_dict())

    def _read(self, context: RunContext) -> KeepList:
        path = Path(self.keep_list).expanduser()
        for folder in (Path(), *context.beside):
            if (folder / path).is_file():
                return read_keep_list(folder / path)
        raise UsageError(
            f"there is no keep-list {path}",
            hint="`surgery prune` writes surgery_keep.json beside the weights",
        )
