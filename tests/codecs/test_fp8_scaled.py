"""FP8 with one scale a row or a tensor, and blocks with 16-bit scales, against torch's own e4m3."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery.codecs.codec import WHOLE
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.fp8_scaled import Fp8Scaled
from surgery.codecs.mxfp4_packed import Mxfp4Packed

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.07


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_codes_are_the_nearest_under_the_largest_magnitude(per: str, dtype: str) -> None:
    codec, weights = Fp8Scaled(per, dtype), values(33, 50)  # type: ignore[arg-type]
    weights[5] = 0
    largest = weights.double().abs().amax(1, keepdim=True)
    if per == "tensor":
        largest = largest.amax(0, keepdim=True)
    scales = (largest.float() / 448).to(DTYPES[dtype]).float()
    scales[scales == 0] = 1
    expected = (weights / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    raw = codec.encode(weights)
    assert raw["weight"].tobytes() == expected.view(torch.uint8).numpy().tobytes()
    assert raw["scale"].nbytes == scales.numel() * DTYPES[dtype].itemsize
    decoded = codec.decode((33, 50), 0, 33, raw).double()
    exact = expected.double() * scales.double()
    assert (decoded - exact).norm() / exact.norm() < 1e-7
    assert all(codec.finite(key, data) for key, data in raw.items())
    assert [spec.shape for spec in codec.parts((33, 50))] == [(33, 50), (1,) if per == "tensor" else (33, 1)]


def test_rows_of_a_channel_form_can_be_cut_and_those_of_a_tensor_form_cannot() -> None:
    codec, weights = Fp8Scaled(), values(20, 6)
    raw = codec.encode(weights)
    spans = codec.spans((20, 6), 7, 20)
    piece = {key: data[slice(*spans[key])] for key, data in raw.items()}
    assert torch.equal(codec.decode((20, 6), 7, 20, piece), codec.decode((20, 6), 0, 20, raw)[7:])
    assert codec.granule == 1
    assert Fp8Scaled("tensor").granule == WHOLE


def test_what_is_not_finite_is_noticed_and_a_tensor_without_rows_is_none() -> None:
    codec = Fp8Scaled("channel", "F32")
    weights = values(3, 4)
    weights[1, 2] = torch.nan
    raw = codec.encode(weights)
    assert not codec.finite("weight", raw["weight"])
    assert not codec.finite("scale", raw["scale"])
    assert codec.encode(torch.empty(0, 4))["weight"].size == 0


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_blocks_choose_codes_under_the_scale_that_is_stored(dtype: str) -> None:
    codec, weights = Fp8Block(dtype, suffix="_scale"), values(200, 130)
    raw = codec.encode(weights)
    stored = torch.from_numpy(raw["scale"]).view(DTYPES[dtype]).float().view(2, 2)
    for down in range(2):
        for across in range(2):
            block = (slice(down * 128, down * 128 + 128), slice(across * 128, across * 128 + 128))
            scale = (weights[block].abs().max() / 448).to(DTYPES[dtype]).float()
            assert scale == stored[down, across]
            codes = (weights[block] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            decoded = codec.decode((200, 130), 0, 200, raw)[block]
            assert torch.equal(decoded, codes.float() * scale)
    assert codec.finite("scale", raw["scale"])
    assert not codec.finite("scale", np.frombuffer(b"\xff\xff" * 4, np.uint8))


def test_mxfp4_of_one_matrix_has_two_codes_a_byte_and_an_exponent_for_32() -> None:
    codec = Mxfp4Packed()
    row = torch.tensor([0.5, -6.0, *[0.0] * 30, 3.0, *[1.0] * 31])
    raw = codec.encode(row.view(1, 64))
    assert raw["packed"].nbytes == 32
    assert raw["packed"][0] == 0x1 | 0xF << 4  # 0.5, and -6 in the high nibble
    assert raw["scale"].tolist() == [127, 126]  # 3 = 6 · 2^-1
    assert torch.equal(codec.decode((1, 64), 0, 1, raw), row.view(1, 64))
    assert [(spec.suffix, spec.shape) for spec in codec.parts((3, 64))] == [
        ("_packed", (3, 32)),
        ("_scale", (3, 2)),
    ]
    assert codec.spans((3, 64), 1, 3) == {"packed": (32, 96), "scale": (2, 6)}
    assert not codec.finite("scale", np.array([255], np.uint8))
