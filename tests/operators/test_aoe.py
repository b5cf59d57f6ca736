"""Assembly of Experts against independent references: copies, sums, gates, anchors, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import factories
import numpy as np
import oracle
import pytest
import torch
from folders import change_config, change_shards, check_written, raw_file, strict_manifest
from pydantic import ValidationError

from surgery.codecs.reference import weighted_sum
from surgery.errors import CheckpointError, PlanError, RecipeError
from surgery.operators.merge.aoe import AssemblyOfExperts
from surgery.operators.merge.distances import distances, squares
from surgery.operators.merge.weights import Rule, weight_at
from surgery.stream.checkpoint import Checkpoint
from surgery.stream.roles import TensorInfo
from surgery.stream.source import open_checkpoint

Stored = dict[str, oracle.StoredTensor]
SIZES: dict[str, Any] = {"layers": 2, "experts": 2, "hidden": 160, "moe_intermediate": 96}
"""Smaller than elsewhere, for the oracle works block by block; no dimension is a multiple of 128."""


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("aoe")
    return {
        "base": factories.deepseek_v3(folder / "base", 1, **SIZES),
        "reasoner": factories.deepseek_v3(folder / "reasoner", 2, base=1, delta=0.3, **SIZES),
        "third": factories.deepseek_v3(folder / "third", 3, base=1, delta=0.6, **SIZES),
    }


@cache
def meaning(folder: Path) -> dict[str, torch.Tensor]:
    """What the tensors of a parent mean; parents do not change."""
    return oracle.model_tensors(folder)


def opened(parents: Mapping[str, Path]) -> dict[str, Checkpoint]:
    return {label: open_checkpoint(path, label) for label, path in parents.items()}


def merge(parents: Mapping[str, Path], **params: Any) -> Checkpoint:
    return AssemblyOfExperts(base="base", **params).apply(opened(parents))


def merged(parents: Mapping[str, Path], out: Path, **params: Any) -> Stored:
    merge(parents, **params).save(out)
    return oracle.read_folder(out)


def bf16_bytes(values: torch.Tensor) -> bytes:
    """float32 values rounded to bf16 by hand: to nearest, ties to even."""
    bits = values.contiguous().numpy().astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def encoded(values: torch.Tensor, like: Stored, name: str, *, ue8m0: bool = False) -> Stored:
    """The stored tensors of `values` in the form that `like` has for `name`."""
    dtype, shape, _ = like[name]
    if dtype == "F8_E4M3":
        codes, scales = oracle.encode_fp8_block(values, ue8m0=ue8m0)
        scale = f"{name}_scale_inv"
        return {
            name: (dtype, shape, codes.numpy().tobytes()),
            scale: ("F32", like[scale][1], scales.numpy().tobytes()),
        }
    data = bf16_bytes(values) if dtype == "BF16" else values.contiguous().numpy().tobytes()
    return {name: (dtype, shape, data)}


def expected(
    parents: Mapping[str, Path], weights: Mapping[str, float], select: Callable[[str], bool] = lambda _: True
) -> Stored:
    """The child of `weights` (the base's included, in order) on the selected tensors, by the oracle."""
    stored = {label: oracle.read_folder(path) for label, path in parents.items()}
    values = {label: meaning(path) for label, path in parents.items() if label in weights}
    want = dict(stored["base"])
    for name in values["base"]:
        if select(name):
            used = [(values[label][name], weight) for label, weight in weights.items() if weight]
            total = oracle.weighted_sum([value for value, _ in used], [weight for _, weight in used])
            want |= encoded(total, stored["base"], name)
    return want


# A Chimera, and other choices that are copies


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def test_a_chimera_has_the_donors_experts_and_the_bases_rest_byte_for_byte(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    child = merged(parents, tmp_path / "out", weights={"reasoner": 1.0}, select=["routed_expert"])
    base, donor = (oracle.read_folder(parents[label]) for label in ("base", "reasoner"))
    assert child.keys() == base.keys()
    for name, stored in child.items():
        assert stored == (donor if is_expert(name) else base)[name], name
    experts = [name for name in child if is_expert(name) and name.endswith(".weight")]
    assert len(experts) == 2 * 2 * 3, "one MoE layer and the MTP layer"
    assert all(base[name] != donor[name] for name in experts)


def test_no_torch_is_needed_for_copies_and_no_tensor_is_computed(parents: dict[str, Path]) -> None:
    child = merge(parents, weights={"reasoner": 1.0}, select=["routed_expert", "mtp"])
    assert {type(ref).__name__ for ref in child.tensors.values()} == {"StoredRef"}


@pytest.mark.parametrize(
    "params",
    [
        {"weights": {"reasoner": 0.0}}, {"weights": {}}, {"weights": {"base": 1.0}},
        {"weights": {"reasoner": 1.0}, "threshold": 1e9}, {"weights": {"reasoner": 0.5}, "threshold": 1e9},
        {"weights": {"reasoner": 0.5, "third": 0.5}, "threshold": 1e9, "norm": "relative"},
        {"weights": {"reasoner": 1.0}, "select": [{"role": "routed_expert", "weights": {}}]},
    ],
    ids=str,
)  # fmt: skip
def test_identity_and_a_threshold_above_every_distance_give_the_base(
    parents: dict[str, Path], tmp_path: Path, params: dict[str, Any]
) -> None:
    assert merged(parents, tmp_path / "out", **params) == oracle.read_folder(parents["base"])


def test_weight_one_on_everything_gives_the_donor(parents: dict[str, Path], tmp_path: Path) -> None:
    for number, threshold in enumerate((0.0, 1e-9)):
        child = merged(parents, tmp_path / str(number), weights={"reasoner": 1.0}, threshold=threshold)
        assert child == oracle.read_folder(parents["reasoner"])


def test_a_merge_of_equal_parents_is_the_parent_scales_included(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    """Foreign scales would change if it were computed: those of equal tensors must not."""

    def other_scales(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: tensor * 1.7 if name.endswith("_scale_inv") else tensor for name, tensor in tensors.items()
        }

    base = change_shards(shutil.copytree(parents["base"], tmp_path / "base"), other_scales)
    twin = shutil.copytree(base, tmp_path / "twin")
    out = tmp_path / "out"
    assert merged({"base": base, "twin": twin}, out, weights={"twin": 0.3}) == oracle.read_folder(base)
    assert {row["action"] for row in strict_manifest(out)["coverage"]} == {"copy of base (parents are equal)"}


# Sums


@pytest.mark.parametrize("weight", [0.5, 0.1, 1 / 3, 0.999])
def test_every_code_scale_and_value_of_a_fractional_merge_is_the_oracles(
    parents: dict[str, Path], tmp_path: Path, weight: float
) -> None:
    child = merged(parents, tmp_path / "out", weights={"reasoner": weight})
    want = expected(parents, {"base": 1 - weight, "reasoner": weight})
    assert child.keys() == want.keys()
    for name, stored in want.items():
        assert child[name] == stored, name


def test_three_parents_are_summed_base_first_then_in_the_order_of_weights(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    for number, order in enumerate((("reasoner", "third"), ("third", "reasoner"))):
        share = {"reasoner": 0.3, "third": 0.6}
        weights = {label: share[label] for label in order}
        child = merged(
            parents, tmp_path / str(number), weights=weights, select=["embedding", "norm", "attention"]
        )
        want = expected(
            parents, {"base": 1.0 - sum(weights.values()), **weights},
            lambda name: "self_attn" in name or "norm" in name or "embed_tokens" in name,
        )  # fmt: skip
        assert child == want


def test_parents_of_weight_zero_take_no_part(parents: dict[str, Path], tmp_path: Path) -> None:
    weights = {"reasoner": 0.5, "third": 0.5}
    child = merged(parents, tmp_path / "out", weights=weights, select=["norm", "attention"])
    assert child == expected(
        parents, {"base": 0.0, **weights}, lambda name: "self_attn" in name or "norm" in name
    )


def test_the_sum_is_float32_from_left_to_right_with_every_operation_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    parents = [torch.randn(1000, generator=generator) * 10**power for power in (3, 0, -3)]
    weights = (0.1, 0.7, 0.2)
    want = np.zeros(1000, np.float32)
    for index, (parent, weight) in enumerate(zip(parents, weights, strict=True)):
        term = parent.numpy() * np.float32(weight)
        want = term if index == 0 else want + term
    np.testing.assert_array_equal(weighted_sum(parents, weights).numpy(), want)
    assert torch.equal(weighted_sum(parents, (0.0, 1.0, 0.0)), parents[1])
    nan = torch.full((1000,), torch.nan)
    assert torch.equal(weighted_sum([nan, parents[0]], (0.0, 1.0)), parents[0])
    with pytest.raises(ValueError, match="every weight is 0"):
        weighted_sum(parents, (0.0, 0.0, 0.0))


def test_sums_leave_their_parents_alone() -> None:
    parents = [torch.ones(4), torch.full((4,), 2.0)]
    weighted_sum(parents, (0.5, 0.5))
    weighted_sum(parents, (1.0, 0.0)).add_(3)
    assert [float(parent[0]) for parent in parents] == [1.0, 2.0]


def test_a_merge_of_a_merge_is_what_two_runs_give(parents: dict[str, Path], tmp_path: Path) -> None:
    """Lazy refs compose, with one rounding less: the sum in between is not stored."""
    first = merge(parents, weights={"reasoner": 0.5}, select=["norm", "attention"])
    assert isinstance(first, Checkpoint)
    lazy = AssemblyOfExperts(base="first", weights={"third": 1.0}, select=("norm",)).apply(
        {"first": first, "third": open_checkpoint(parents["third"], "third")}
    )
    child = oracle.read_folder(lazy.save(tmp_path / "out").folder)
    half = expected(
        parents, {"base": 0.5, "reasoner": 0.5}, lambda name: "self_attn" in name or "norm" in name
    )
    donor = oracle.read_folder(parents["third"])
    attention = [name for name in half if "self_attn" in name and "layernorm" not in name]
    assert attention
    assert all(child[name] == half[name] for name in attention)
    assert all(child[name] == donor[name] for name in child if "norm" in name and "self_attn" not in name)
    assert [step["op"] for step in lazy.history] == ["merge.aoe", "merge.aoe"]


# The gate and the distances


def true_distances(parents: Mapping[str, Path], labels: list[str], norm: str) -> dict[str, float]:
    """The largest distance from the base of each tensor, in float64."""
    measure = oracle.rms_distance if norm == "rms" else oracle.relative_distance
    values = {label: meaning(parents[label]) for label in ("base", *labels)}
    return {
        name: max(measure(values[label][name], base) for label in labels)
        for name, base in values["base"].items()
    }


@pytest.mark.parametrize("norm", ["rms", "relative"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_gate_merges_exactly_what_is_further_apart(
    parents: dict[str, Path], tmp_path: Path, norm: str, weight: float
) -> None:
    far = true_distances(parents, ["reasoner"], norm)
    ranked = sorted(far.values())
    threshold = (ranked[len(far) // 2] + ranked[len(far) // 2 + 1]) / 2
    assert min(abs(gap / threshold - 1) for gap in ranked) > 1e-6
    child = merged(parents, tmp_path / "out", weights={"reasoner": weight}, threshold=threshold, norm=norm)
    chosen = {name for name, gap in far.items() if gap > threshold}
    assert 10 < len(chosen) < len(far) - 10
    if weight == 1.0:
        base, donor = (oracle.read_folder(parents[label]) for label in ("base", "reasoner"))
        want = {k: (donor if k.removesuffix("_scale_inv") in chosen else base)[k] for k in base}
    else:
        want = expected(parents, {"base": 0.5, "reasoner": 0.5}, chosen.__contains__)
    assert child == want


def test_the_gate_looks_at_the_furthest_parent_that_carries_weight(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    name = "model.norm.weight"
    near, far = (true_distances(parents, [label], "rms")[name] for label in ("reasoner", "third"))
    between = (near + far) / 2
    assert near < between < far
    base = oracle.read_folder(parents["base"])[name]
    rule = [{"match": "^model.norm"}]
    both = merged(
        parents, tmp_path / "1", weights={"reasoner": 0.4, "third": 0.1}, threshold=between, select=rule
    )
    one = merged(
        parents, tmp_path / "2", weights={"reasoner": 0.5, "third": 0.0}, threshold=between, select=rule
    )
    assert both[name] != base
    assert one[name] == base


def test_the_gate_is_strict_and_takes_a_threshold_per_rule(parents: dict[str, Path], tmp_path: Path) -> None:
    name = "model.norm.weight"
    exact = merge(parents, weights={"reasoner": 0.5}, select=["re:^model.norm"]).save(tmp_path / "0")
    gap = exact.manifest["metrics"][name]["distance"]["reasoner"]["rms"]
    base = oracle.read_folder(parents["base"])
    for number, (threshold, kept) in enumerate([(gap, True), (float(np.nextafter(gap, 0)), False)]):
        rule = {"match": "^model.norm", "threshold": threshold}
        child = merged(
            parents, tmp_path / f"x{number}", weights={"reasoner": 0.5}, select=[rule], threshold=1e9
        )
        assert (child[name] == base[name]) is kept


@pytest.mark.parametrize("threshold", [0.0, 1e-6, 0.012])
def test_measured_distances_are_those_of_float64(
    parents: dict[str, Path], tmp_path: Path, threshold: float
) -> None:
    weights = {"reasoner": 0.5, "third": 0.2}
    result = merge(parents, weights=weights, threshold=threshold).save(tmp_path / "out")
    found = strict_manifest(result.folder)["metrics"]
    for label in weights:
        for norm in ("rms", "relative"):
            want = true_distances(parents, [label], norm)
            assert found.keys() == want.keys()
            for name, gap in want.items():
                assert found[name]["distance"][label][norm] == pytest.approx(gap, rel=2e-6), (name, norm)


def test_distances_of_what_is_copied_are_sampled_and_say_so(parents: dict[str, Path], tmp_path: Path) -> None:
    result = merge(parents, weights={"reasoner": 1.0}, select=["routed_expert"]).save(tmp_path / "out")
    rows = strict_manifest(result.folder)["measurements"]
    keys = {(row["layer"], row["role"], row["mtp"]) for row in rows}
    assert len(keys) == len(rows)
    assert {"routed_expert", "attention", "router", "norm", "embedding", "head"} <= {
        row["role"] for row in rows
    }
    base, donor = (oracle.model_tensors(parents[label]) for label in ("base", "reasoner"))
    (router,) = [row for row in rows if (row["layer"], row["role"]) == (1, "router")]
    names = [f"model.layers.1.mlp.gate.{name}" for name in ("weight", "e_score_correction_bias")]
    whole = [torch.cat([side[name].reshape(-1) for name in names]) for side in (base, donor)]
    assert router["weights"] == router["of_weights"] == whole[0].numel()
    assert router["rms"] == pytest.approx(oracle.rms_distance(whole[1], whole[0]), rel=1e-12)
    assert router["relative"] == pytest.approx(oracle.relative_distance(whole[1], whole[0]), rel=1e-12)
    experts = [row for row in rows if row["role"] == "routed_expert"]
    assert [(row["layer"], row["mtp"]) for row in experts] == [(1, False), (2, True)]
    assert all(0 < row["weights"] < row["of_weights"] == 2 * 3 * 96 * 160 for row in experts)
    whole_of_noise = {"routed_expert", "shared_expert", "dense_mlp", "embedding", "head"}
    assert all(
        row["relative"] == pytest.approx(0.3, rel=0.1) for row in rows if row["role"] in whole_of_noise
    )


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_distances_of_very_small_and_very_large_weights(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    base, other = (torch.randn(50, 40, generator=generator) * scale for _ in range(2))
    found = distances(squares(base, [other]), base.numel(), ["x"])["x"]
    assert found["rms"] == pytest.approx(oracle.rms_distance(base, other), rel=1e-6)
    assert found["relative"] == pytest.approx(oracle.relative_distance(other, base), rel=1e-6)


def test_distances_of_zeros() -> None:
    zero, one = torch.zeros(4), torch.ones(4)
    assert distances(squares(zero, [zero]), 4, ["x"])["x"] == {"rms": 0.0, "relative": 0.0}
    assert distances(squares(zero, [one]), 4, ["x"])["x"]["rms"] == 1.0
    assert distances((0.0, 0.0), 0, ["x"])["x"] == {"rms": 0.0, "relative": 0.0}


def test_no_relative_threshold_is_above_the_distance_from_a_zero_base() -> None:
    found = distances(squares(torch.zeros(4), [torch.ones(4)]), 4, ["x"])["x"]
    assert found["relative"] > 2.0


def test_a_parent_with_forms_that_cannot_be_decoded_can_lend_other_tensors(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    """A bf16 base takes norms from an FP8 parent whose scales are bf16, which only copies can carry."""
    base = factories.deepseek_v3(tmp_path / "base", 1, fp8=False, **SIZES)
    odd = change_shards(shutil.copytree(parents["reasoner"], tmp_path / "odd"), lambda tensors: {
        name: tensor.to(torch.bfloat16) if name.endswith("_scale_inv") else tensor
        for name, tensor in tensors.items()
    })  # fmt: skip
    child = merged({"base": base, "odd": odd}, tmp_path / "out", weights={"odd": 0.5}, select=["norm"])
    assert child["model.norm.weight"] != oracle.read_folder(base)["model.norm.weight"]


# Anchors and rules

ANCHORS = {2: 0.2, 6: 0.6, 7: 0.1}


@pytest.mark.parametrize(
    ("weight", "role", "layer", "want"),
    [
        (0.3, "norm", None, 0.3), (0.3, "routed_expert", 5, 0.3),
        (ANCHORS, "attention", 0, 0.2), (ANCHORS, "attention", 2, 0.2), (ANCHORS, "attention", 3, 0.3),
        (ANCHORS, "attention", 4, 0.4), (ANCHORS, "attention", 6, 0.6), (ANCHORS, "attention", 7, 0.1),
        (ANCHORS, "attention", 8, 0.1), (ANCHORS, "routed_expert", 61, 0.1),
        (ANCHORS, "embedding", None, 0.2), (ANCHORS, "head", None, 0.1), (ANCHORS, "norm", None, 0.1),
        ({**ANCHORS, "embedding": 0.9}, "embedding", None, 0.9),
        ({**ANCHORS, "embedding": 0.9}, "attention", 0, 0.2),
        ({**ANCHORS, "head": 0.8}, "head", None, 0.8), ({**ANCHORS, "head": 0.8}, "norm", None, 0.8),
        ({**ANCHORS, "head": 0.8}, "norm", 9, 0.1),
        ({4: 0.7}, "attention", 0, 0.7), ({4: 0.7}, "attention", 9, 0.7), ({4: 0.7}, "head", None, 0.7),
    ],
)  # fmt: skip
def test_the_weight_at_a_tensor(weight: Any, role: Any, layer: int | None, want: float) -> None:
    assert weight_at(weight, TensorInfo(role, layer, None, False)) == pytest.approx(want, abs=1e-12)


def test_anchors_reach_every_layer_embedding_head_and_mtp(parents: dict[str, Path], tmp_path: Path) -> None:
    anchors = {0: 0.0, 2: 1.0, "embedding": 0.25, "head": 0.75}
    child = merged(parents, tmp_path / "out", weights={"reasoner": anchors})
    base, donor = (oracle.read_folder(parents[label]) for label in ("base", "reasoner"))

    def share(name: str) -> float:
        for layer, weight in ((0, 0.0), (1, 0.5), (2, 1.0)):
            if name.startswith(f"model.layers.{layer}."):
                return weight
        return 0.25 if "embed" in name else 0.75

    for name, stored in child.items():
        key = name.removesuffix("_scale_inv")
        if share(name) in (0.0, 1.0):
            assert stored == (donor if share(name) else base)[name], name
    for weight in (0.5, 0.25, 0.75):
        want = expected(
            parents,
            {"base": 1 - weight, "reasoner": weight},
            lambda name, weight=weight: share(name) == weight,
        )
        for name in child:
            key = name.removesuffix("_scale_inv")
            assert share(key) != weight or child[name] == want[name], name


def test_rules_are_taken_first_match_first_with_their_own_weights(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    select = [
        {"role": "routed_expert", "layers": 1, "weights": {"third": 1.0}},
        {"match": r"experts\.\d+\.down_proj", "weights": {"base": 1.0}},
        "routed_expert",
        {"role": "mtp", "match": "re:norm", "weights": {"third": 1.0}},
    ]
    child = merged(parents, tmp_path / "out", weights={"reasoner": 1.0}, select=select)
    stored = {label: oracle.read_folder(path) for label, path in parents.items()}
    for name in child:
        donor = "base"
        if is_expert(name):
            donor = "reasoner" if "down_proj" not in name else "base"
            donor = "third" if name.startswith("model.layers.1.") else donor
        elif name.startswith("model.layers.2.") and "norm" in name:
            donor = "third"
        assert child[name] == stored[donor][name], name


def test_layer_ranges_hold_both_ends_and_a_single_layer(parents: dict[str, Path]) -> None:
    def layers(text: str) -> set[int | None]:
        child = merge(parents, weights={"reasoner": 1.0}, select=[text])
        return {ref.info.layer for ref in child.tensors.values() if ref.sources()[0].origin == "reasoner"}

    assert layers("layers:0-1") == {0, 1}
    assert layers("layers:2") == {2}
    assert layers("mtp") == {2}


def recipe_error(parents: dict[str, Path], **params: Any) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        merge(parents, **params)
    assert caught.value.exit_code == 3
    return caught.value


def test_a_rule_that_takes_nothing_is_an_error_that_says_why(parents: dict[str, Path]) -> None:
    error = recipe_error(parents, weights={"reasoner": 1.0}, select=["routed_expert", "re:^no-such"])
    assert "re:^no-such" in error.message and "none of the" in error.message
    assert error.path == ("select", 1)
    assert "routed_expert" in error.hint
    rules: list[Any] = [
        "routed_expert",
        {"role": "routed_expert", "layers": "1-2", "weights": {"third": 1.0}},
    ]
    error = recipe_error(parents, weights={"reasoner": 1.0}, select=rules)
    assert "taken by entries before it" in error.message
    assert error.path == ("select", 1)


def test_roles_of_an_unknown_family_are_explained(tmp_path: Path) -> None:
    folder = change_config(factories.llama(tmp_path / "base", 1), model_type="brand_new")
    error = recipe_error(
        {"base": folder, "reasoner": folder}, weights={"reasoner": 0.5}, select=["attention"]
    )
    assert "brand_new" in error.hint and "re:" in error.hint
    merge({"base": folder, "reasoner": folder}, weights={"reasoner": 0.5}, select=["re:self_attn"])


HALF = {"weights": {"reasoner": 0.5}}


@pytest.mark.parametrize(
    "params",
    [
        {"weights": {"reasoner": 0.7, "third": 0.4}}, {"weights": {"base": 0.5, "reasoner": 0.4}},
        {"weights": {"base": 0.6, "reasoner": 0.5}}, {"weights": {"base": 0.5}},
        {"weights": {"reasoner": -0.1}}, {"weights": {"reasoner": float("nan")}},
        {"weights": {"reasoner": {"embedding": 0.5}}}, {"weights": {"reasoner": {"first": 0.5}}},
        {"weights": {"reasoner": {1: 2.0}}}, {"weights": {"reasoner": {}}}, {"weights": {"reasoner": 1.2}},
        {"weight": {"reasoner": 0.5}}, {**HALF, "threshold": -1}, {**HALF, "threshold": float("nan")},
        {**HALF, "norm": "l1"}, {**HALF, "select": []},
        {**HALF, "select": ["experts"]}, {**HALF, "select": ["re:("]}, {**HALF, "select": ["layers:5-3"]},
        {**HALF, "select": [3]}, {**HALF, "select": [{"rolle": "norm"}]},
        {**HALF, "select": [{"weights": {"reasoner": 0.8, "third": 0.3}}]},
    ],
    ids=str,
)  # fmt: skip
def test_params_that_make_no_sense_are_refused_at_once(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AssemblyOfExperts(base="base", **params)


@pytest.mark.parametrize("key", ["role", "match", "layers", "weights", "threshold"])
def test_an_empty_condition_in_a_rule_is_no_crash(key: str) -> None:
    """`role:` with nothing behind it is null in YAML."""
    assert Rule.model_validate({key: None}) == Rule()


def test_anchors_that_sum_to_more_than_one_somewhere_are_refused_at_the_tensor(
    parents: dict[str, Path],
) -> None:
    weights = {"reasoner": {0: 0.5, 2: 0.9}, "third": 0.3}
    error = recipe_error(parents, weights=weights)
    assert "more than 1" in error.message and "(at " in error.message
    assert error.path == ("weights",)
    rule = {"role": "routed_expert", "weights": weights}
    assert recipe_error(parents, weights={"reasoner": 0.5}, select=["norm", rule]).path == (
        "select",
        1,
        "weights",
    )


def test_weights_may_miss_one_by_rounding(parents: dict[str, Path]) -> None:
    child = merge(parents, weights={"reasoner": 0.1 + 0.2, "third": 0.7}, select=["norm"])
    assert child.tensors["model.norm.weight"].lineage()["weights"][0] == 0.0
    child = merge(parents, weights={"reasoner": 0.9999999}, select=["norm"])
    assert child.tensors["model.norm.weight"].lineage() == {"copy": "reasoner"}
    merge(parents, weights={"base": 0.3333333, "reasoner": 0.3333333, "third": 0.3333333}, select=["norm"])


# Parents that do not fit


def test_all_that_keeps_parents_apart_stands_in_one_table(parents: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(parents["reasoner"], tmp_path / "other")
    change_config(other, vocab_size=300, model_type="llama")
    change_shards(other, lambda tensors: {
        name: tensor[:300] if "embed_tokens" in name or name == "lm_head.weight" else tensor
        for name, tensor in tensors.items() if name != "model.norm.weight"
    })  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        merge({"base": parents["base"], "reasoner": other, "third": parents["third"]}, weights={
            "reasoner": 0.4, "third": 0.4,
        })  # fmt: skip
    assert caught.value.exit_code == 4
    assert caught.value.table is not None
    rows = {row[0]: row for row in caught.value.table.rows}
    assert {row[1] for row in rows.values()} == {"reasoner"}
    assert "300" in rows["config.json: vocab_size"][2] and "320" in rows["config.json: vocab_size"][2]
    assert "llama" in rows["config.json: model_type"][2]
    assert "300, 160" in rows["model.embed_tokens.weight"][2] and "320, 160" in rows["lm_head.weight"][2]
    assert rows["model.norm.weight"][2] == "missing"
    assert caught.value.hint


def test_differences_that_the_merge_does_not_touch_are_told_not_refused(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    other = shutil.copytree(parents["reasoner"], tmp_path / "other")
    change_config(other, vocab_size=300, rope_theta=1.5)
    change_shards(other, lambda tensors: {
        **{name: tensor[:300] if "embed_tokens" in name else tensor for name, tensor in tensors.items()},
        **({"model.extra.weight": torch.ones(2)} if "lm_head.weight" in tensors else {}),
    })  # fmt: skip
    pair = {"base": parents["base"], "reasoner": other}
    child = merge(pair, weights={"reasoner": 1.0}, select=["routed_expert"])
    told = " ".join(event.message for event in child.events)
    assert "vocab_size: 320 in base, 300 in reasoner" in told
    assert "rope_theta" in told and "model.extra.weight" in told
    result = child.save(tmp_path / "out")
    base, donor = oracle.read_folder(parents["base"]), oracle.read_folder(other)
    stored = oracle.read_folder(result.folder)
    assert all(stored[name] == (donor if is_expert(name) else base)[name] for name in base)
    assert stored.keys() == base.keys()


def test_nan_in_a_parent_is_refused_by_name_or_carried_where_allowed(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    expert = "model.layers.1.mlp.experts.1.up_proj.weight"

    def broken(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if expert in tensors:
            tensors[expert].view(torch.uint8)[90, 150] = 0x7F
        return tensors

    other = change_shards(shutil.copytree(parents["reasoner"], tmp_path / "other"), broken)
    pair = {"base": parents["base"], "reasoner": other}
    gated = [{"weights": {"reasoner": weight}, "threshold": 0.001} for weight in (0.5, 1.0)]
    plain = [{"weights": {"reasoner": weight}} for weight in (0.5, 1.0)]
    for number, params in enumerate(plain + gated):
        out = tmp_path / str(number)
        with pytest.raises(CheckpointError, match="holds NaN") as caught:
            merge(pair, select=["routed_expert"], **params).save(out)
        assert expert in caught.value.message and "reasoner" in caught.value.message
        assert "allow_nonfinite" in caught.value.hint
        assert not out.exists()
        merge(pair, select=["routed_expert"], **params).save(out, allow_nonfinite=True, fresh=True)
        found = oracle.model_tensors(out)
        assert bool(found[expert][90, 150].isnan())
        assert not any(bool(tensor.isnan().any()) for name, tensor in found.items() if name != expert)
    # Nobody asked for the broken expert here.
    merge(pair, weights={"reasoner": 0.5}, select=["attention"]).save(tmp_path / "attention")


def test_no_infinity_comes_into_being_unnoticed(tmp_path: Path) -> None:
    base = factories.llama(tmp_path / "base", 1, dtype=torch.float16)
    other = factories.llama(tmp_path / "other", 2)
    change_shards(other, lambda tensors: {
        name: tensor * 1e7 if name == "model.norm.weight" else tensor for name, tensor in tensors.items()
    })  # fmt: skip
    try:
        child = merged(
            {"base": base, "reasoner": other}, tmp_path / "out", weights={"reasoner": 1.0}, select=["norm"]
        )
    except CheckpointError:
        return
    assert bool(oracle.stored_values(*child["model.norm.weight"]).isfinite().all())


# Fused experts


@pytest.fixture(params=["gpt_oss_bf16", "llama4_text"])
def fused(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Path]]:
    """A family of fused experts in bf16, its pair of parents."""
    factory = getattr(factories, request.param)
    pair = {label: factory(tmp_path / label, seed) for seed, label in enumerate(("base", "reasoner"))}
    return request.param, pair


def raw_bf16(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every stored tensor as float32 values of its stored shape."""
    return {
        name: (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        for name, (_, shape, raw) in oracle.read_folder(folder).items()
    }


def half_of(base: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    total = np.float32(0.5) * base + np.float32(0.5) * other
    bits = total.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32) << 16
    return rounded.view(np.float32)


def gate_columns(family: str, width: int) -> np.ndarray[Any, Any]:
    """Which of the 2·I stored columns of gate_up_proj are the gate's."""
    columns = np.arange(width)
    return columns % 2 == 0 if family == "gpt_oss_bf16" else columns < width // 2


@pytest.mark.parametrize(
    ("select", "experts", "gate", "up", "down"),
    [
        ("routed_expert", range(4), True, True, True),
        (r"re:experts\.2\.", [2], True, True, True),
        (r"re:experts\.[13]\.gate_proj", [1, 3], True, False, False),
        (r"re:experts\.\d+\.up_proj", range(4), False, True, False),
        (r"re:layers\.0\..*experts\.\d\.down_proj", range(4), False, False, True),
    ],
)
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_fused_experts_are_merged_expert_by_expert(
    fused: tuple[str, dict[str, Path]], tmp_path: Path, weight: float,
    select: str, experts: Any, gate: bool, up: bool, down: bool,
) -> None:  # fmt: skip
    family, pair = fused
    child = merge(pair, weights={"reasoner": weight}, select=[select]).save(
        tmp_path / "out", shard_bytes=60_000
    )
    found, base, other = raw_bf16(child.folder), raw_bf16(pair["base"]), raw_bf16(pair["reasoner"])
    check_written(child.folder, open_checkpoint(pair["base"]).tensors)
    touched = 0
    for name, stored in base.items():
        want = stored.copy()
        new = half_of(stored, other[name]) if weight == 0.5 else other[name]
        layer = "layers.0." in name if "layers" in select else True
        if layer and "experts." in name and "shared" not in name:
            for expert in experts:
                if "down_proj" in name:
                    want[expert] = new[expert] if down else want[expert]
                else:
                    columns = gate_columns(family, stored.shape[-1])
                    chosen = columns * gate + ~columns * up
                    want[expert][..., chosen] = new[expert][..., chosen]
        touched += int((want != stored).any())
        np.testing.assert_array_equal(found[name], want, err_msg=name)
    assert touched


def test_packed_experts_are_copied_whole_and_by_projection(tmp_path: Path) -> None:
    pair = {
        label: factories.gpt_oss_mxfp4(tmp_path / label, seed)
        for seed, label in enumerate(("base", "reasoner"))
    }
    base, donor = (oracle.read_folder(path) for path in pair.values())
    child = merged(pair, tmp_path / "whole", weights={"reasoner": 1.0}, select=["routed_expert"])
    for name, stored in child.items():
        assert stored == (donor if "experts" in name else base)[name], name
    child = merged(
        pair, tmp_path / "gate", weights={"reasoner": 1.0}, select=[r"re:experts\.[02]\.gate_proj"]
    )
    for name, (_, shape, raw) in child.items():
        want = np.frombuffer(base[name][2], np.uint8).reshape(*shape, -1).copy()
        if "gate_up_proj" in name:
            other = np.frombuffer(donor[name][2], np.uint8).reshape(*shape, -1)
            want[[0, 2], ::2] = other[[0, 2], ::2]
        assert raw == want.tobytes(), name


def test_packed_experts_are_computed_with_and_packed_again(tmp_path: Path) -> None:
    pair = {
        label: factories.gpt_oss_mxfp4(tmp_path / label, seed)
        for seed, label in enumerate(("base", "reasoner"))
    }
    selected = r"re:experts\.[02]\.(gate|down)_proj"
    child = merged(pair, tmp_path / "out", weights={"reasoner": 0.4}, select=[selected])
    base, donor = (oracle.read_folder(path) for path in pair.values())
    for name in (name for name in base if name.endswith("_blocks")):
        scales = name.replace("_blocks", "_scales")
        step = 2 if "gate_up" in name else 1
        values = [
            oracle.decode_mxfp4(
                oracle.stored_values(*parent[name])[[0, 2], ::step],
                oracle.stored_values(*parent[scales])[[0, 2], ::step],
            )
            for parent in (base, donor)
        ]
        coded = oracle.encode_mxfp4(oracle.weighted_sum(values, (0.6, 0.4)))
        for part, new in zip((name, scales), coded, strict=True):
            want = oracle.stored_values(*base[part]).clone()
            want[[0, 2], ::step] = new
            assert torch.equal(oracle.stored_values(*child[part]), want), part


def test_packed_experts_are_measured_for_a_threshold(tmp_path: Path) -> None:
    pair = {
        label: factories.gpt_oss_mxfp4(tmp_path / label, seed)
        for seed, label in enumerate(("base", "reasoner"))
    }
    base, donor = (oracle.read_folder(path) for path in pair.values())
    for threshold, want in ((1e-3, donor), (1e3, base)):
        child = merged(
            pair, tmp_path / str(threshold), weights={"reasoner": 1.0}, threshold=threshold,
            select=[r"re:experts\.\d+\.(gate|up|down)_proj\.weight"],
        )  # fmt: skip
        for name, stored in child.items():
            packed = name.endswith(("_blocks", "_scales"))
            assert stored == (want if packed else base)[name], name


# Parents stored in different forms


def test_a_bf16_donor_is_re_encoded_for_an_fp8_base_and_that_is_told(tmp_path: Path) -> None:
    pair = {
        "base": factories.deepseek_v3(tmp_path / "base", 1, **SIZES),
        "reasoner": factories.deepseek_v3(tmp_path / "reasoner", 2, fp8=False, **SIZES),
    }
    child = merge(pair, weights={"reasoner": 1.0}, select=["routed_expert"])
    (event,) = [each for each in child.events if each.kind == "re-encoded"]
    assert set(event.tensors) == {name for name in child.tensors if is_expert(name)}
    result = child.save(tmp_path / "out")
    assert oracle.read_folder(result.folder) == expected(pair, {"base": 0.0, "reasoner": 1.0}, is_expert)
    check_written(result.folder, child.tensors)
    assert "re-encoded" in [each["kind"] for each in strict_manifest(result.folder)["events"]]
    half = merged(pair, tmp_path / "half", weights={"reasoner": 0.5})
    assert half == expected(pair, {"base": 0.5, "reasoner": 0.5})


def test_an_fp8_donor_is_decoded_for_a_bf16_base(tmp_path: Path) -> None:
    pair = {
        "base": factories.deepseek_v3(tmp_path / "base", 1, fp8=False, **SIZES),
        "reasoner": factories.deepseek_v3(tmp_path / "reasoner", 2, **SIZES),
    }
    child = merged(pair, tmp_path / "out", weights={"reasoner": 1.0}, select=["routed_expert", "attention"])
    want = expected(
        pair, {"base": 0.0, "reasoner": 1.0},
        lambda name: is_expert(name) or ("self_attn" in name and "norm" not in name),
    )  # fmt: skip
    norms = {name for name in child if "self_attn" in name and "norm" in name}
    assert {name: value for name, value in child.items() if name not in norms} == {
        name: value for name, value in want.items() if name not in norms
    }


def scaled(tmp_path: Path, storage: bool) -> dict[str, Path]:
    """An fp32-scaled base and a donor with powers of two, stored as F32 or F8_E8M0."""
    return {
        "base": factories.deepseek_v3(tmp_path / "base", 1, **SIZES),
        "reasoner": factories.deepseek_v3(
            tmp_path / "reasoner", 2, scale_fmt="ue8m0", e8m0_storage=storage, **SIZES
        ),
    }


@pytest.mark.parametrize("storage", [False, True], ids=["F32", "F8_E8M0"])
@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize("swap", [False, True], ids=["fp32 base", "ue8m0 base"])
def test_mixed_scale_formats_need_an_explicit_output_format(
    tmp_path: Path, storage: bool, weight: float, swap: bool
) -> None:
    pair = scaled(tmp_path, storage)
    if swap:
        pair = {"base": pair["reasoner"], "reasoner": pair["base"]}
    child = merge(pair, weights={"reasoner": weight}, select=["routed_expert"])
    with pytest.raises(PlanError, match="ue8m0") as caught:
        child.save(tmp_path / "out")
    assert "fp8-block" in caught.value.hint and "bf16" in caught.value.hint
    assert "12 tensors" in caught.value.message
    values = {label: oracle.model_tensors(path) for label, path in pair.items()}
    for form in ("bf16", "fp8-block"):
        stored = oracle.read_folder(child.save(tmp_path / form, format=form).folder)
        for name in values["base"]:
            if is_expert(name):
                total = oracle.weighted_sum(
                    [values[label][name] for label in (["base"] if weight < 1 else []) + ["reasoner"]],
                    [0.5, 0.5] if weight < 1 else [1.0],
                )
                want = (
                    {name: ("BF16", tuple(total.shape), bf16_bytes(total))} if form == "bf16"
                    else encoded(total, oracle.read_folder(scaled_like(tmp_path)), name)
                )  # fmt: skip
                assert all(stored[key] == value for key, value in want.items()), (form, name)


def scaled_like(tmp_path: Path) -> Path:
    """The folder of the pair that has fp32 scales."""
    return tmp_path / "base"


def test_mixed_formats_that_do_not_meet_are_no_matter(tmp_path: Path) -> None:
    child = merged(
        scaled(tmp_path, False), tmp_path / "out", weights={"reasoner": 0.5}, select=["norm", "router"]
    )
    assert child.keys() == oracle.read_folder(tmp_path / "base").keys()


@pytest.mark.parametrize("storage", [False, True], ids=["F32", "F8_E8M0"])
def test_powers_of_two_stay_powers_of_two(tmp_path: Path, storage: bool) -> None:
    pair = {
        label: factories.deepseek_v3(tmp_path / label, seed, scale_fmt="ue8m0", e8m0_storage=storage, **SIZES)
        for seed, label in enumerate(("base", "reasoner"))
    }
    child = merged(pair, tmp_path / "out", weights={"reasoner": 0.5}, select=["routed_expert"])
    values = {label: oracle.model_tensors(path) for label, path in pair.items()}
    for name in values["base"]:
        if is_expert(name):
            total = oracle.weighted_sum([values["base"][name], values["reasoner"][name]], [0.5, 0.5])
            codes, scales = oracle.encode_fp8_block(total, ue8m0=True)
            assert child[name][2] == codes.numpy().tobytes()
            scale = oracle.stored_values(*child[f"{name}_scale_inv"])
            assert torch.equal(oracle.decode_e8m0(scale) if storage else scale, scales)


def test_neighbours_that_lie_unaligned_in_a_file_are_read_right(tmp_path: Path) -> None:
    """Foreign writers pack tensors without regard to alignment; small ones are read in one go."""
    names = ["a", "b", "c", "d"]
    shapes: list[tuple[int, ...]] = [(3,), (5, 3), (7,), (2, 2)]
    dtypes = ["BF16", "F32", "BF16", "F64"]
    generator = np.random.default_rng(0)
    pair: dict[str, Path] = {}
    for label in ("base", "reasoner"):
        folder = tmp_path / label
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
        table: dict[str, Any] = {"pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
        body = b"\0"
        for name, shape, dtype in zip(names, shapes, dtypes, strict=True):
            values = generator.standard_normal(shape)
            if dtype == "BF16":
                data = bf16_bytes(torch.from_numpy(values.astype(np.float32)))
            else:
                data = values.astype({"F32": np.float32, "F64": np.float64}[dtype]).tobytes()
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
            body += data
        raw_file(folder / "model.safetensors", table, body)
        pair[label] = folder
    child = merged(pair, tmp_path / "out", weights={"reasoner": 0.5}, select=["re:^[abcd]$"])
    stored = oracle.read_folder(pair["base"])
    values = {label: oracle.model_tensors(path) for label, path in pair.items()}
    for name, dtype in zip(names, dtypes, strict=True):
        total = oracle.weighted_sum([values["base"][name], values["reasoner"][name]], [0.5, 0.5])
        if dtype == "F64":
            assert child[name][2] == total.to(torch.float64).numpy().tobytes()
        else:
            assert child[name] == encoded(total, stored, name)[name]


def test_an_empty_tensor_beside_another_does_not_take_its_place(tmp_path: Path) -> None:
    pair: dict[str, Path] = {}
    for number, label in enumerate(("base", "reasoner")):
        pair[label] = tmp_path / label
        pair[label].mkdir()
        (pair[label] / "config.json").write_text('{"model_type": "llama"}')
        table = {
            "empty": {"dtype": "F32", "shape": [4, 0], "data_offsets": [0, 0]},
            "full": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "next": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
        }
        values = np.full(8, 2 * number, np.float32)
        raw_file(pair[label] / "model.safetensors", table, values.tobytes())
    run = Thread(target=lambda: merged(pair, tmp_path / "out", weights={"reasoner": 0.5}), daemon=True)
    run.start()
    run.join(4)
    assert not run.is_alive(), "the run never ends"
    child = oracle.read_folder(tmp_path / "out")
    assert child["empty"] == ("F32", (4, 0), b"")
    assert child["full"][2] == child["next"][2] == np.ones(4, np.float32).tobytes()
