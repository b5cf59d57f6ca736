"""Packed and unpacked integers of compressed-tensors against explicit formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.codecs.carry import carries, carry, scales_change
from surgery.codecs.codec import WHOLE, IntCodec
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.grid import Quantized
from surgery.codecs.packed_int import PackedInt
from surgery.codecs.plain import Plain
from surgery.codecs.plain_int import PlainInt
from surgery.codecs.schemes import IntScheme, parse_scheme
from surgery.errors import CheckpointError, UsageError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Raw = dict[str, np.ndarray[Any, Any]]


def scheme(text: str) -> IntScheme:
    found = parse_scheme(text)
    assert isinstance(found, IntScheme)
    return found


def drawn(shape: tuple[int, int], of: IntScheme, dtype: str = "BF16", seed: int = 0) -> Quantized:
    """Random codes on a random grid, scales representable in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    groups = (shape[0], of.groups(shape[1]))
    codes = torch.randint(0, of.top + 1, shape, generator=generator).to(torch.uint8)
    scales = (torch.rand(groups, generator=generator) + 0.1).to(DTYPES[dtype]).float()
    zeros = torch.full(groups, of.middle)
    if not of.symmetric:
        zeros = torch.randint(0, of.top + 1, groups, generator=generator)
    return Quantized(codes, scales, zeros.to(torch.uint8))


def whole(codec: Any, shape: tuple[int, int], raw: Raw) -> Raw:
    """All parts, each of the size that the codec promises."""
    found = codec.constants(shape) | raw
    sizes = {"I32": 4, "I64": 8, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}
    specs = {spec.key: int(np.prod(spec.shape)) * sizes[spec.dtype] for spec in codec.parts(shape)}
    assert {key: data.nbytes for key, data in found.items()} == specs
    return found


def equal(a: Quantized, b: Quantized) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["channel", "g16", "channel-asym", "g16-asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_and_grid_come_back_from_every_integer_form(bits: int, kind: str, dtype: str) -> None:
    of, shape = scheme(f"int{bits}-{kind}"), (37, 48)
    codes = drawn(shape, of, dtype, bits)
    for codec in (PackedInt(of, dtype), PackedInt(of, dtype, padded=True), PlainInt(of, dtype)):
        assert isinstance(codec, IntCodec)
        raw = whole(codec, shape, codec.pack(codes))
        assert equal(codec.quantized(shape, raw), codes), codec.name
        values = codec.decode(shape, 0, shape[0], raw).double()
        spread = shape[1] // codes.scales.shape[1]
        grid = [each.double().repeat_interleave(spread, 1) for each in (codes.scales, codes.zeros)]
        exact = (codes.codes.double() - grid[1]) * grid[0]
        assert (values - exact).norm() / exact.norm() < 1e-7
        assert all(codec.finite(key, data) for key, data in raw.items())


def test_the_bytes_of_a_packed_tensor_are_those_of_the_layout() -> None:
    of = scheme("int4-g4-asym")
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]], dtype=torch.uint8)
    zeros = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    raw = PackedInt(of, "F32").pack(Quantized(codes, torch.tensor([[1.0, 2.0], [0.5, 0.25]]), zeros))
    assert raw["packed"].view(np.uint32).tolist() == [0x76543210, 0x89ABCDEF]
    assert raw["zero"].view(np.uint32).tolist() == [0x31, 0x42]  # down the rows, one word a group
    assert raw["scale"].view(np.float32).tolist() == [1, 2, 0.5, 0.25]
    assert PackedInt(of).constants((2, 8))["shape"].view(np.int64).tolist() == [2, 8]
    plain = PlainInt(scheme("int8-channel")).pack(
        Quantized(
            torch.tensor([[0, 128, 255]], dtype=torch.uint8),
            torch.ones(1, 1),
            torch.tensor([[128]], dtype=torch.uint8),
        )
    )
    assert plain["weight"].view(np.int8).tolist() == [-128, 0, 127]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 8), st.booleans(), st.sampled_from([0, 8, 24]), st.integers(1, 300), st.integers(1, 3),
    st.integers(0, 99),
)  # fmt: skip
def test_tiles_put_together_are_the_tensor(
    bits: int, symmetric: bool, group: int, rows: int, groups: int, seed: int
) -> None:
    of, shape = IntScheme(bits, group, symmetric), (rows, (group or 7) * groups)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for codec in (PackedInt(of), PlainInt(of)):
        raw = whole(codec, shape, codec.encode(weights))
        joined = codec.constants(shape)
        for start in range(0, rows, 128):
            stop = min(start + 128, rows)
            spans = codec.spans(shape, start, stop)
            piece = {key: data[slice(*spans[key])] for key, data in raw.items()}
            tile = codec.decode(shape, start, stop, piece)
            assert torch.equal(tile, codec.decode(shape, 0, rows, raw)[start:stop])
            for key, data in codec.encode(weights[start:stop]).items():
                joined[key] = np.concatenate((joined.get(key, np.empty(0, np.uint8)), data))
        assert {key: data.tobytes() for key, data in joined.items()} == {
            key: data.tobytes() for key, data in raw.items()
        }


@pytest.mark.parametrize("kind", ["g32", "g32-asym", "channel", "channel-asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_to_the_nearest_point_of_the_grid_over_each_group(bits: int, kind: str) -> None:
    of = scheme(f"int{bits}-{kind}")
    weights = torch.randn(9, 64, generator=torch.Generator().manual_seed(bits))
    codec = PackedInt(of, "F32")
    decoded = codec.decode((9, 64), 0, 9, codec.constants((9, 64)) | codec.encode(weights)).double()
    groups = weights.double().view(9, of.groups(64), -1)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    step = 2 * torch.maximum(high, -low) / of.top if of.symmetric else (high - low) / of.top
    assert ((decoded - weights.double()).view(groups.shape).abs() <= step[..., None] * 0.5001).all()


def test_one_scale_for_all_rows_is_that_of_the_largest_and_zeros_stay_zeros() -> None:
    codec = PlainInt(scheme("int8-channel"), "F32", per_tensor=True)
    weights = torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.5, 0.25]])
    raw = codec.encode(weights)
    assert raw["scale"].view(np.float32).tolist() == pytest.approx([4 / 255])
    decoded = codec.decode((3, 2), 0, 3, raw)
    assert (decoded - weights).abs().max() <= 2 / 255
    assert codec.granule == WHOLE
    nothing = codec.encode(torch.zeros(2, 2))
    assert nothing["scale"].view(np.float32).tolist() == [1.0]
    with pytest.raises(UsageError, match="one scale"):
        codec.pack(drawn((3, 2), codec.scheme))


def test_granules_say_where_zero_points_can_be_cut() -> None:
    assert PackedInt(scheme("int3-g32")).granule == 1
    assert PackedInt(scheme("int3-g32-asym")).granule == 32
    assert PackedInt(scheme("int3-g32-asym"), padded=True).granule == WHOLE


@pytest.mark.parametrize("codec", [PackedInt(scheme("int4-channel")), PlainInt(scheme("int8-channel"))])
def test_a_symmetric_form_refuses_zero_points(codec: Any) -> None:
    codes = drawn((4, 8), codec.scheme)
    with pytest.raises(UsageError, match="zero points"):
        codec.pack(codes._replace(zeros=codes.zeros + 1))


def test_a_weight_shape_that_lies_is_refused_when_the_tensor_is_decoded() -> None:
    codec = PackedInt(scheme("int4-channel"))
    raw = codec.constants((4, 9)) | codec.pack(drawn((4, 8), codec.scheme))
    with pytest.raises(CheckpointError, match=r"\[4, 8\].*\[4, 9\]"):
        codec.decode((4, 8), 0, 4, raw)


def test_scales_that_are_not_finite_are_noticed() -> None:
    for codec in (PackedInt(scheme("int4-channel")), PlainInt(scheme("int8-channel"))):
        raw = codec.encode(torch.tensor([[float("inf"), 1.0]]))
        assert not codec.finite("scale", raw["scale"])


def test_codes_are_carried_between_integer_forms_of_equal_bits_and_groups() -> None:
    of, shape = scheme("int4-g16"), (40, 32)
    codes = drawn(shape, of, "F16")
    source = PlainInt(of, "F16")
    raw = whole(source, shape, source.pack(codes))
    for target in (
        PackedInt(of, "F16"), PackedInt(of, "F16", padded=True), PackedInt(scheme("int4-g16-asym"), "F32"),
    ):  # fmt: skip
        assert carries(source, target, shape)
        assert not scales_change(source, target)
        carried = whole(target, shape, carry(source, target, shape, 0, 40, raw))
        assert equal(target.quantized(shape, carried), codes)
    assert scales_change(source, PackedInt(of, "BF16"))
    assert carries(PackedInt(scheme("int4-g32")), PackedInt(scheme("int4-channel")), shape)
    for source_text, target_text in (
        ("int4-g16", "int4-g32"),
        ("int4-g16", "int8-g16"),
        ("int4-g16-asym", "int4-g16"),
    ):
        assert not carries(PackedInt(scheme(source_text)), PackedInt(scheme(target_text)), shape)
    assert not carries(source, Plain("BF16"), shape)
    with pytest.raises(TypeError):
        carry(source, Plain("BF16"), shape, 0, 40, raw)


def test_fp8_blocks_are_carried_to_other_scales_without_a_change_of_codes() -> None:
    source = Fp8Block("F8_E8M0", ue8m0=True)
    raw = source.encode(torch.randn(130, 150) * 0.3)
    target = Fp8Block("F32", ue8m0=True, suffix="_scale")
    assert carries(source, target, (130, 150))
    carried = carry(source, target, (130, 150), 0, 130, raw)
    assert carried["weight"].tobytes() == raw["weight"].tobytes()
    assert torch.equal(target.decode((130, 150), 0, 130, carried), source.decode((130, 150), 0, 130, raw))
    assert not carries(source, Fp8Block(), (130, 150))  # whose scales are no powers of two
    assert not carries(Fp8Block(), Fp8Block("BF16"), (130, 150))
