"""Decode a few rows with NumPy alone, for looks at a checkpoint that must not wait for torch.

Recipes of pure copies import no torch, yet their report shows how far the parents are apart. Tests
hold these functions to the codecs' own `decode`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import Codec
from surgery.codecs.fp8_block import BLOCK, Fp8Block
from surgery.codecs.mxfp4 import GROUP, MAGNITUDES, NAN_EXPONENT, Mxfp4Blocks
from surgery.codecs.plain import Plain

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def peek(codec: Codec, rows: int, raw: Mapping[str, Array], columns: int) -> Array | None:
    """float32 [rows, ≤ columns] of stored parts that begin on a block border; None where the form
    cannot be decoded. `columns` is a multiple of 128."""
    import numpy as np

    if isinstance(codec, Plain):
        values = plain_values(codec.dtype, raw["weight"])
        return values.reshape(rows, values.size // rows if rows else 0)[:, :columns]
    if isinstance(codec, Fp8Block) and rows:
        codes = raw["weight"].reshape(rows, -1)[:, :columns]
        down = -(-rows // BLOCK)
        scales = scale_values(codec, raw["scale"]).reshape(down, -1)
        spread = scales.repeat(BLOCK, 0)[:rows].repeat(BLOCK, 1)[:, : codes.shape[1]]
        return np.asarray(e4m3_values()[codes] * spread)
    if isinstance(codec, Mxfp4Blocks) and rows:
        nibbles = raw["blocks"].reshape(rows, -1)[:, : columns // 2]
        codes = np.stack((nibbles & 15, nibbles >> 4), axis=2).reshape(rows, -1)
        magnitudes = np.array(MAGNITUDES, np.float32)
        values = np.concatenate((magnitudes, -magnitudes))[codes]
        exponents = raw["scales"].reshape(rows, -1)[:, : columns // GROUP]
        return np.asarray(values * e8m0_values(exponents).repeat(GROUP, 1))
    return None


def plain_values(dtype: str, raw: Array) -> Array:
    import numpy as np

    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    kinds = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return raw.view(kinds[dtype]).astype(np.float32)


def scale_values(codec: Fp8Block, raw: Array) -> Array:

    if codec.scale_dtype == "F8_E8M0":
        return e8m0_values(raw)
    return plain_values(codec.scale_dtype, raw)


def e8m0_values(raw: Array) -> Array:
    """The powers of two of exponent bytes, NaN for 255."""
    import numpy as np

    powers = np.ldexp(np.float32(1), raw.astype(np.int32) - 127).astype(np.float32)
    return np.where(raw == NAN_EXPONENT, np.float32(np.nan), powers)


def e4m3_values() -> Array:
    """The 256 values of e4m3 by its definition: sign, 4 exponent bits of bias 7, 3 mantissa bits."""
    import numpy as np

    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values = np.where((code & 0x7F) == 0x7F, np.nan, values)
    return np.where(code & 0x80, -values, values).astype(np.float32)
