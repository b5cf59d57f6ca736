"""Reading GPTQ, AWQ and bitsandbytes checkpoints: what they mean, what is copied, which lies are caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from folders import change_config, change_shards
from packed_folders import integers, nf4
from safetensors.torch import load_file

from surgery.codecs.schemes import IntScheme
from surgery.errors import CheckpointError
from surgery.stream.source import open_checkpoint

Q = "model.layers.0.self_attn.q_proj"
SCHEMES = [
    ("gptq", IntScheme(2, 32, True), 1), ("gptq", IntScheme(3, 32, False), 1),
    ("gptq", IntScheme(4, 32, True), 1), ("gptq", IntScheme(4, 0, False), 2),
    ("gptq", IntScheme(8, 32, True), 2), ("awq", IntScheme(4, 32, False), 1),
    ("awq", IntScheme(4, 0, False), 1),
]  # fmt: skip
METHODS = ("gptq", "awq", "nf4")


def make(method: str, folder: Path) -> Path:
    if method == "nf4":
        return nf4(folder)[0]
    return integers(folder, method, IntScheme(4, 32, method == "gptq"))[0]


@pytest.mark.parametrize(("method", "scheme", "version"), SCHEMES, ids=str)
def test_every_weight_is_what_its_codes_say(
    tmp_path: Path, method: str, scheme: IntScheme, version: int
) -> None:
    folder, made = integers(tmp_path / "m", method, scheme, form=version)
    checkpoint = open_checkpoint(folder)
    assert len(made) == 14 and made.keys() <= checkpoint.tensors.keys()
    assert not any(name.endswith(("qweight", "scales", "g_idx")) for name in checkpoint.tensors)
    for name, codes in made.items():
        ref = checkpoint.tensors[name]
        assert ref.shape == tuple(codes.codes.shape) and ref.info.role in ("attention", "dense_mlp")
        assert torch.equal(ref.read(), codes.values())


def test_every_nf4_weight_is_what_its_codes_say(tmp_path: Path) -> None:
    folder, made = nf4(tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    for name, values in made.items():
        assert torch.equal(checkpoint.tensors[name].read(), values)
        assert torch.equal(checkpoint.tensors[name].read(slice(0, 20)), values[:20])


@pytest.mark.parametrize("method", METHODS)
def test_copies_are_bytes_and_bf16_is_rounded_values(tmp_path: Path, method: str) -> None:
    folder = make(method, tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    copied = checkpoint.save(tmp_path / "copy").folder
    assert oracle.read_folder(copied) == oracle.read_folder(folder)
    written = open_checkpoint(checkpoint.save(tmp_path / "bf16", format="bf16").folder)
    assert not written.quantization and written.tensors.keys() == checkpoint.tensors.keys()
    for name, ref in checkpoint.tensors.items():
        assert torch.equal(written.tensors[name].read(), ref.read().bfloat16().float())


@pytest.mark.parametrize("override", [{"group_size": 16}, {"bits": 8}, {"sym": False}])
def test_simple_dynamic_overrides_are_followed(tmp_path: Path, override: dict[str, Any]) -> None:
    folder, made = integers(tmp_path / "m", "gptq", IntScheme(4, 32))
    scheme = IntScheme(override.get("bits", 4), override.get("group_size", 32), override.get("sym", True))
    _, others = integers(tmp_path / "o", "gptq", scheme)
    theirs = {k: v for path in (tmp_path / "o").glob("*.safetensors") for k, v in load_file(path).items()}
    change_shards(folder, lambda tensors: {n: theirs[n] if ".mlp." in n else t for n, t in tensors.items()})
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    dynamic = {r"-:lm_head": {}, r"+:.*\.mlp\.": override, r".*\.gate_proj": {"bits": 2}}
    change_config(folder, quantization_config={**config, "dynamic": dynamic})
    for name, ref in open_checkpoint(folder).tensors.items():
        if name in made:
            assert torch.equal(ref.read(), (others if ".mlp." in name else made)[name].values())


def test_act_order_is_read_by_its_groups(tmp_path: Path) -> None:
    folder, made = integers(tmp_path / "m", "gptq", IntScheme(4, 16), desc_act=True)
    orders = {name: torch.randperm(codes.codes.shape[1]) // 16 for name, codes in made.items()}
    change_shards(folder, lambda tensors: {
        n: orders[n.replace("g_idx", "weight")].to(torch.int32) if n.endswith("g_idx") else t
        for n, t in tensors.items()
    })  # fmt: skip
    checkpoint = open_checkpoint(folder)
    for name, codes in made.items():
        group = orders[name]
        want = (codes.codes.float() - codes.zeros.float()[:, group]) * codes.scales[:, group]
        assert torch.equal(checkpoint.tensors[name].read(), want)
        assert "act-order" in checkpoint.tensors[name].codec.name


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def without(part: str) -> Change:
    return lambda tensors: {name: each for name, each in tensors.items() if name != f"{Q}.{part}"}


def replaced(part: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: {**tensors, **({f"{Q}.{part}": tensor} if f"{Q}.{part}" in tensors else {})}


@pytest.mark.parametrize(
    ("method", "part"),
    [
        *((m, part) for m in ("gptq", "awq") for part in ("qweight", "qzeros", "scales")),
        ("gptq", "g_idx"), ("nf4", "weight.absmax"), ("nf4", "weight.quant_map"), ("nf4", "weight"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4"),
    ],
)  # fmt: skip
def test_a_missing_part_is_named(tmp_path: Path, method: str, part: str) -> None:
    folder = change_shards(make(method, tmp_path / "m"), without(part))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert f"{Q}.{part} is missing" in caught.value.message
    assert caught.value.hint and "1 tensors cannot be understood" in caught.value.message


@pytest.mark.parametrize(
    ("method", "part", "tensor", "told"),
    [
        ("gptq", "qweight", torch.zeros(9, 64, dtype=torch.int32), "groups of 32 do not divide 72"),
        ("gptq", "qweight", torch.zeros(8, dtype=torch.int32), "[in · 4 / 32, out] expected"),
        ("gptq", "qzeros", torch.zeros(2, 9, dtype=torch.int32), "shape [2, 9], [2, 8] expected"),
        ("gptq", "scales", torch.zeros(2, 64), "dtype F32, F16 expected"),
        ("gptq", "g_idx", torch.zeros(63, dtype=torch.int32), "shape [63], [64] expected"),
        ("awq", "qweight", torch.zeros(64, 8), "dtype F32, I32 expected"),
        ("awq", "qweight", torch.zeros(64, 8, 2, dtype=torch.int32), "[in, out / 8] expected"),
        ("awq", "scales", torch.zeros(3, 64).half(), "shape [3, 64], [2, 64] expected"),
        ("nf4", "weight", torch.zeros(2047, 1, dtype=torch.uint8), "shape [2047, 1], [2048, 1] expected"),
        ("nf4", "weight", torch.zeros(1024, 1).bfloat16(), "dtype BF16, U8 expected"),
        ("nf4", "weight.absmax", torch.zeros(63), "shape [63], [64] expected"),
        ("nf4", "weight.quant_map", torch.zeros(15), "shape [15], [16] expected"),
    ],
)  # fmt: skip
def test_a_misshapen_part_is_named(
    tmp_path: Path, method: str, part: str, tensor: torch.Tensor, told: str
) -> None:
    folder = change_shards(make(method, tmp_path / "m"), replaced(part, tensor))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert f"{Q}.{part}" in caught.value.message and told in caught.value.message
    assert "1 tensors cannot be understood" in caught.value.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"{", "no JSON"), (b"[1]", "says nothing of nf4"), (b'{"quant_type": "fp4"}', "says nothing of nf4"),
        (b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, -1]}', "the shape"),
        (b'{"quant_type": "nf4", "blocksize": 65, "dtype": "bfloat16", "shape": [64, 64]}', "blocksize 65"),
        (b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 65]}', "[2080, 1]"),
        (b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64], '
         b'"nested_blocksize": 128, "nested_offset": 0.5}', "nested_blocksize 128"),
    ],
)  # fmt: skip
def test_a_quant_state_that_lies_is_named(tmp_path: Path, text: bytes, told: str) -> None:
    part = "weight.quant_state.bitsandbytes__nf4"
    change = replaced(part, torch.tensor(list(text), dtype=torch.uint8))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(change_shards(nf4(tmp_path / "m")[0], change))
    assert Q in caught.value.message and told in caught.value.message


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"bits": "4"}, "has bits '4'"), ({"group_size": None}, "has group_size None"),
        ({"sym": 1}, "has sym 1"), ({"dynamic": {"+:(": {}}}, "no pattern"),
        ({"dynamic": {"+:x": {"format": "marlin"}}}, "overrides `format`"),
        ({"dynamic": {"x": 3}}, "without settings"), ({"dynamic": [1]}, "no mapping"),
        ({"dynamic": {"-:.*q_proj": {}}}, "leaves its module out"),
        ({"group_size": 48}, "groups of 48 do not divide 160"),
    ],
)  # fmt: skip
def test_a_config_that_lies_is_refused(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    folder, _ = integers(tmp_path / "m", "gptq", IntScheme(4, 32), **config)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert told in caught.value.message


@pytest.mark.parametrize(
    ("method", "config"),
    [("gptq", {"checkpoint_format": "marlin"}), ("gptq", {"pack_dtype": "int64"}), ("gptq", {"bits": 5}),
     ("awq", {"version": "gemv"})],
)  # fmt: skip
def test_layouts_that_are_only_copied(tmp_path: Path, method: str, config: dict[str, Any]) -> None:
    scheme = IntScheme(4, 32, method == "gptq")
    folder, _ = integers(tmp_path / "m", method, scheme, **config)
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.tensors[f"{Q}.qweight"].codec.decodable
    copied = checkpoint.save(tmp_path / "copy").folder
    assert oracle.read_folder(copied) == oracle.read_folder(folder)
