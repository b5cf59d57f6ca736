"""Several processes at one walk: who they are, and how they exchange results.

Every process runs the attention and the other dense parts itself; the experts of a layer are split. Started
by `torchrun`, which sets RANK, WORLD_SIZE and the address to meet at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ranks:
    """This process is number `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks."""
        return self.index == 0

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over all processes, in place."""
        if self.count > 1:
            from torch.distributed import all_reduce

            all_reduce(tensor)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            from torch.distributed import barrier

            barrier()


ONE_RANK = Ranks()


def started_ranks() -> Ranks:
    """This process among those that torchrun started, or alone."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """The processes of a torchrun, able to exchange results once all are here; or this one alone."""
    ranks = started_ranks()
    if ranks.count == 1:
        yield ranks
        return
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        ranks.wait()
        yield ranks
    finally:
        torch.distributed.destroy_process_group()
