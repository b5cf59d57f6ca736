"""A GPU in the stream: every worker thread has a lane of its own to the device and back.

A thread reads a tile's bytes into page-locked memory, and its lane (a CUDA stream) copies them to the device,
runs the kernel and copies the result back to page-locked memory, from which the thread writes it. Lanes do
not wait for one another, so reads, copies both ways, kernels and writes of several threads overlap. Results
are those of the CPU to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from threading import local
from typing import TYPE_CHECKING, Any, TypeVar

from surgery.errors import PlanError, UsageError

if TYPE_CHECKING:
    import torch

    from surgery.codecs.ops import Operand

Result = TypeVar("Result")

SMALLEST = (1 << 18) + 1
"""Weights from which on a tile is worth the way: more than a tensor has that shares a job with others, since
such a job holds several results and a lane one."""


def gpu_of(device: str) -> str | None:
    """The CUDA device that `cpu`, `cuda`, `cuda:N` or `auto` stands for; None for the CPU. Raises UsageError
    for what there is none of."""
    if device == "cpu":
        return None
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else None
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"no such device: {device}", hint="use cpu, cuda or auto") from error
    if place.type == "cpu":
        return None
    if place.type != "cuda" or (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"torch finds no {device} here", hint="use the device cpu")
    return device


@dataclass(frozen=True)
class GpuUse:
    """What all threads tell of a GPU: a 1 for each pass over a tile, and why there was none where it has no
    kernels for tiles that were worth one."""

    passes: list[int] = field(default_factory=list)
    reasons: set[str] = field(default_factory=set)


class Lanes(local):
    """The calling thread's lane to a CUDA device."""

    def __init__(self, device: str, use: GpuUse) -> None:
        import torch

        self._use = use
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pinned: dict[int, torch.Tensor] = {}

    def takes(self, parents: Sequence[Operand]) -> bool:
        """Whether they are worth the way, and there are kernels for so many."""
        from surgery.codecs.dispatch import cuda_library
        from surgery.codecs.native import choice
        from surgery.codecs.ops import MOST_ON_CUDA

        if parents[0].values.numel() < SMALLEST or len(parents) > MOST_ON_CUDA:
            return False
        found = cuda_library(self.device)
        if found.library is None:
            self._use.reasons.add(found.reason or f"SURGERY_KERNELS={choice()}")
        return found.library is not None

    def computed(self, parents: Sequence[Operand], work: Callable[[Sequence[Operand]], Result]) -> Result:
        """What `work` makes of the parents there (an operand, a tensor, None or a tuple of these), from
        and to host memory; valid until this thread's next call. Raises PlanError where the GPU is full."""
        import torch

        from surgery.codecs import ops

        try:
            with torch.cuda.stream(self._stream):
                there = [
                    ops.Operand(self._up(each.values), None if each.scales is None else self._up(each.scales))
                    for each in parents
                ]
                found: Result = self._down(work(there), count())
                self._stream.synchronize()
        except torch.cuda.OutOfMemoryError as error:
            shape = list(parents[0].values.shape)
            raise PlanError(
                f"{self.device} has no room for a tile of {len(parents)} parents of {shape}",
                hint="free its memory, lower --threads or --memory, or use --device cpu",
            ) from error
        self._use.passes.append(1)
        return found

    def _up(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _down(self, made: Any, slots: Iterator[int]) -> Any:
        from surgery.codecs.ops import Operand

        if made is None:
            return None
        if isinstance(made, tuple):
            return tuple(self._down(each, slots) for each in made)
        if isinstance(made, Operand):
            return Operand(self._down(made.values, slots), self._down(made.scales, slots))
        return self._tensor_down(made, next(slots))

    def _tensor_down(self, tensor: torch.Tensor, slot: int) -> torch.Tensor:
        import torch

        flat = tensor.view(-1).view(torch.uint8)
        held = self._pinned.get(slot)
        if held is None or held.numel() < flat.numel():
            held = self._pinned[slot] = torch.empty(flat.numel(), dtype=torch.uint8, pin_memory=True)
        room = held[: flat.numel()].copy_(flat, non_blocking=True)
        return room.view(tensor.dtype).view(tensor.shape)
