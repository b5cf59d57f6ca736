"""Reproducible uniform noise beside a tensor: an input whose rows depend on seed, names and row alone.

Blocks of 128 rows have a generator each, keyed by SHA-256 of the recipe's seed, the tensor, the model and the
block, so that neither the order of work nor the size of a tile changes a number.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

from surgery.codecs.codec import matrix_shape
from surgery.stream.checkpoint import ReadContext, StoredRef, TensorRef

if TYPE_CHECKING:
    import numpy as np
    import torch

BLOCK_ROWS = 128


class NoiseRef(TensorRef):
    """Uniform float32 numbers in [0, 1) with the shape of another tensor."""

    __slots__ = ("key",)

    def __init__(self, like: TensorRef, seed: int, model: str) -> None:
        super().__init__(like.name, like.shape, like.info, like.codec, like.parts)
        self.key = f"{seed}\0{like.name}\0{model}"

    @property
    def granule(self) -> int:
        return BLOCK_ROWS

    def tile_rows(self) -> int:
        return BLOCK_ROWS

    def pull(self, start: int, stop: int, context: ReadContext) -> torch.Tensor:
        import numpy as np
        import torch

        cols = matrix_shape(self.shape)[1]
        first = start // BLOCK_ROWS
        values = np.empty(((stop - first * BLOCK_ROWS), cols), np.float32)
        for block in range(first, -(-stop // BLOCK_ROWS)):
            generator = np.random.Generator(self._source(block))
            place = values[(block - first) * BLOCK_ROWS : (block - first + 1) * BLOCK_ROWS]
            generator.random(dtype=np.float32, out=place)
        tile = torch.from_numpy(values)[start - first * BLOCK_ROWS :]
        return tile.reshape(-1) if len(self.shape) < 2 else tile

    def states(self, start: int, stop: int) -> torch.Tensor:
        """Where the generators of rows start..stop begin: int64 [blocks, 4], the words of SFC64."""
        import numpy as np
        import torch

        blocks = range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS))
        words = np.stack([self._source(block).state["state"]["state"] for block in blocks])
        return torch.from_numpy(words.view(np.int64))

    def _source(self, block: int) -> np.random.SFC64:
        import numpy as np

        digest = sha256(f"{self.key}\0{block}".encode()).digest()
        return np.random.SFC64(int.from_bytes(digest[:16], "little"))

    def sources(self) -> tuple[StoredRef, ...]:
        return ()

    def lineage(self) -> dict[str, Any]:
        return {"op": "noise"}
