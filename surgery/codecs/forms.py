"""The stored form that goes with a scheme, where nobody asks for another: what transformers and vLLM load.

Whole numbers are packed as compressed-tensors does it, and so are scaled FP8 and MXFP4; NF4 is bitsandbytes'.
"""

from __future__ import annotations

from typing import Literal

from surgery.codecs.codec import Codec
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.fp8_scaled import Fp8Scaled
from surgery.codecs.mxfp4_packed import Mxfp4Packed
from surgery.codecs.nf4 import Bnb4
from surgery.codecs.packed_int import PackedInt
from surgery.codecs.schemes import IntScheme, Scheme

ScaleDtype = Literal["bfloat16", "float16", "float32"]
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def codec_of(scheme: Scheme, scale_dtype: ScaleDtype) -> Codec:
    """The codec of a scheme, with scales in `scale_dtype` where the form leaves a choice."""
    if isinstance(scheme, IntScheme):
        return PackedInt(scheme, STORED[scale_dtype])
    match scheme.form:
        case "fp8-channel":
            return Fp8Scaled("channel", STORED[scale_dtype])
        case "fp8-tensor":
            return Fp8Scaled("tensor", STORED[scale_dtype])
        case "fp8-block":
            return Fp8Block()
        case "nf4":
            return Bnb4()
        case "mxfp4":
            return Mxfp4Packed()
