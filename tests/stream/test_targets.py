"""Packing of tensors into shards: order, alignment, units that stay together, and refused contradictions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import factories
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.plain import ITEMSIZE, Opaque, Plain
from surgery.errors import CheckpointError
from surgery.stream import jobs as jobs_module
from surgery.stream.checkpoint import ComputedRef, Part, StoredRef, TensorRef
from surgery.stream.files import StoredTensor, natural_key
from surgery.stream.header import DTYPE_BITS, parse_header, tensor_nbytes
from surgery.stream.jobs import CopyJob, TileJob, compile_jobs
from surgery.stream.layouts import View
from surgery.stream.roles import TensorInfo
from surgery.stream.source import open_checkpoint
from surgery.stream.targets import Shard, pack, plan_targets

INFO = TensorInfo("other", None, None, False)
FUZZ = settings(max_examples=150, deadline=None)


def stored(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, dtype, shape, tensor_nbytes(dtype, shape))


def plain(name: str, dtype: str, shape: tuple[int, ...]) -> StoredRef:
    codec = Plain(dtype) if dtype in ITEMSIZE else Opaque(dtype)
    return StoredRef(name, shape, INFO, codec, (Part("weight", stored(name, dtype, shape), None),), "m")


def fp8(name: str, shape: tuple[int, int]) -> StoredRef:
    parts = tuple(
        Part(spec.key, stored(name + spec.suffix, spec.dtype, spec.shape), None)
        for spec in Fp8Block().parts(shape)
    )
    return StoredRef(name, shape, INFO, Fp8Block(), parts, "m")


def expert(index: int, experts: int, *keys: str) -> StoredRef:
    """Expert `index` of fused tensors x_<key> of [experts, 2, 3] bytes."""
    view = View(index, 0, None, 1, False)
    parts = tuple(Part(key, stored(f"x_{key}", "U8", (experts, 2, 3)), view) for key in keys)
    return StoredRef(f"x.{index}", (2, 3), INFO, Opaque("fused"), parts, "m")


def names(shards: list[Shard]) -> list[list[str]]:
    return [[target.stored.name for target, _ in shard.targets] for shard in shards]


sizes = st.lists(
    st.tuples(
        st.sampled_from(["BF16", "F32", "F64", "F16", "U8", "I64", "F8_E5M2", "fp8"]),
        st.integers(0, 9),
        st.integers(0, 9),
    ),
    max_size=25,
)


@given(sizes, st.integers(1, 400))
@FUZZ
def test_shards_hold_every_tensor_once_aligned_and_in_order(
    listed: list[tuple[str, int, int]], shard_bytes: int
) -> None:
    refs = [
        fp8(f"layers.{n}.w", (rows + 1, cols + 1))
        if kind == "fp8"
        else plain(f"layers.{n}.w", kind, (rows, cols))
        for n, (kind, rows, cols) in enumerate(listed)
    ]
    units = plan_targets(reversed(refs))
    shards = pack(units, shard_bytes)
    want = {part.stored.name: part.stored for ref in refs for part in ref.parts}
    assert sorted(name for held in names(shards) for name in held) == sorted(want)
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        assert shard.name == (
            "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        header = parse_header(shard.header[8:], shard.nbytes, shard.name)
        assert [entry.name for entry in header.entries] == [t.stored.name for t, _ in shard.targets] or any(
            target.stored.nbytes == 0 for target, _ in shard.targets
        )
        for target, offset in shard.targets:
            assert offset % max(1, DTYPE_BITS[target.stored.dtype] // 8) == 0
        body = sum(target.stored.nbytes for target, _ in shard.targets)
        assert body + len(shard.header) == shard.nbytes
        held = set(names([shard])[0])
        together = [unit for unit in units if unit[0].stored.name in held]
        assert body <= shard_bytes or len([u for u in together if sum(t.stored.nbytes for t in u)]) <= 1
        for unit in units:
            assert len({target.stored.name in held for target in unit}) == 1, "a weight has left its scale"
    firsts = [min(held, key=natural_key) for held in names(shards) if held]
    assert firsts == sorted(firsts, key=natural_key)


def test_layer_two_comes_before_layer_ten() -> None:
    shards = pack(plan_targets([plain(f"layers.{n}.w", "F64", (1,)) for n in (10, 2, 1, 20)]), 16)
    assert names(shards) == [["layers.1.w", "layers.2.w"], ["layers.10.w", "layers.20.w"]]


def test_odd_sized_tensors_come_last_by_falling_element_size() -> None:
    refs = [
        plain("a", "U8", (3,)), plain("b", "BF16", (3,)), plain("c", "F32", (3,)), plain("d", "BF16", (4,)),
        plain("e", "U8", (8,)),
    ]  # fmt: skip
    assert names(pack(plan_targets(refs), 1000)) == [["d", "e", "c", "b", "a"]]


def test_a_unit_larger_than_a_shard_gets_one_of_its_own() -> None:
    refs = [plain("a", "U8", (8,)), fp8("b", (128, 128)), plain("c", "U8", (8,))]
    assert names(pack(plan_targets(refs), 100)) == [["a"], ["b", "b_scale_inv"], ["c"]]


def test_blocks_and_scales_of_fused_experts_are_one_unit() -> None:
    units = plan_targets(
        [expert(index, 3, "blocks", "scales") for index in range(3)] + [plain("y", "U8", (8,))]
    )
    assert [[target.stored.name for target in unit] for unit in units] == [["x_blocks", "x_scales"], ["y"]]
    assert [len(target.members) for target in units[0]] == [3, 3]
    assert names(pack(units, 20)) == [["x_blocks", "x_scales"], ["y"]]


def test_units_that_share_a_tensor_are_joined_whatever_the_order() -> None:
    refs = [expert(0, 2, "a", "b"), expert(1, 2, "b", "a")]
    for order in (refs, refs[::-1]):
        (unit,) = plan_targets(order)
        assert [target.stored.name for target in unit] == ["x_a", "x_b"]


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match="two tensors would be written to a"):
        plan_targets([plain("a", "U8", (8,)), plain("a", "U8", (8,))])
    with pytest.raises(CheckpointError, match="two tensors"):
        plan_targets([fp8("a", (1, 1)), plain("a_scale_inv", "F32", (1, 1))])
    with pytest.raises(CheckpointError, match="two tensors"):
        plan_targets([expert(0, 2, "a"), expert(1, 3, "a")])


def test_fused_tensors_with_experts_missing_are_refused() -> None:
    with pytest.raises(CheckpointError, match="fill 6 of the 12 bytes of x_a"):
        plan_targets([expert(0, 2, "a")])


def test_fused_tensors_with_an_expert_twice_are_refused() -> None:
    with pytest.raises(CheckpointError):
        plan_targets([expert(0, 2, "a"), expert(0, 2, "a")])


@pytest.mark.parametrize("factory", [factories.gpt_oss_mxfp4, factories.llama4_text, factories.deepseek_v3])
def test_jobs_of_a_copy_read_each_byte_once(tmp_path: Path, factory: object) -> None:
    checkpoint = open_checkpoint(factory(tmp_path / "m", 1))  # type: ignore[operator]
    shards = pack(plan_targets(checkpoint.tensors.values()), 1 << 30)
    jobs = list(compile_jobs(shards[0]))
    spans = sorted((job.target, job.target + job.nbytes) for job in jobs)  # type: ignore[attr-defined]
    assert spans[0][0] == len(shards[0].header)
    assert all(left[1] == right[0] for left, right in pairwise(spans))
    assert spans[-1][1] == shards[0].nbytes
    assert len(jobs) <= len(shards[0].targets)


def test_small_computed_tensors_do_not_hold_up_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is hashed from its start on, so nothing may be left out for long."""
    monkeypatch.setattr(jobs_module, "APART", 8_000_000)
    refs: list[TensorRef] = []
    for layer in range(40):
        for kind, shape in (("norm", (64,)), ("weight", (1024, 1024)), ("bias", (32,))):
            made = plain(f"layers.{layer:02}.{kind}", "BF16", shape)
            refs.append(made if layer % 5 == 4 else ComputedRef(made, (made, made), cast("Any", None)))
    (shard,) = pack(plan_targets(refs), 1 << 30)
    written: dict[int, int] = {}
    complete, furthest = len(shard.header), 0
    for job in compile_jobs(shard):
        if isinstance(job, TileJob):
            spans = [
                (rows.offsets["weight"] + rows._spans()["weight"], (rows.stop - rows.start) * 2 * cols)
                for rows in job.tiles
                for cols in (rows.ref.numel // rows.ref.rows,)
            ]
        else:
            assert isinstance(job, CopyJob)
            spans = [(job.target, job.nbytes)]
        for start, nbytes in spans:
            furthest = max(furthest, start + nbytes - complete)
            assert start not in written
            written[start] = start + nbytes
        while complete in written:
            complete = written[complete]
    assert complete == shard.nbytes
    assert furthest <= 8_000_000 + 2 * 1024 * 1024 + 1000
