"""How much memory a tile takes while it is made, from headers alone.

It is counted as if every tile were made by torch: with native kernels it is less. Tiles of inputs are pulled
one after the other and held until they are combined, so the peak is that of the last input or of `combine`.
"""

from __future__ import annotations

from surgery.codecs.codec import matrix_shape
from surgery.codecs.plain import Plain
from surgery.stream.checkpoint import ComputedRef, StoredRef, TensorRef

CODING = 4
"""float32 tiles that decoding or encoding anything but a plain dtype may hold beside its values."""
COMBINING = 3
"""float32 tiles beside its inputs that `combine` or a part of `decide` holds at once, the result among
them, for kernels without `temporaries`."""


def tile_bytes(ref: TensorRef, rows: int) -> int:
    """Peak bytes of computing `rows` rows of a tensor and encoding them; all bytes of a stored one."""
    if isinstance(ref, StoredRef):
        return ref.nbytes
    tile = 4 * rows * matrix_shape(ref.shape)[1]
    return max(_pull_bytes(ref, tile), tile + _coding(ref, tile) + _raw_bytes(ref, tile))


def _pull_bytes(ref: TensorRef, tile: int) -> int:
    if isinstance(ref, StoredRef):
        return tile + _coding(ref, tile) + _raw_bytes(ref, tile) * (2 if ref.is_view else 1)
    if not isinstance(ref, ComputedRef):
        return tile
    pulled = max(index * tile + _pull_bytes(each, tile) for index, each in enumerate(ref.inputs))
    room = getattr(ref.kernel, "temporaries", COMBINING)
    return max(pulled, int((len(ref.inputs) + room) * tile))


def _coding(ref: TensorRef, tile: int) -> int:
    return 0 if isinstance(ref.codec, Plain) else CODING * tile


def _raw_bytes(ref: TensorRef, tile: int) -> int:
    return ref.nbytes * tile // (4 * ref.numel) if ref.numel else 0
