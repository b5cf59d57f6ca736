"""The C structures of kernels/, field by field."""

from __future__ import annotations

import ctypes


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


class Thin(ctypes.Structure):
    """struct Thin of kernels/cpu/merge.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("divide", ctypes.c_int32),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("density", ctypes.c_float),
        ("factor", ctypes.c_float),
        ("states", ctypes.c_void_p),
    )


class Tasks(ctypes.Structure):
    """struct Tasks of kernels/cpu/merge.h."""

    _fields_ = (
        ("at", Combine),
        ("thins", ctypes.POINTER(Thin)),
        ("elect", ctypes.c_int32),
        ("divide", ctypes.c_int32),
        ("share", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("drawn", ctypes.c_void_p),
    )


class Fusion(ctypes.Structure):
    """struct Fusion of kernels/cpu/merge.h."""

    _fields_ = (("at", Combine), ("row_weights", ctypes.c_void_p), ("threshold", ctypes.c_float))


class Counting(ctypes.Structure):
    """struct Counting of kernels/cpu/merge.h."""

    _fields_ = (
        ("at", Combine),
        ("row_weights", ctypes.c_void_p),
        ("digits", ctypes.c_void_p),
        ("digit_count", ctypes.c_int32),
        ("counts", ctypes.c_void_p),
    )


class Products(ctypes.Structure):
    """struct Products of kernels/cpu/merge.h."""

    _fields_ = (("at", Combine), ("offset", ctypes.c_int32))


class Divergence(ctypes.Structure):
    """struct Divergence of kernels/cpu/merge.h."""

    _fields_ = (("at", Combine), ("out", ctypes.c_void_p))
