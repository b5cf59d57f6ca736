"""Checkpoints of compressed-tensors that are opened: what is decoded, what is copied, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compressed
import factories
import pytest
import torch
from folders import Tensors, change_config, change_shards

from surgery.codecs.packed_int import PackedInt
from surgery.codecs.plain import Opaque
from surgery.errors import CheckpointError, UsageError
from surgery.stream.source import open_checkpoint

QUERY = "model.layers.0.self_attn.q_proj"
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
LINEAR = ["Linear"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return factories.llama(tmp_path / "model", 1)


CASES: dict[str, tuple[compressed.Build, dict[str, Any]]] = {
    **{
        f"int{bits}-g32{'' if symmetric else '-asym'}": (
            compressed.integers(bits, 32, symmetric=symmetric),
            compressed.config("pack-quantized", (LINEAR, compressed.weights(bits, 32, symmetric=symmetric))),
        )
        for bits in range(2, 9)
        for symmetric in (True, False)
    },
    "int4-channel": (
        compressed.integers(4, dtype="F16"),
        compressed.config("pack-quantized", (LINEAR, compressed.weights(4))),
    ),
    "int3-channel-asym": (
        compressed.integers(3, symmetric=False, dtype="F32"),
        compressed.config("pack-quantized", (LINEAR, compressed.weights(3, symmetric=False))),
    ),
    "int8": (
        compressed.unpacked(),
        compressed.config("int-quantized", (LINEAR, compressed.weights(8))),
    ),
    "int8-asym": (
        compressed.unpacked(symmetric=False),
        compressed.config("int-quantized", (LINEAR, compressed.weights(8, symmetric=False))),
    ),
    "int4-in-int8": (
        compressed.unpacked(4, 32),
        compressed.config("int-quantized", (LINEAR, compressed.weights(4, 32))),
    ),
    "int8-tensor": (
        compressed.unpacked(per_tensor=True),
        compressed.config("int-quantized", (LINEAR, compressed.weights(8, strategy="tensor"))),
    ),
    "fp8-channel": (
        compressed.fp8("channel"),
        compressed.config("float-quantized", (LINEAR, FP8 | {"strategy": "channel"})),
    ),
    "fp8-tensor": (
        compressed.fp8("tensor", "F32"),
        compressed.config("naive-quantized", (LINEAR, FP8 | {"strategy": "tensor"})),
    ),
    "fp8-block": (
        compressed.fp8("block"),
        compressed.config(
            "float-quantized", (LINEAR, FP8 | {"strategy": "block", "block_structure": [128, 128]})
        ),
    ),
    "fp8-block-f32": (
        compressed.fp8("block", "F32"),
        compressed.config(
            "float-quantized", (LINEAR, FP8 | {"strategy": "block", "block_structure": "128x128"})
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_weights_are_decoded_under_their_own_names_and_roles(folder: Path, case: str) -> None:
    build, quantization = CASES[case]
    expected = compressed.compress(folder, quantization, lambda module: build)
    opened = open_checkpoint(folder)
    assert expected.keys() <= opened.tensors.keys()
    assert not [name for name in opened.tensors if "weight_" in name]
    for name, values in expected.items():
        ref = opened.tensors[name]
        assert ref.info.role in ("attention", "dense_mlp")
        assert ref.shape == tuple(values.shape)
        read = ref.read().double()
        assert (read - values).norm() / values.norm() < 1e-6, name
    held = sum(tensor.nbytes for path in folder.glob("*.safetensors") for tensor in _tensors(path).values())
    assert opened.nbytes == held


def _tensors(path: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_rows_packed_before_0_18_are_known_by_their_width(folder: Path, bits: int, symmetric: bool) -> None:
    quantization = compressed.config(
        "pack-quantized", (LINEAR, compressed.weights(bits, 32, symmetric=symmetric)), version="0.17.1"
    )
    build = compressed.integers(bits, 32, symmetric=symmetric, padded=True)
    expected = compressed.compress(folder, quantization, lambda module: build)
    opened = open_checkpoint(folder)
    for name, values in expected.items():
        assert (opened.tensors[name].read().double() - values).norm() / values.norm() < 1e-6
    query = opened.tensors[f"{QUERY}.weight"]
    assert isinstance(query.codec, PackedInt)
    assert query.codec.padded
    if not symmetric:
        with pytest.raises(UsageError, match="whole"):
            query.read(slice(0, 32))


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0", None])
def test_where_both_packings_have_one_width_the_version_decides(tmp_path: Path, version: str | None) -> None:
    """40 codes of 3 bits take 4 words either way."""
    padded = version != "0.18.0"
    folder = _one_matrix(tmp_path, (5, 40), compressed.integers(3, padded=padded))
    change_config(folder, quantization_config=told(LINEAR, compressed.weights(3)) | {"version": version})
    expected = compressed.integers(3, padded=padded)(QUERY, (5, 40))[1]
    assert (open_checkpoint(folder).tensors[f"{QUERY}.weight"].read() - expected).norm() < 1e-6


def _one_matrix(tmp_path: Path, shape: tuple[int, int], build: compressed.Build) -> Path:
    folder = factories.llama(tmp_path / "one", 1, shards=1)
    stored, _ = build(QUERY, shape)
    change_shards(folder, lambda tensors: {f"{QUERY}.{part}": value for part, value in stored.items()})
    return folder


def test_groups_name_modules_before_patterns_and_patterns_before_classes(folder: Path) -> None:
    quantization = compressed.config(
        "pack-quantized",
        (LINEAR, compressed.weights(4, 32)),
        (["re:.*mlp.*"], compressed.weights(8)),
        ([QUERY], compressed.weights(3, 64)),
        ignore=["lm_head", "re:.*down_proj$"],
    )

    def build(module: str) -> compressed.Build | None:
        if "down_proj" in module:
            return None
        if module == QUERY:
            return compressed.integers(3, 64)
        return compressed.integers(8) if "mlp" in module else compressed.integers(4, 32)

    expected = compressed.compress(folder, quantization, build)
    opened = open_checkpoint(folder)
    for name, values in expected.items():
        assert (opened.tensors[name].read().double() - values).norm() / values.norm() < 1e-6
    assert opened.tensors["model.layers.0.mlp.down_proj.weight"].codec.name == "bf16"
    assert {ref.codec.name for name, ref in opened.tensors.items() if name in expected} == {
        "packed-int4-g32", "packed-int8-channel", "packed-int3-g64",
    }  # fmt: skip


def int4(folder: Path, **more: Any) -> None:
    compressed.compress(
        folder, told(LINEAR, ASYMMETRIC) | more, lambda module: compressed.integers(4, 32, symmetric=False)
    )


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: each for name, each in tensors.items() if name != f"{QUERY}.{part}"}


def with_part(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    name = f"{QUERY}.{part}"
    return lambda tensors: {key: change(each) if key == name else each for key, each in tensors.items()}


def and_part(part: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    """Another part beside the query's codes."""
    return lambda tensors: (
        tensors | ({f"{QUERY}.{part}": value} if f"{QUERY}.weight_packed" in tensors else {})
    )


LIES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no scale": (without("weight_scale"), "weight_scale is missing"),
    "no zero point": (without("weight_zero_point"), "weight_zero_point is missing"),
    "no shape": (without("weight_shape"), "weight_shape is missing"),
    "no codes": (without("weight_packed"), "that is not there"),
    "codes twice": (and_part("weight", torch.zeros(64, 64)), "unpacked"),
    "fewer scales": (with_part("weight_scale", lambda each: each[:-1]), "[64, 2] expected"),
    "more groups": (with_part("weight_scale", lambda each: each.repeat(1, 2)), "words a row"),
    "turned scales": (with_part("weight_scale", lambda each: each.T.contiguous()), "words a row"),
    "fewer codes": (with_part("weight_packed", lambda each: each[:-3]), "[61, 2] expected"),
    "narrow codes": (with_part("weight_packed", lambda each: each[:, :-1]), "7 words a row, 8 expected"),
    "turned zeros": (with_part("weight_zero_point", lambda each: each.T.contiguous()), "[8, 2] expected"),
    "zeros as bytes": (with_part("weight_zero_point", lambda each: each.to(torch.int8)), "I32 expected"),
    "shape of three": (with_part("weight_shape", lambda each: torch.tensor([64, 64, 1])), "[2] expected"),
}


@pytest.mark.parametrize("lie", LIES)
def test_parts_that_contradict_each_other_are_one_error_that_names_the_tensor(folder: Path, lie: str) -> None:
    change, words = LIES[lie]
    int4(folder)
    change_shards(folder, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert QUERY in caught.value.message
    assert words in caught.value.message
    assert "1 tensors" in caught.value.message


def told(targets: list[str], weights: dict[str, Any], form: str = "pack-quantized") -> dict[str, Any]:
    return compressed.config(form, (targets, weights))


ASYMMETRIC = compressed.weights(4, 32, symmetric=False)
CONFIG_LIES: dict[str, tuple[dict[str, Any], str]] = {
    "ignored": ({"ignore": [QUERY]}, "ignore list"),
    "in no group": (told(["re:.*mlp"], ASYMMETRIC), "none of its groups"),
    "other bits": (told(LINEAR, ASYMMETRIC | {"num_bits": 8}), "words a row"),
    "a float": (told(LINEAR, FP8 | {"strategy": "channel"}, "float-quantized"), "8 bits of float"),
    "symmetric": (told(LINEAR, compressed.weights(4, 32)), "unexpected"),
    "no groups": ({"config_groups": None}, "config_groups"),
    "a preset": ({"config_groups": {"W4A16": ["Linear"]}}, "W4A16"),
    "no pattern": (told(["re:("], ASYMMETRIC), "regular expression"),
    "no list": ({"ignore": "lm_head"}, "ignore"),
    "text": ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": "int4"}}}, "group_0"),
    "bits in words": (told(LINEAR, ASYMMETRIC | {"num_bits": "four"}), "num_bits"),
    "no group size": (told(LINEAR, compressed.weights(4, strategy="group")), "groups of 0"),
}


@pytest.mark.parametrize("lie", CONFIG_LIES)
def test_a_config_that_does_not_explain_the_tensors_is_refused(folder: Path, lie: str) -> None:
    changes, words = CONFIG_LIES[lie]
    int4(folder)
    before = compressed.read_config(folder)["quantization_config"]
    change_config(folder, quantization_config=before | changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert words in str(caught.value.message)


def test_groups_that_do_not_divide_a_row_are_refused(tmp_path: Path) -> None:
    folder = _one_matrix(tmp_path, (4, 40), compressed.unpacked(8, 20))
    change_config(folder, quantization_config=told(LINEAR, compressed.weights(8, 32), "int-quantized"))
    with pytest.raises(CheckpointError, match="do not divide 40"):
        open_checkpoint(folder)


def test_a_weight_shape_that_lies_is_refused_where_it_counts(folder: Path) -> None:
    int4(folder)
    change_shards(folder, with_part("weight_shape", lambda each: torch.tensor([64, 63])))
    with pytest.raises(CheckpointError, match=r"\[64, 64\].*\[64, 63\]"):
        open_checkpoint(folder).tensors[f"{QUERY}.weight"].read()


def test_eight_bits_without_a_scale_are_refused(tmp_path: Path) -> None:
    folder = _one_matrix(tmp_path, (4, 40), compressed.unpacked())
    change_shards(folder, without("weight_scale"))
    change_config(folder, quantization_config=told(LINEAR, compressed.weights(8), "int-quantized"))
    with pytest.raises(CheckpointError, match="weight_scale is missing"):
        open_checkpoint(folder)


NVFP4 = {
    "weight_packed": torch.zeros(8, 16, dtype=torch.uint8),
    "weight_scale": torch.zeros(8, 2).to(torch.float8_e4m3fn),
    "weight_global_scale": torch.ones(1),
}
COPIED: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "nvfp4": (NVFP4, compressed.weights(4, 16, type="float", strategy="tensor_group")),
    "g_idx": (
        compressed.integers(4, 32)(QUERY, (8, 64))[0] | {"weight_g_idx": torch.zeros(64, dtype=torch.int32)},
        compressed.weights(4, 32, actorder="group"),
    ),
    "three dimensions": (
        {"weight_packed": torch.zeros(2, 4, 4, dtype=torch.int32), "weight_scale": torch.ones(2, 4, 1)},
        compressed.weights(4, 32),
    ),
    "one bit": (compressed.integers(1, 32)(QUERY, (8, 64))[0], compressed.weights(1, 32)),
    "fp8 of small blocks": (
        {"weight": torch.zeros(64, 64).to(torch.float8_e4m3fn), "weight_scale": torch.ones(2, 2)},
        FP8 | {"strategy": "block", "block_structure": [32, 32]},
    ),
}


@pytest.mark.parametrize("case", COPIED)
def test_forms_that_are_not_decoded_are_copied_with_all_their_parts(tmp_path: Path, case: str) -> None:
    stored, weights = COPIED[case]
    folder = factories.llama(tmp_path / "model", 1, shards=1)
    change_shards(folder, lambda tensors: {f"{QUERY}.{part}": each for part, each in stored.items()})
    change_config(folder, quantization_config=told(LINEAR, weights))
    opened = open_checkpoint(folder)
    ref = opened.tensors[f"{QUERY}.weight"]
    assert isinstance(ref.codec, Opaque)
    assert len(opened.tensors) == 1
    with pytest.raises(CheckpointError, match="copied but not decoded"):
        ref.read()
    opened.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").stat().st_size > 0
    after = _tensors(tmp_path / "copy" / "model.safetensors")
    for name, tensor in _tensors(folder / "model.safetensors").items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_copy_has_the_bytes_of_the_original(folder: Path, tmp_path: Path) -> None:
    int4(folder)
    before = shutil.copytree(folder, tmp_path / "before")
    open_checkpoint(folder).save(tmp_path / "out")
    merged: Tensors = {}
    for path in before.glob("*.safetensors"):
        merged |= _tensors(path)
    after: Tensors = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        after |= _tensors(path)
    assert after.keys() == merged.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in merged.items())
