"""The references against torch's casts and transformers' loaders, the factories against the references."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpoint_writer
import factories
import numpy as np
import oracle
import pytest
import torch
from safetensors import safe_open

ALL_CODES = torch.arange(256, dtype=torch.uint8)
RAGGED = [(128, 128), (1, 1), (192, 256), (256, 320), (300, 130)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_e4m3_and_e8m0_code_decodes_as_in_torch() -> None:
    e4m3 = ALL_CODES.view(torch.float8_e4m3fn).to(torch.float32)
    assert torch.equal(oracle.decode_e4m3(ALL_CODES).nan_to_num(1e9), e4m3.nan_to_num(1e9))
    e8m0 = ALL_CODES.view(torch.float8_e8m0fnu).to(torch.float32)
    assert torch.equal(oracle.decode_e8m0(ALL_CODES).nan_to_num(-1.0), e8m0.nan_to_num(-1.0))


def test_e4m3_rounding_is_torchs_at_every_value_midpoint_and_neighbour() -> None:
    """Rounding is monotone, so agreeing on both sides of every midpoint is agreeing everywhere."""
    codes = oracle.decode_e4m3(ALL_CODES[:0x7F])
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
    infinity = torch.tensor(torch.inf)
    points = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity)]).clamp(-448, 448)
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    halves = halves[halves.isfinite()].clamp(-448, 448)
    for values in (points, -points, halves):
        want = values.to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(oracle.encode_e4m3(values), want)


def test_e4m3_saturates_keeps_the_sign_of_zero_and_refuses_what_is_not_finite() -> None:
    codes = oracle.encode_e4m3(torch.tensor([449.0, -1e30, 0.0, -0.0, -1e-9]))
    assert codes.tolist() == [0x7E, 0xFE, 0x00, 0x80, 0x80]
    with pytest.raises(ValueError, match="finite"):
        oracle.encode_e4m3(torch.tensor([torch.nan]))


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_fp8_blocks_encode_as_the_factories_do_and_decode_to_what_was_meant(
    shape: tuple[int, int], ue8m0: bool
) -> None:
    weight = normal(*shape) * torch.exp(3 * normal(shape[0], 1, seed=1))
    codes, scales = oracle.encode_fp8_block(weight, ue8m0=ue8m0)
    torch_codes, torch_scales = checkpoint_writer.encode_fp8(weight, ue8m0=ue8m0)
    assert torch.equal(codes, torch_codes.view(torch.uint8))
    assert torch.equal(scales, torch_scales)
    decoded = oracle.decode_fp8_block(codes, scales)
    assert torch.equal(decoded, checkpoint_writer.decode_fp8(torch_codes, torch_scales))
    # Three mantissa bits: half a unit is 1/16 of the value, or 2^-10 of the scale among the subnormal codes.
    floor = scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]] * 2.0**-10
    assert bool(((decoded - weight).abs() <= torch.maximum(weight.abs() / 16, floor) * 1.0001).all())


def test_fp8_scales_are_ieee_quotients_and_powers_of_two() -> None:
    weight = normal(512, 256)
    amax = weight.view(4, 128, 2, 128).abs().amax(dim=(1, 3)).numpy()
    assert oracle.encode_fp8_block(weight)[1].numpy().tolist() == (amax / np.float32(448)).tolist()
    powers = oracle.encode_fp8_block(weight, ue8m0=True)[1]
    want = 2.0 ** np.ceil(np.log2((amax / np.float32(448)).astype(np.float64)))
    assert powers.numpy().tolist() == want.tolist()


@pytest.mark.parametrize("ue8m0", [False, True])
def test_blocks_without_a_scale_get_one(ue8m0: bool) -> None:
    smallest = torch.tensor([[2.0**-149]])
    for weight in (torch.zeros(2, 2), smallest):
        codes, scales = oracle.encode_fp8_block(weight, ue8m0=ue8m0)
        assert scales.tolist() == [[1.0]]
        assert not codes.any()


def test_decoding_and_encoding_again_gives_the_same_codes_and_scales() -> None:
    codes, scales = oracle.encode_fp8_block(normal(640, 384))
    again = oracle.encode_fp8_block(oracle.decode_fp8_block(codes, scales))
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


def test_weighted_sum_rounds_after_each_operation() -> None:
    parents, weights = [normal(64, 9, seed=seed) for seed in range(3)], [0.3, 0.6, 0.1]
    first, second, third = (parent.numpy() for parent in parents)
    want = (np.float32(0.3) * first + np.float32(0.6) * second) + np.float32(0.1) * third
    assert want.dtype == np.float32
    assert oracle.weighted_sum(parents, weights).numpy().tolist() == want.tolist()


def test_distances() -> None:
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0]])
    assert oracle.rms_distance(a, b) == pytest.approx(12.5**0.5)
    assert oracle.relative_distance(b, a) == 1.0
    assert oracle.relative_distance(b, b) == 0.0
    assert oracle.cosine(a, 2 * a) == pytest.approx(1.0)


FAMILIES: dict[str, Callable[[Path, int], Path]] = {
    "deepseek_v3": factories.deepseek_v3,
    "deepseek_v3-bf16": lambda folder, seed: factories.deepseek_v3(folder, seed, fp8=False),
    "deepseek_v3-ue8m0": lambda folder, seed: factories.deepseek_v3(
        folder, seed, scale_fmt="ue8m0", e8m0_storage=True
    ),
    "llama-tied": lambda folder, seed: factories.llama(folder, seed, dtype=torch.float16, tied=True),
    "qwen3_moe": factories.qwen3_moe,
    "gpt_oss-mxfp4": factories.gpt_oss_mxfp4,
    "gpt_oss-bf16": factories.gpt_oss_bf16,
    "llama4": factories.llama4_text,
    "llama4-wrapped": lambda folder, seed: factories.llama4_text(folder, seed, wrapped=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_are_whole_and_depend_on_the_seed_alone(family: str, tmp_path: Path) -> None:
    make = FAMILIES[family]
    first, again, other = make(tmp_path / "a", 1), make(tmp_path / "b", 1), make(tmp_path / "c", 2)
    contents = {path.name: path.read_bytes() for path in first.iterdir()}
    assert contents == {path.name: path.read_bytes() for path in again.iterdir()}
    stored, others = oracle.read_folder(first), oracle.read_folder(other)
    assert {name: part[:2] for name, part in stored.items()} == {name: p[:2] for name, p in others.items()}
    assert all(stored[name][2] != others[name][2] for name in stored if "_scale" not in name)
    index = json.loads((first / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in stored.values())
    for path in first.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_tensor(name)
                assert tuple(tensor.shape) == stored[name][1]
                assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == stored[name][2]
    assert all(bool(values.isfinite().all()) for values in oracle.model_tensors(first).values())


def test_the_deepseek_folder_has_what_published_ones_have(tmp_path: Path) -> None:
    folder = factories.deepseek_v3(tmp_path / "a", 1)
    stored = oracle.read_folder(folder)
    assert len(list(folder.glob("*.safetensors"))) == 4
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"][0] == "F32"
    assert stored["model.layers.1.mlp.experts.7.down_proj.weight"][0] == "F8_E4M3"
    assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][1] == (192, 256)
    assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"][1] == (2, 2)
    assert stored["model.layers.0.self_attn.q_b_proj.weight"][1] == (256, 192)
    assert "model.layers.0.mlp.experts.0.up_proj.weight" not in stored
    for name in ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.norm", "shared_head.head"):
        assert stored[f"model.layers.3.{name}.weight"][0] == "BF16"
    assert "model.layers.3.mlp.experts.7.down_proj.weight_scale_inv" in stored
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    scales = [name for name in places if name.endswith("_scale_inv")]
    apart = [name for name in scales if places[name] != places[name.removesuffix("_scale_inv")]]
    assert len(scales) // 6 < len(apart) < len(scales) // 4


def test_vary_moves_by_the_stated_amount_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = factories.deepseek_v3(tmp_path / "a", 1)
    assert oracle.read_folder(factories.vary(folder, tmp_path / "same", 2, 0.0)) == oracle.read_folder(folder)
    moved = factories.vary(folder, tmp_path / "moved", 2, 0.5)
    before, after = oracle.model_tensors(folder), oracle.model_tensors(moved)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    assert oracle.relative_distance(after[name], before[name]) == pytest.approx(0.5, rel=0.05)
    assert (moved / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    near = factories.deepseek_v3(tmp_path / "near", 9, base=1, delta=0.5)
    assert oracle.relative_distance(oracle.model_tensors(near)[name], before[name]) == pytest.approx(
        0.5, rel=0.05
    )


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model in float32, and which keys it missed or did not expect."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    return model, info


def test_transformers_loads_the_aligned_deepseek_folder_and_decodes_as_the_oracle(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = factories.deepseek_v3(tmp_path / "a", 1, ragged=False)
    model, info = load(folder)
    assert not info["missing_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    tensors, parameters = oracle.model_tensors(folder), dict(model.named_parameters())
    for name in ("self_attn.kv_b_proj", "self_attn.q_a_proj", "mlp.shared_experts.down_proj"):
        full = f"model.layers.1.{name}.weight"
        assert torch.equal(parameters[full].detach().to(torch.float32), tensors[full]), name
    down = torch.stack([tensors[f"model.layers.1.mlp.experts.{n}.down_proj.weight"] for n in range(8)])
    assert torch.equal(parameters["model.layers.1.mlp.experts.down_proj"].detach().to(torch.float32), down)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("Tokens é", return_tensors="pt").input_ids
    assert tokenizer.decode(tokens[0]) == "Tokens é"
    with torch.no_grad():
        assert bool(model(tokens).logits.isfinite().all())


@pytest.mark.parametrize("family", ["llama-tied", "qwen3_moe", "gpt_oss-bf16", "gpt_oss-mxfp4", "llama4"])
def test_transformers_finds_every_tensor(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "a", 1)
    model, info = load(folder)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if family == "gpt_oss-mxfp4":
        name = "model.layers.1.mlp.experts.gate_up_proj"
        parameter = dict(model.named_parameters())[name].detach().to(torch.float32)
        assert torch.equal(parameter, oracle.model_tensors(folder)[name].transpose(1, 2))


@pytest.fixture(scope="module")
def synthetic() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "synthetic.py"
    spec = importlib.util.spec_from_file_location("synthetic", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["synthetic"] = module
    spec.loader.exec_module(module)
    return module


def test_the_synthetic_deepseek_has_the_published_inventory(synthetic: ModuleType) -> None:
    entries = list(synthetic.v3_entries(synthetic.V3Shape()))
    assert len(entries) == len({entry.name for entry in entries}) == 91_991
    assert sum(entry.nbytes for entry in entries) == 688_574_839_360
    shards = dict(zip((e.name for e in entries), synthetic.shard_numbers(entries, 163), strict=True))
    assert set(shards.values()) == set(range(163))
    assert any(
        shard != shards[name.removesuffix("_scale_inv")] for name, shard in shards.items() if "_inv" in name
    )


@pytest.mark.parametrize("sparse", [True, False])
def test_synthetic_folders_are_valid_and_finite(synthetic: ModuleType, sparse: bool, tmp_path: Path) -> None:
    shape = synthetic.V3Shape(
        layers=2, dense=1, experts=2, vocab=64, hidden=256, intermediate=256, moe_intermediate=128, heads=1
    )
    entries = list(synthetic.v3_entries(shape))
    source = None if sparse else synthetic.RandomBytes(0)
    synthetic.write_parent(tmp_path / "a", entries, {}, shards=3, source=source)
    stored = oracle.read_folder(tmp_path / "a")
    assert {e.name: (e.dtype, e.shape) for e in entries} == {name: s[:2] for name, s in stored.items()}
    assert all(
        len(raw) == np.prod(shape) * synthetic.ITEM_BYTES[kind] for kind, shape, raw in stored.values()
    )
    values = oracle.model_tensors(tmp_path / "a")
    assert all(bool(tensor.isfinite().all()) for tensor in values.values())
    expert = values["model.layers.1.mlp.experts.1.up_proj.weight"]
    assert float(expert.std()) == (0.0 if sparse else pytest.approx(0.0225, rel=0.1))
