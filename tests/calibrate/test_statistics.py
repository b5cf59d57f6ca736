"""Sums of experts in the walk against a loop over tokens in float64; the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expert_sums import naive_sums
from walk_models import Families, sequences, settings

import surgery
from surgery.calibrate.batches import Batch, make_batches
from surgery.calibrate.ranks import ONE_RANK
from surgery.calibrate.statistics import (
    FIELDS,
    ExpertStatistics,
    LayerStatistics,
    read_statistics,
    row_norms,
    token_contributions,
)
from surgery.calibrate.walk import Walk
from surgery.errors import CheckpointError, UsageError
from surgery.operators.experts.keep import expert_shape

LENGTHS = (19, 19, 7, 12, 5)
DOMAINS = (0, 0, 0, 1, 1)


class Taking:
    """A step that takes the sums and changes nothing."""

    def __init__(self, checkpoint: Any, domains: int) -> None:
        self.shape = expert_shape(checkpoint)
        self.domains = domains
        self.sums: dict[int, Any] = {}

    def outline(self, checkpoint: Any) -> Any:
        return checkpoint

    def observe(self, layer: int, **_: Any) -> LayerStatistics | None:
        if layer not in self.shape.layers:
            return None
        taking = LayerStatistics(layer, self.shape.count, self.domains, self.shape.rules.norm, ONE_RANK)
        self.sums[layer] = taking.sums
        return taking

    def finish(self, layer: int, refs: Any, replay: Any) -> None:
        return None


def taken(
    folder: Path, batches: Sequence[Batch], domains: int, dtype: torch.dtype = torch.float32
) -> dict[int, Any]:
    checkpoint = surgery.open(folder)
    step: Any = Taking(checkpoint, domains)
    Walk(checkpoint, batches, [step], settings(dtype)).run()
    return step.sums


def relative(found: Any, reference: Any) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "qwen3_moe", "qwen2_moe", "olmoe"])
def test_sums_are_those_of_a_loop_over_tokens(tiny: Families, family: str) -> None:
    """Two domains, rows of different lengths: padding counts nowhere, and nothing crosses domains."""
    data = sequences(LENGTHS, seed=4, domains=DOMAINS)
    batches = make_batches(data, 40)
    assert any(min(batch.lengths) < max(batch.lengths) for batch in batches)
    found = taken(tiny(family), batches, 2)
    reference = naive_sums(tiny(family), family, data, 2)
    assert found.keys() == reference.keys() and len(found) == 2
    for layer, sums in found.items():
        assert np.array_equal(sums[:, 0], reference[layer][:, 0])  # counts are exact
        for domain in (0, 1):
            for number, field in enumerate(FIELDS):
                assert relative(sums[domain, number], reference[layer][domain, number]) < 2e-5, field


def test_counts_add_up_to_tokens_times_choices(tiny: Families) -> None:
    data = sequences(LENGTHS, domains=DOMAINS)
    for sums in taken(tiny("deepseek_v3"), make_batches(data, 64), 2).values():
        assert sums[0, 0].sum() == 2 * sum(LENGTHS[:3])
        assert sums[1, 0].sum() == 2 * sum(LENGTHS[3:])


def test_batches_do_not_show_in_sums(tiny: Families) -> None:
    """One sequence at a time or all at once: the same counts, the same sums to rounding."""
    data = sequences(LENGTHS, seed=2)
    single = taken(tiny("qwen3_moe"), make_batches(data, 1), 1)
    joint = taken(tiny("qwen3_moe"), make_batches(data, 1000), 1)
    for layer, sums in single.items():
        assert np.array_equal(sums[:, 0], joint[layer][:, 0])
        assert relative(sums, joint[layer]) < 1e-5


def test_contributions_by_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    residual, routed = (torch.randn(37, 11, generator=generator) for _ in range(2))
    residual[3] = 0  # a cosine with nothing is 0
    routed[5] = 2 * residual[5]  # parallel: contributes nothing
    routed[6] = -3 * residual[6]  # turned around: 2
    found = token_contributions(residual, routed).double()
    for token, (h, y) in enumerate(zip(residual.double(), routed.double(), strict=True)):
        after = h + y
        cosine = float(h @ after / (h.norm() * after.norm())) if float(h.norm()) else 0.0
        assert float(found[token]) == pytest.approx(max(0.0, 1 - cosine), abs=2e-6)
    assert float(found[5]) == pytest.approx(0, abs=1e-6) and float(found[6]) == pytest.approx(2)
    assert float(token_contributions(residual, torch.zeros_like(routed)).min()) >= 0


def test_small_contributions_keep_their_digits() -> None:
    """Experts that turn the stream by a thousandth: 1 − cos in float32 would be a quarter off."""
    generator = torch.Generator().manual_seed(2)
    residual, routed = (torch.randn(9, 7168, generator=generator) for _ in range(2))
    routed *= 1e-3
    wide, after = residual.double(), residual.double() + routed.double()
    expected = 1 - (wide * after).sum(-1) / (wide.norm(dim=-1) * after.norm(dim=-1))
    found = token_contributions(residual, routed).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_norms_are_taken_in_float32() -> None:
    """Sums of squares would round in bfloat16."""
    values = torch.full((2, 300), 1.0, dtype=torch.bfloat16)
    values[1] = 2.0**50
    assert row_norms(values).tolist() == pytest.approx([300**0.5, 300**0.5 * 2.0**50], rel=1e-6)


def test_nan_is_told_with_its_layer(tiny: Families, tmp_path: Path) -> None:
    import shutil

    from tiny_models import edit_tensors

    folder = Path(shutil.copytree(tiny("mixtral"), tmp_path / "model"))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(6):
            tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"][0, 0] = float("nan")

    edit_tensors(folder, spoil)
    with pytest.raises(CheckpointError, match=r"layer 1.*NaN"):
        taken(folder, make_batches(sequences((9,)), 64), 1)


def statistics() -> ExpertStatistics:
    generator = np.random.default_rng(3)
    layers = {layer: generator.random((2, len(FIELDS), 5)) * 10.0**layer for layer in (1, 4, 11)}
    return ExpertStatistics(("a", "b"), layers, {"model": "m", "propagate": "original"})


def test_file_gives_back_the_same_bits(tmp_path: Path) -> None:
    written = statistics()
    (tmp_path / "s.json").write_text(written.dump())
    read = read_statistics(tmp_path / "s.json")
    assert read.digest() == written.digest() and read.domains == ("a", "b")
    assert all(np.array_equal(read.layers[layer], sums) for layer, sums in written.layers.items())
    assert np.array_equal(read.of(4, "gate_norm"), written.layers[4][:, 5])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.update(kind="else"), "no expert statistics"),
        (lambda d: d.update(schema=9), "schema 9"),
        (lambda d: d.update(fields=["count"]), "schema"),
        (lambda d: d["layers"].update({"1": [[1.0]]}), "layer 1"),
        (lambda d: d["layers"].update({"1": [[["x"] * 5] * 8] * 2}), "layer|whole|number"),
        (lambda d: d["layers"].update({"one": d["layers"]["1"]}), "layer|whole|number"),
        (lambda d: d.pop("layers"), "layers|whole"),
        (lambda d: d.pop("provenance"), "provenance|whole"),
        (lambda d: d.pop("domains"), "domains|whole"),
    ],
)
def test_spoilt_files_are_refused(tmp_path: Path, change: Any, told: str) -> None:
    document = json.loads(statistics().dump())
    change(document)
    path = tmp_path / "s.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=told) as caught:
        read_statistics(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("text", ["", "[1]", "{", "null"])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UsageError, match=r"s\.json"):
        read_statistics(tmp_path / "s.json")
    with pytest.raises(UsageError, match="cannot read"):
        read_statistics(tmp_path / "none.json")
