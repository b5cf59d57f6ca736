"""Random codes on random grids, for tests of the integer layouts."""

from __future__ import annotations

import torch

from surgery.codecs.grid import Quantized
from surgery.codecs.schemes import IntScheme


def random_codes(scheme: IntScheme, rows: int, cols: int, seed: int) -> Quantized:
    """Codes, fp16 scales above 0 and zero points of [rows, cols]."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(cols)
    codes = torch.randint(0, scheme.top + 1, (rows, cols), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, scheme.top + 1, (rows, groups), generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zeros.fill_(scheme.middle)
    return Quantized(codes, torch.rand(rows, groups, generator=generator).half().float(), zeros)
