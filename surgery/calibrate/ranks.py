"""Several processes at one walk: who they are, and how they exchange results.

Every process runs the attention and the other dense parts itself; the experts of a layer are split. Started
by `torchrun`, which sets RANK, WORLD_SIZE and the address to meet at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch


Shared = TypeVar("Shared")


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

    def share(self, value: Shared) -> Shared:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        from torch.distributed import broadcast_object_list

        holder = [value]
        broadcast_object_list(holder, src=0)
        return holder[0]

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
def joined_ranks() -> Iterator[Ranks]:
    """The processes of a torchrun, able to exchange results once all are here; or this one alone."""
    ranks = started_ranks()
    if ranks.count == 1:
        yield ranks
        return
    import torch
    from torch import distributed

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        ranks.wait()
        yield ranks
    finally:
        distributed.destroy_process_group()
