"""Perplexity and divergence through the layer walk: a model of any size in the memory of one layer.

The same windows, figures and conventions as with the model in memory; replies to problems need the whole
model and are not measured this way. A parent's hidden states are kept for its children, so memory is two
generations of hidden states for each of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from surgery.calibrate.budget import BATCH_TOKENS, host_share
from surgery.calibrate.state import left_out, used

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from surgery.calibrate.batches import Batch
    from surgery.calibrate.state import Progress
    from surgery.calibrate.walk import Walk
    from surgery.stream.checkpoint import Checkpoint


@dataclass(frozen=True)
class StreamedModel:
    """A walk that has come to the end, and the windows of each of its batches."""

    walk: Walk

    @property
    def parameters(self) -> int:
        """Weights of the checkpoint's tensors that are run."""
        return sum(ref.numel for ref in used(self.walk.checkpoint))

    @property
    def left_out(self) -> tuple[str, ...]:
        return left_out(self.walk.checkpoint)

    def logits(self) -> Iterator[torch.Tensor]:
        """Logits of the predictions inside each window in turn, [len(window) - 1, vocabulary]."""
        return (logits[:-1] for logits in self.walk.row_logits())


def stream_model(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    memory_bytes: int,
    folder: Path,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    stage: str = "walk",
) -> StreamedModel:
    """Walk a model over windows of ids. Raises what the walk does. `folder` is for hidden states that do not
    fit the budget."""
    from surgery.calibrate.walk import Walk, WalkSettings, room_for

    keep, room = room_for(checkpoint, device, memory_bytes)
    rows = max(1, BATCH_TOKENS[device.type] // max(len(window) for window in windows))
    batches = []
    for start in range(0, len(windows), rows):
        batches += _batches(windows[start : start + rows])
    settings = WalkSettings(
        device, dtype,
        room_bytes=room, keep=keep, host_bytes=host_share(memory_bytes), folder=folder,
        snapshot_seconds=inf,
        trust_remote_code=trust_remote_code,
        progress=(lambda _, done, total: progress(stage, done, total)) if progress else None,
    )  # fmt: skip
    walk = Walk(checkpoint, batches, [], settings)
    walk.run()
    return StreamedModel(walk)


def _batches(windows: Sequence[Sequence[int]]) -> list[Batch]:
    """Windows in order; the last one of a text may be shorter and goes by itself."""
    found: list[Batch] = []
    rows: list[Sequence[int]] = []
    for window in windows:
        if rows and len(rows[0]) != len(window):
            found.append(_batch(rows))
            rows = []
        rows.append(window)
    return [*found, _batch(rows)]


def _batch(rows: Sequence[Sequence[int]]) -> Batch:
    import torch

    from surgery.calibrate.batches import Batch

    return Batch(torch.tensor([list(row) for row in rows]), tuple(len(row) for row in rows))
