"""The native libraries behind ctypes: load once per process, and say why where there is none.

`SURGERY_KERNELS` chooses: unset, CPU and CUDA kernels where they can be built; `off` or `reference`,
the torch reference alone; `cpu`, no CUDA kernels; `cuda`, as unset, but a failure is an error.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

from surgery.codecs import structures
from surgery.codecs.compile import compiler_version, cpu_library, cuda_library, find_compiler
from surgery.errors import SurgeryError, UsageError

CHOICES = ("off", "reference", "cpu", "cuda")
FP8_BLOCK, BF16, F32, F16 = range(4)
"""Kinds of operands, as in kernels/core/bits.h."""


JOBS = {
    "combine": structures.Combine,
    "sweep": structures.Sweep,
    "stream": structures.Stream,
    "nibbles": structures.Nibbles,
    "awq": structures.AwqWords,
    "to_stream": structures.ToStream,
    "to_nibbles": structures.ToNibbles,
    "tasks": structures.Tasks,
    "sizes": structures.Tasks,
    "fusion": structures.Fusion,
    "products": structures.Products,
    "counting": structures.Counting,
    "divergence": structures.Divergence,
}
"""Operations that take one structure."""


_BUILDING = Lock()  # threads that ask at once would each build


@dataclass(frozen=True)
class Native:
    """A loaded library (None where there is none) and what to tell about it."""

    library: Any
    path: str
    """`cpu avx512`, `cuda sm_90a`, or `reference`."""
    reason: str = ""
    """Why there is no library; empty where there is one or none was wanted."""
    compiler: str = ""


def choice() -> str:
    """SURGERY_KERNELS, empty where unset. Raises UsageError for any other word."""
    found = os.environ.get("SURGERY_KERNELS", "")
    if found and found not in CHOICES:
        raise UsageError(f"SURGERY_KERNELS={found} is none of {', '.join(CHOICES)}")
    return found


def cpu() -> Native:
    """The CPU kernels, built on first use."""
    if choice() in ("off", "reference"):
        return Native(None, "reference")
    return _load_cpu()


def cuda(capability: tuple[int, int]) -> Native:
    """The CUDA kernels for a device of this compute capability, built on first use.

    Raises SurgeryError where there are none and SURGERY_KERNELS=cuda.
    """
    wanted = choice()
    if wanted in ("off", "reference", "cpu"):
        return Native(None, "reference")
    found = _load_cuda(capability)
    if found.library is None and wanted == "cuda":
        raise SurgeryError(f"SURGERY_KERNELS=cuda, but {found.reason}", hint="surgery kernels status")
    return found


@lru_cache(maxsize=1)
def _load_cpu() -> Native:
    try:
        with _BUILDING:
            library = ctypes.CDLL(str(cpu_library()))
        compiler = compiler_version(find_compiler("cpu"))
    except (SurgeryError, OSError) as error:
        return Native(None, "reference", f"no CPU kernels: {error}")
    pointer, i32, i64, u64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
    library.surgery_cpu_decode.argtypes = (pointer, pointer, pointer, pointer, i32, i64, i64, i32)
    library.surgery_cpu_largest.argtypes = (pointer, pointer, pointer, i32, u64, i64, pointer, i32)
    for operation, job in JOBS.items():
        getattr(library, f"surgery_cpu_{operation}").argtypes = (pointer, ctypes.POINTER(job), i32)
    library.surgery_cpu_isa.restype = ctypes.c_char_p
    return Native(library, f"cpu {library.surgery_cpu_isa().decode()}", compiler=compiler)


@lru_cache(maxsize=4)
def _load_cuda(capability: tuple[int, int]) -> Native:
    name = f"{capability[0]}{capability[1]}" + ("a" if capability in ((9, 0), (10, 0)) else "")
    try:
        with _BUILDING:
            library = ctypes.CDLL(str(cuda_library((name,))))
        compiler = compiler_version(find_compiler("cuda"))
    except (SurgeryError, OSError) as error:
        return Native(None, "reference", f"no CUDA kernels: {error}")
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.surgery_cuda_decode.argtypes = (pointer, pointer, pointer, i32, i64, i64, pointer)
    for operation, job in JOBS.items():
        getattr(library, f"surgery_cuda_{operation}").argtypes = (ctypes.POINTER(job), pointer)
    library.surgery_cuda_largest.argtypes = (pointer, pointer, i32, ctypes.c_uint64, i64, pointer, pointer)
    library.surgery_cuda_error.argtypes = (i32,)
    library.surgery_cuda_error.restype = ctypes.c_char_p
    return Native(library, f"cuda sm_{name}", compiler=compiler)
