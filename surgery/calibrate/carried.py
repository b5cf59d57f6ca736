"""Matrices on their way to the device that computes: stored codes as they are, decoded where they arrive.

plain     values of any shape
FP8       uint8 codes [R, C] with float32 scales [⌈R/128⌉, ⌈C/128⌉]
packed    int32 words [R, ·] of `bits` a code, with float32 scales and uint8 zero points [R, groups]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.calibrate.state import decode
from surgery.codecs.fp8_block import BLOCK, Fp8Block
from surgery.codecs.packed_int import PackedInt
from surgery.stream.checkpoint import StoredRef

if TYPE_CHECKING:
    import torch

    from surgery.stream.checkpoint import TensorRef


@dataclass(frozen=True)
class StoredForm:
    """See the module docstring. `bits` is 0 unless codes are packed, `cols` then the columns, `middle` the
    zero point of all groups where `zeros` is None."""

    codes: torch.Tensor | None
    scales: torch.Tensor | None
    plain: torch.Tensor | None
    zeros: torch.Tensor | None = None
    bits: int = 0
    cols: int = 0
    middle: int = 0

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._tensors())

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        every = (self.codes, self.scales, self.plain, self.zeros)
        return tuple(each for each in every if each is not None)

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> StoredForm:
        codes, scales, plain, zeros = (
            None if each is None else change(each)
            for each in (self.codes, self.scales, self.plain, self.zeros)
        )
        return replace(self, codes=codes, scales=scales, plain=plain, zeros=zeros)

    def to(self, device: torch.device) -> StoredForm:
        """On another device; from pinned memory the copy does not wait."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> StoredForm:
        """In page-locked host memory."""
        return self._changed(lambda tensor: tensor.pin_memory())

    def record(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until `stream` has come to this point."""
        for each in self._tensors():
            each.record_stream(stream)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Decoded into `dtype`, where it lies."""
        if self.plain is not None:
            return self.plain.to(dtype)
        if self.codes is None or self.scales is None:
            raise TypeError("codes without scales")
        if self.bits:
            from surgery.codecs.packed_ops import KINDS, decode_stream

            zeros = self.middle if self.zeros is None else self.zeros
            wanted = dtype if dtype in KINDS else next(iter(KINDS))
            return decode_stream(self.codes, self.bits, self.cols, self.scales, zeros, wanted).to(dtype)
        from surgery.codecs.ops import decode_fp8_block

        return decode_fp8_block(self.codes, self.scales, dtype)

    @classmethod
    def stack(cls, forms: list[StoredForm]) -> StoredForm | None:
        """Matrices under one another in one form; None where their forms or blocks do not allow it."""
        import torch

        plain = [each.plain for each in forms if each.plain is not None]
        if len(plain) == len(forms):
            return cls(None, None, torch.cat(plain))
        first = forms[0]
        codes = [each.codes for each in forms if each.codes is not None]
        scales = [each.scales for each in forms if each.scales is not None]
        zeros = [each.zeros for each in forms if each.zeros is not None]
        packing = {(each.bits, each.cols, each.middle, each.zeros is None) for each in forms}
        if len(codes) < len(forms) or len(packing) > 1 or len({each.shape[1] for each in scales}) > 1:
            return None
        if not first.bits and any(each.shape[0] % BLOCK for each in codes[:-1]):
            return None
        stacked = torch.cat(zeros) if zeros else None
        return replace(first, codes=torch.cat(codes), scales=torch.cat(scales), zeros=stacked)


def stored_form(ref: TensorRef, dtype: torch.dtype) -> StoredForm:
    """A tensor as it is best carried to a device: stored codes as they are, anything else in `dtype`."""
    import torch

    codec = ref.codec
    if isinstance(ref, StoredRef) and not ref.is_view:
        if isinstance(codec, Fp8Block):
            raw = {part.key: torch.from_numpy(ref.raw(part, 0, ref.rows)) for part in ref.parts}
            scales = codec.scales(raw["scale"].numpy(), ref.shape)
            return StoredForm(raw["weight"].view(ref.shape), scales, None)
        if isinstance(codec, PackedInt) and not codec.padded:
            words, scales, zeros = codec.stored(
                (ref.shape[0], ref.shape[1]), {part.key: ref.raw(part, 0, ref.rows) for part in ref.parts}
            )
            points = zeros if isinstance(zeros, torch.Tensor) else None
            middle = 0 if isinstance(zeros, torch.Tensor) else zeros
            return StoredForm(words, scales, None, points, codec.scheme.bits, ref.shape[1], middle)
    kept = torch.float32 if codec.name == "f32" else dtype
    return StoredForm(None, None, decode(ref, kept))
