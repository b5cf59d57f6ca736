"""From tensors to native code: which library serves a device, how it is called, and what it may be given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from surgery.codecs import native
from surgery.errors import SurgeryError, UsageError


def library_for(tensor: torch.Tensor) -> native.Native:
    """The native library that serves this tensor's device."""
    if tensor.device.type == "cuda":
        return cuda_library(tensor.device)
    if tensor.device.type == "cpu":
        return native.cpu()
    return native.Native(None, "reference")


def cuda_library(device: torch.device | str) -> native.Native:
    """The native library of a CUDA device."""
    return native.cuda(_capability(torch.device(device)))


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def call(found: native.Native, name: str, device: torch.device, *arguments: Any) -> None:
    """surgery_cpu_NAME with torch's number of threads, or surgery_cuda_NAME on the device's current stream.

    Raises SurgeryError where CUDA reports an error.
    """
    if device.type != "cuda":
        getattr(found.library, f"surgery_cpu_{name}")(None, *arguments, torch.get_num_threads())
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        status = getattr(found.library, f"surgery_cuda_{name}")(*arguments, stream)
    if status:
        message = found.library.surgery_cuda_error(status).decode()
        raise SurgeryError(f"a CUDA kernel failed: {message}", hint="SURGERY_KERNELS=reference avoids it")


def place(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor lies; None for none."""
    return None if tensor is None else tensor.data_ptr()


def check(
    name: str, tensor: torch.Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], like: torch.Tensor
) -> None:
    """Native code trusts shapes: refuse what does not fit. Raises UsageError."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes or tensor.device != like.device:
        wanted = f"{str(dtypes[0]).removeprefix('torch.')} {list(shape)} on {like.device}"
        raise UsageError(f"{name} must be {wanted}, not {told(tensor)} on {tensor.device}")


def told(tensor: torch.Tensor) -> str:
    """Dtype and shape in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
