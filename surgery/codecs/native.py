"""The native libraries behind ctypes: load once per process, and say why where there is none.

`SURGERY_KERNELS` chooses: unset, CPU and CUDA kernels where they can be built; `off` or `reference`,
the torch reference alone; `cpu`, no CUDA kernels; `cuda`, as unset, but a failure is an error.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from surgery.codecs.compile import compiler_version, cpu_library, cuda_library, find_compiler
from surgery.errors import SurgeryError, UsageError

CHOICES = ("off", "reference", "cpu", "cuda")
FP8_BLOCK, BF16, F32, F16 = range(4)
"""Kinds of operands, as in kernels/core/bits.h."""


class Combine(ctypes.Structure):
    """struct Combine of kernels/cpu/blocks.h."""

    _fields_ = (
        ("parents", ctypes.POINTER(ctypes.c_void_p)),
        ("kinds", ctypes.POINTER(ctypes.c_int32)),
        ("scales", ctypes.POINTER(ctypes.c_void_p)),
        ("weights", ctypes.POINTER(ctypes.c_float)),
        ("count", ctypes.c_int32),
        ("out", ctypes.c_void_p),
        ("out_kind", ctypes.c_int32),
        ("out_scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("ue8m0", ctypes.c_int32),
    )


class Sweep(ctypes.Structure):
    """struct Sweep of kernels/core/sweep.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("weight_batch", ctypes.c_int64),
        ("weight_row", ctypes.c_int64),
        ("factor", ctypes.c_void_p),
        ("factor_batch", ctypes.c_int64),
        ("factor_row", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_batch", ctypes.c_int64),
        ("mask_row", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("group", ctypes.c_void_p),
        ("group_batch", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("value_batch", ctypes.c_int64),
        ("value_row", ctypes.c_int64),
        ("errors", ctypes.c_void_p),
        ("error_batch", ctypes.c_int64),
        ("error_row", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("code_batch", ctypes.c_int64),
        ("code_row", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("cols", ctypes.c_int32),
        ("prune", ctypes.c_int32),
        ("of", ctypes.c_int32),
        ("top", ctypes.c_int32),
    )


class Stream(ctypes.Structure):
    """struct Stream of kernels/core/packed.h."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_words", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("zero", ctypes.c_int32),
    )


class Nibbles(ctypes.Structure):
    """struct Nibbles of kernels/core/packed.h."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("high_first", ctypes.c_int32),
    )


class AwqWords(ctypes.Structure):
    """struct AwqWords of kernels/core/packed.h."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("kind", ctypes.c_int32),
    )


class ToStream(ctypes.Structure):
    """struct ToStream of kernels/core/encode.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("top", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
    )


class ToNibbles(ctypes.Structure):
    """struct ToNibbles of kernels/core/encode.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("bytes", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("borders", ctypes.c_float * 15),
    )


JOBS = {
    "combine": Combine,
    "sweep": Sweep,
    "stream": Stream,
    "nibbles": Nibbles,
    "awq": AwqWords,
    "to_stream": ToStream,
    "to_nibbles": ToNibbles,
}
"""Operations that take one structure."""


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
        library = ctypes.CDLL(str(cpu_library()))
        compiler = compiler_version(find_compiler("cpu"))
    except (SurgeryError, OSError) as error:
        return Native(None, "reference", f"no CPU kernels: {error}")
    pointer, i32, i64, u64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
    library.surgery_cpu_decode.argtypes = (pointer, pointer, pointer, pointer, i32, i64, i64, i32)
    library.surgery_cpu_largest.argtypes = (pointer, pointer, pointer, i32, u64, i64, pointer, i32)
    for operation, job in JOBS.items():
        getattr(library, f"surgery_cpu_{operation}").argtypes = (pointer, ctypes.POINTER(job), i32)
    library.surgery_cpu_tasks.argtypes = (pointer, pointer, i32)
    library.surgery_cpu_sizes.argtypes = (pointer, pointer, i32)
    library.surgery_cpu_fusion.argtypes = (pointer, pointer, i32)
    library.surgery_cpu_products.argtypes = (pointer, pointer, i32, i32)
    library.surgery_cpu_counting.argtypes = (pointer, pointer)
    library.surgery_cpu_divergence.argtypes = (pointer, pointer, pointer, i32)
    library.surgery_cpu_isa.restype = ctypes.c_char_p
    return Native(library, f"cpu {library.surgery_cpu_isa().decode()}", compiler=compiler)


@lru_cache(maxsize=4)
def _load_cuda(capability: tuple[int, int]) -> Native:
    name = f"{capability[0]}{capability[1]}" + ("a" if capability in ((9, 0), (10, 0)) else "")
    try:
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
