"""The NumPy reader of a few rows gives bit for bit what the codecs' own decoding gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from surgery.codecs.codec import Codec
from surgery.codecs.fp8_block import Fp8Block, scale_shape
from surgery.codecs.mxfp4 import Mxfp4Blocks
from surgery.codecs.peek import e4m3_values, peek
from surgery.codecs.plain import ITEMSIZE, Opaque, Plain

SHAPES = [(1, 1), (128, 128), (129, 127), (300, 130), (192, 1100), (256, 384)]
Array = npt.NDArray[Any]


def compare(codec: Codec, shape: tuple[int, ...], raw: dict[str, Array], columns: int) -> None:
    rows = shape[0] if shape else 1
    want = codec.decode(shape, 0, rows, {key: data.copy() for key, data in raw.items()}).numpy()
    want = want.reshape(rows, want.size // rows if rows else 0)[:, :columns]
    with np.errstate(over="ignore", invalid="ignore"):
        found = peek(codec, rows, raw, columns)
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
    kept = ~np.isnan(want)
    np.testing.assert_array_equal(found[kept].view(np.uint32), want[kept].view(np.uint32))


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
@pytest.mark.parametrize("shape", [(), (7,), (0,), (300, 5), (4, 3, 5), (3, 1100)], ids=str)
def test_plain_dtypes_of_any_bits(dtype: str, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 256, int(np.prod(shape)) * ITEMSIZE[dtype], dtype=np.uint8)
    compare(Plain(dtype), shape, {"weight": raw}, 1024)


@pytest.mark.parametrize("scale_dtype", ["F32", "F8_E8M0"])
@pytest.mark.parametrize("columns", [128, 1024])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_blocks_of_any_codes(shape: tuple[int, int], columns: int, scale_dtype: str) -> None:
    generator = np.random.default_rng(1)
    blocks = int(np.prod(scale_shape(shape)))
    if scale_dtype == "F32":
        scales = np.exp2(generator.uniform(-130, 100, blocks)).astype(np.float32).view(np.uint8)
    else:
        scales = generator.integers(0, 255, blocks, dtype=np.uint8)
    raw = {"weight": generator.integers(0, 256, shape[0] * shape[1], dtype=np.uint8), "scale": scales}
    compare(Fp8Block(scale_dtype, scale_dtype == "F8_E8M0"), shape, raw, columns)


def test_a_look_into_the_middle_of_a_tensor() -> None:
    codec = Fp8Block()
    shape = (400, 200)
    raw = codec.encode(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
    whole = codec.decode(shape, 0, 400, {key: data.copy() for key, data in raw.items()}).numpy()
    spans = codec.spans(shape, 128, 256)
    found = peek(codec, 128, {key: raw[key][first:last] for key, (first, last) in spans.items()}, 128)
    np.testing.assert_array_equal(found, whole[128:256, :128])


def test_the_table_of_codes_is_torchs() -> None:
    want = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    np.testing.assert_array_equal(e4m3_values(), want)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(e4m3_values()[numbers].view(np.uint32), want[numbers].view(np.uint32))


def test_forms_that_cannot_be_decoded_give_nothing() -> None:
    assert peek(Opaque("MXFP4"), 1, {"blocks": np.zeros(16, np.uint8)}, 128) is None


@pytest.mark.parametrize("shape", [(1, 32), (7, 160), (33, 1056)], ids=str)
def test_mxfp4_of_any_codes(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(4)
    groups = shape[0] * shape[1] // 32
    raw = {
        "blocks": generator.integers(0, 256, groups * 16, dtype=np.uint8),
        "scales": generator.integers(0, 256, groups, dtype=np.uint8),
    }
    for columns in (128, 1024):
        compare(Mxfp4Blocks(), shape, raw, columns)
