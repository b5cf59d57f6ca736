"""Where kernels run in tests: devices that are here, and each instruction set that the processor has."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from surgery.codecs import native

SETS = ("portable", "avx2", "avx512")
kernels = pytest.mark.skipif(native.cpu().library is None, reason=f"no kernels: {native.cpu().reason}")
gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=kernels), pytest.param("cuda", marks=gpu)]
)


def loops(name: str) -> int:
    """Where the loops of an instruction set lie; skips the test where the processor lacks it."""
    best = native.cpu().path.removeprefix("cpu ")
    if best not in SETS or SETS.index(name) > SETS.index(best):
        pytest.skip(f"this processor has no {name}")
    return ctypes.addressof(ctypes.c_char.in_dll(native.cpu().library, f"surgery_loops_{name}"))


def pinned(name: str) -> native.Native:
    """The CPU kernels held to one instruction set."""
    library, chosen = native.cpu().library, loops(name)

    class Pinned:
        def __getattr__(self, function: str) -> Any:
            return lambda _, *rest: getattr(library, function)(chosen, *rest)

    return native.Native(Pinned(), "pinned")
