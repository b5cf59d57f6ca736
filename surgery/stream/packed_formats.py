"""Output formats of other tools than compressed-tensors, tensor by tensor: GPTQ, AWQ, bitsandbytes, MXFP4.

gptq, gptq-v2   integers of 2, 3, 4 or 8 bits, codes and scales carried over
awq             integers of 4 bits; symmetric ones get the zero point 8, as the form has no others
bnb-nf4         linear weights of experts, attention and dense MLPs, rounded to NF4
mxfp4           gpt-oss' fused experts, rounded to MXFP4

Weights that are not quantized stay as they are, so integers need a step that chooses them.
"""

from __future__ import annotations

from surgery.codecs.awq import Awq
from surgery.codecs.codec import Codec, IntCodec
from surgery.codecs.gptq import BITS, Gptq
from surgery.codecs.mxfp4 import GROUP, Mxfp4Blocks
from surgery.codecs.nf4 import Bnb4
from surgery.codecs.plain import Opaque, Plain
from surgery.codecs.schemes import IntScheme
from surgery.errors import PlanError
from surgery.stream.checkpoint import StoredRef, TensorRef
from surgery.stream.mxfp4 import block_parts
from surgery.stream.recode import recode, stored_as
from surgery.stream.roles import QUANTIZED_ROLES

DTYPES = {"F16": "float16", "F32": "float32"}


def to_gptq(ref: TensorRef) -> TensorRef:
    return _to_integers("gptq", ref, BITS)


def to_gptq_v2(ref: TensorRef) -> TensorRef:
    return _to_integers("gptq-v2", ref, BITS)


def to_awq(ref: TensorRef) -> TensorRef:
    return _to_integers("awq", ref, (4,))


def _to_integers(form: str, ref: TensorRef, bits: tuple[int, ...]) -> TensorRef:
    codec = ref.codec
    if isinstance(codec, Plain | Opaque):
        return ref
    if not isinstance(codec, IntCodec) or not ref.name.endswith(".weight"):
        raise _refusal(form, ref, "no whole numbers", "compressed-tensors or bf16")
    scheme = codec.scheme
    target: Gptq | Awq
    if form == "awq":
        target = Awq(IntScheme(scheme.bits, scheme.group_size, symmetric=False))
    else:
        target = Gptq(scheme, 2 if form == "gptq-v2" else 1)
    if isinstance(codec, Gptq) and codec.act_order:
        if isinstance(target, Gptq) and codec.version == target.version:
            return ref
        raise _refusal(form, ref, "its groups are scattered over the columns", "source or bf16")
    if scheme.bits not in bits:
        raise _refusal(form, ref, f"not {' or '.join(map(str, bits))} bits", "compressed-tensors")
    reason = target.fits(ref.shape)
    if reason or ref.is_view:
        raise _refusal(form, ref, reason or "part of a fused tensor", "compressed-tensors or bf16")
    return ref if codec == target else stored_as(ref, target)


def to_bnb_nf4(ref: TensorRef) -> TensorRef:
    codec = ref.codec
    if isinstance(codec, Bnb4) and codec.kind == "nf4" and (codec.encodable or isinstance(ref, StoredRef)):
        return ref
    linear = len(ref.shape) == 2 and min(ref.shape) > 1 and ref.name.endswith(".weight")
    if not codec.decodable or not (linear and ref.info.role in QUANTIZED_ROLES):
        return ref if isinstance(codec, Plain | Opaque) else stored_as(ref, Plain("BF16"))
    if ref.is_view:
        raise _refusal("bnb-nf4", ref, "one expert of a fused tensor", "source or bf16")
    return stored_as(ref, Bnb4(dtype=_weights_dtype(codec)))


def _weights_dtype(codec: Codec) -> str:
    """What bitsandbytes is to decode to."""
    if isinstance(codec, Bnb4):
        return codec.dtype
    return DTYPES.get(codec.dtype, "bfloat16") if isinstance(codec, Plain) else "bfloat16"


def to_mxfp4(ref: TensorRef) -> TensorRef:
    """`apply_format` has seen that the model is a gpt-oss."""
    codec = ref.codec
    if isinstance(codec, Mxfp4Blocks | Opaque) or (isinstance(codec, Plain) and not _is_fused_weight(ref)):
        return ref
    if not isinstance(codec, Plain):
        raise _refusal("mxfp4", ref, "quantized otherwise", "source or bf16")
    if ref.shape[1] % GROUP:
        reason = f"groups of {GROUP} do not divide {ref.shape[1]} columns"
        raise _refusal("mxfp4", ref, reason, "source or bf16")
    return recode(ref, Mxfp4Blocks(), block_parts(ref))


def _is_fused_weight(ref: TensorRef) -> bool:
    return ref.is_view and ref.info.role == "routed_expert" and len(ref.shape) == 2


def _refusal(form: str, ref: TensorRef, reason: str, others: str) -> PlanError:
    return PlanError(
        f"{form} cannot express {ref.name}, which is stored as {ref.codec.name}: {reason}",
        hint=f"write output.format={others}",
    )
