"""Every classic merge method against its formula in float64, on odd shapes; identities; reproducibility."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import merge_formulas as formulas
import pytest
import torch
from merge_methods import ALL, child, write
from safetensors.torch import load_file

from surgery.errors import RecipeError
from surgery.operators.merge.noise import NoiseRef
from surgery.operators.merge.selection import Selector
from surgery.stream.checkpoint import Checkpoint, ReadContext
from surgery.stream.source import open_checkpoint

Tensors = dict[str, torch.Tensor]
SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (7, 13),
    "model.layers.0.input_layernorm.weight": (17,),
    "model.layers.0.self_attn.q_proj.bias": (1,),
    "model.layers.1.self_attn.q_proj.weight": (259, 5),
    "model.layers.2.mlp.down_proj.weight": (3, 5, 2),
    "model.norm.weight": (33,),
}
LARGE = {"model.layers.0.mlp.up_proj.weight": (300, 5003)}
"""Several tiles, the last one shorter."""


def family(
    tmp_path: Path, shapes: Mapping[str, tuple[int, ...]] = SHAPES, *, seed: int = 0, apart: float = 0.7
) -> tuple[dict[str, Checkpoint], dict[str, Tensors]]:
    """A base and three models near it."""
    random = torch.Generator().manual_seed(seed)
    values = {"base": {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}}
    for label in ("a", "b", "c"):
        values[label] = {
            name: base + apart * torch.randn(base.shape, generator=random)
            for name, base in values["base"].items()
        }
    folders = {label: write(tmp_path / label, tensors) for label, tensors in values.items()}
    return {label: open_checkpoint(folder, label) for label, folder in folders.items()}, values


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


def wide(values: Mapping[str, Tensors], name: str) -> dict[str, torch.Tensor]:
    return {label: tensors[name].double() for label, tensors in values.items()}


def deltas(v: Mapping[str, torch.Tensor], *labels: str) -> list[torch.Tensor]:
    """Differences as float32 has them, so that borders fall on the same entries."""
    return [(v[label].float() - v["base"].float()).double() for label in labels]


def crumbs(v: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    a, b = deltas(v, "a", "b")
    return [formulas.trimmed(a, 0.6, 0.2), formulas.trimmed(b, 0.9, 0.05)]


ABC = {"a": {"weight": 0.5}, "b": {"weight": 0.3}, "c": {"weight": 0.4}}
DENSE = {"a": {"weight": 0.5, "density": 0.4}, "b": {"weight": 0.3, "density": 0.7}}
CRUMBS = {"a": {"weight": 0.5, "density": 0.6, "gamma": 0.2}, "b": {"density": 0.9, "gamma": 0.05}}
Case = tuple[str, dict[str, Any], Callable[[dict[str, torch.Tensor]], torch.Tensor]]
CASES: list[Case] = [
    ("linear", {"models": ABC}, lambda v: formulas.linear([v["a"], v["b"], v["c"]], [0.5, 0.3, 0.4])),
    ("linear", {"models": {"a": 0.5, "b": -0.2}, "normalize": False}, lambda v: 0.5 * v["a"] - 0.2 * v["b"]),
    (
        "slerp", {"base": "base", "models": {"a": {}}, "t": 0.3},
        lambda v: formulas.slerp(v["base"], v["a"], 0.3),
    ),
    ("nuslerp", {"models": {"a": 1, "b": 3}}, lambda v: formulas.slerp(v["a"], v["b"], 0.75)),
    (
        "nuslerp", {"models": {"a": 1, "b": 3}, "rows": True},
        lambda v: formulas.row_slerp(v["a"], v["b"], 0.75),
    ),
    (
        "nuslerp", {"base": "base", "models": {"a": 1, "b": 3}},
        lambda v: v["base"] + formulas.slerp(v["a"] - v["base"], v["b"] - v["base"], 0.75),
    ),
    (
        "nuslerp", {"base": "base", "models": {"a": 1, "b": 3}, "rows": True},
        lambda v: v["base"] + formulas.row_slerp(v["a"] - v["base"], v["b"] - v["base"], 0.75),
    ),
    ("karcher", {"models": ABC}, lambda v: formulas.karcher([v["a"], v["b"], v["c"]], [0.5, 0.3, 0.4])),
    (
        "model_stock", {"base": "base", "models": {"a": {}, "b": {}, "c": {}}},
        lambda v: formulas.model_stock(v["base"], [v["a"], v["b"], v["c"]]),
    ),
    (
        "task_arithmetic", {"base": "base", "models": ABC, "scale": 0.6},
        lambda v: formulas.task_sum(v["base"], deltas(v, "a", "b", "c"), [0.5, 0.3, 0.4], 0.6),
    ),
    (
        "task_arithmetic", {"base": "base", "models": {"a": 1, "b": 3}, "normalize": "weights"},
        lambda v: formulas.task_sum(v["base"], deltas(v, "a", "b"), [0.25, 0.75]),
    ),
    (
        "ties", {"base": "base", "models": DENSE},
        lambda v: formulas.elected(
            v["base"], [formulas.trimmed(d, s) for d, s in zip(deltas(v, "a", "b"), (0.4, 0.7), strict=True)],
            [0.5, 0.3], divide=True,
        ),
    ),
    (
        "ties", {"base": "base", "models": {"a": {"weight": 0.5}, "b": {"weight": 0.3}}, "normalize": "none"},
        lambda v: formulas.elected(v["base"], deltas(v, "a", "b"), [0.5, 0.3], divide=False),
    ),
    (
        "breadcrumbs", {"base": "base", "models": CRUMBS},
        lambda v: formulas.task_sum(
            v["base"],
            crumbs(v),
            [0.5, 1.0],
        ),
    ),
    (
        "breadcrumbs", {"base": "base", "models": CRUMBS, "elect_signs": True},
        lambda v: formulas.elected(
            v["base"],
            crumbs(v),
            [0.5, 1.0], divide=False,
        ),
    ),
    (
        "sce", {"base": "base", "models": {"a": {}, "b": {}}},
        lambda v: formulas.sce(v["base"], [v["a"], v["b"]], 1.0),
    ),
    ("arcee_fusion", {"base": "base", "models": {"a": {}}}, lambda v: formulas.fusion(v["base"], v["a"])),
]  # fmt: skip


@pytest.mark.parametrize(("op", "params", "formula"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_methods_equal_their_formulas(op: str, params: dict[str, Any], formula: Any, tmp_path: Path) -> None:
    inputs, values = family(tmp_path, seed=len(op) + len(str(params)))
    made = child(inputs, op, **params)
    for name in SHAPES:
        out = made.tensors[name].read().view(SHAPES[name])
        v = wide(values, name)
        # More than two dimensions are rows with the rest flattened, for codecs and for the row rules.
        want = formula({k: x.flatten(1) if x.ndim > 2 else x for k, x in v.items()}).view(SHAPES[name])
        assert error(out, want) < 1e-6, name


@pytest.mark.parametrize("op", ["slerp", "ties", "breadcrumbs", "arcee_fusion", "karcher", "model_stock"])
def test_statistics_span_tiles(op: str, tmp_path: Path) -> None:
    inputs, values = family(tmp_path, LARGE, seed=5)
    (name,) = LARGE
    v = wide(values, name)
    params: dict[str, Any] = {"base": "base", "models": {"a": {}}}
    if op == "slerp":
        params["t"] = 0.4
        want = formulas.slerp(v["base"], v["a"], 0.4)
    elif op == "ties":
        params["models"] = {"a": {"density": 0.3}}
        want = v["base"] + formulas.trimmed(*deltas(v, "a"), 0.3)
    elif op == "breadcrumbs":
        params["models"] = {"a": {"density": 0.5, "gamma": 0.1}}
        want = v["base"] + formulas.trimmed(*deltas(v, "a"), 0.5, 0.1)
    elif op == "arcee_fusion":
        want = formulas.fusion(v["base"], v["a"])
    elif op == "karcher":
        params = {"models": {"a": {}, "b": {}}}
        want = formulas.karcher([v["a"], v["b"]], [1, 1])
    else:
        params["models"] = {"a": {}, "b": {}}
        want = formulas.model_stock(v["base"], [v["a"], v["b"]])
    ref = child(inputs, op, **params).tensors[name]
    assert len(list(ref.tiles())) > 2
    rows = [ref.pull(start, stop, ReadContext()) for start, stop in ref.tiles()]
    # Entries of Fusion that float32 puts on the other side of the border may differ; they are a handful.
    assert error(torch.cat(rows), want) < (1e-3 if op == "arcee_fusion" else 1e-6)


@pytest.mark.parametrize("topk", [0.1, 0.5])
def test_sce_selects_by_variance(topk: float, tmp_path: Path) -> None:
    inputs, values = family(tmp_path, {"model.layers.0.mlp.up_proj.weight": (61, 47)})
    made = child(inputs, "sce", base="base", models={"a": {}, "b": {}, "c": {}}, topk=topk)
    (name,) = made.tensors
    v = wide(values, name)
    assert error(made.tensors[name].read(), formulas.sce(v["base"], [v["a"], v["b"], v["c"]], topk)) < 1e-6


@pytest.mark.parametrize("rescale", ["none", "keep", "l1"])
@pytest.mark.parametrize("op", ["dare_linear", "dare_ties", "della_linear", "della"])
def test_random_methods_apply_their_noise(op: str, rescale: str, tmp_path: Path) -> None:
    """The masks from the noise by an own rule, the rest by formula."""
    inputs, values = family(tmp_path, seed=3)
    models = {"a": {"weight": 0.5, "density": 0.6}, "b": {"weight": 0.8, "density": 0.7}}
    made = child(inputs, op, base="base", models=models, seed=11, rescale=rescale, normalize="none")
    for name, shape in SHAPES.items():
        flat = {k: x.flatten(1) if x.ndim > 2 else x for k, x in wide(values, name).items()}
        kept = []
        for label, delta in zip(("a", "b"), deltas(flat, "a", "b"), strict=True):
            noise = NoiseRef(inputs["base"].tensors[name], 11, label).read().double()
            density = models[label]["density"]
            chance = torch.full_like(delta, density)
            if op.startswith("della"):
                n = delta.shape[-1]
                for row, out in zip(delta.view(-1, n), chance.view(-1, n), strict=True):
                    order = sorted(range(n), key=[float(each.abs()) for each in row].__getitem__)
                    for rank, place in enumerate(order):
                        out[place] = density - 0.15 + 0.3 * rank / max(n - 1, 1)
            thin = delta * (noise < chance)
            if rescale == "keep":
                thin = thin / chance
            elif rescale == "l1" and float(thin.abs().sum()):
                thin = thin * (delta.abs().sum() / thin.abs().sum())
            kept.append(thin)
        if op in ("dare_ties", "della"):
            want = formulas.elected(flat["base"], kept, [0.5, 0.8], divide=False)
        else:
            want = formulas.task_sum(flat["base"], kept, [0.5, 0.8])
        assert error(made.tensors[name].read().view(shape), want.view(shape)) < 1e-6, name


def test_dare_keeps_the_share_it_says_and_the_mean(tmp_path: Path) -> None:
    inputs, values = family(tmp_path, LARGE)
    (name,) = LARGE
    made = child(inputs, "dare_linear", base="base", models={"a": {"density": 0.3}})
    moved = made.tensors[name].read() - values["base"][name]
    assert float((moved != 0).float().mean()) == pytest.approx(0.3, abs=0.003)
    gap = values["a"][name] - values["base"][name]
    assert float((moved * gap).sum() / gap.square().sum()) == pytest.approx(1.0, abs=0.01)


def test_norms_bring_task_vectors_to_one_length(tmp_path: Path) -> None:
    inputs, values = family(tmp_path)
    made = child(inputs, "task_arithmetic", base="base", models={"a": 1, "b": 2}, normalize="norms")
    for name, shape in SHAPES.items():
        v = wide(values, name)
        d = deltas(v, "a", "b")
        mean = (d[0].norm() + d[1].norm()) / 2
        want = v["base"] + mean * (d[0] / d[0].norm() + 2 * d[1] / d[1].norm())
        assert error(made.tensors[name].read().view(shape), want) < 1e-6, name


@pytest.mark.parametrize("count", [1, 2, 100, 4001])
def test_selection_is_exact(count: int) -> None:
    random = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=random).abs()
    values[::3] = values[0]  # many equal ones
    ranks = sorted({0, count // 3, count // 2, count - 1})
    selector = Selector(ranks)
    for round_ in range(2):
        if round_:
            selector.next_round()
        for piece in values.split(37):
            selector.feed(piece)
    ordered = values.sort().values
    assert selector.values() == tuple(float(ordered[rank]) for rank in ranks)


@pytest.mark.parametrize("op", ALL)
def test_equal_parents_give_the_parent(op: str, tmp_path: Path) -> None:
    inputs, values = family(tmp_path)
    same = {label: open_checkpoint(tmp_path / "base", label) for label in inputs}
    child(same, op, **ALL[op]).save(tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(out[name], values["base"][name]) for name in SHAPES)


@pytest.mark.parametrize("op", ALL)
def test_bytes_do_not_depend_on_threads_or_memory(op: str, tmp_path: Path) -> None:
    inputs, _ = family(tmp_path, SHAPES | {"model.layers.3.mlp.up_proj.weight": (300, 5003)})
    made = []
    ways: list[dict[str, Any]] = [{"threads": 1}, {"threads": 3}, {"threads": 2, "memory_bytes": 1 << 28}]
    for number, options in enumerate(ways):
        child(inputs, op, **ALL[op]).save(tmp_path / f"out{number}", **options)
        made.append((tmp_path / f"out{number}" / "model.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(
    ("op", "params", "whose"),
    [
        ("linear", {"models": {"a": 1, "b": 0}}, "a"),
        ("linear", {"models": {"a": 0, "b": 0.2}}, "b"),
        ("slerp", {"base": "base", "models": {"a": {}}, "t": 0}, "base"),
        ("slerp", {"base": "base", "models": {"a": {}}, "t": 1}, "a"),
        ("nuslerp", {"models": {"a": 1, "b": 0}}, "a"),
        ("karcher", {"models": {"a": 0, "b": 2}}, "b"),
        ("task_arithmetic", {"base": "base", "models": {"a": 1}}, "a"),
        ("task_arithmetic", {"base": "base", "models": {"a": 1}, "scale": 0}, "base"),
        ("ties", {"base": "base", "models": {"a": {"weight": 0.3, "density": 1}}}, "a"),
        ("dare_linear", {"base": "base", "models": {"a": {"density": 1}}}, "a"),
        ("della", {"base": "base", "models": {"a": {"density": 1}}}, "a"),
        ("breadcrumbs", {"base": "base", "models": {"a": {"density": 1, "gamma": 0}}}, "a"),
    ],
)  # fmt: skip
def test_results_that_are_one_models_are_copied(
    op: str, params: dict[str, Any], whose: str, tmp_path: Path
) -> None:
    inputs, _ = family(tmp_path)
    made = child(inputs, op, **params)
    assert all(made.tensors[name].lineage() == {"copy": whose} for name in SHAPES)


@pytest.mark.parametrize(
    ("setting", "by_layer", "norm"),
    [
        ([0.0, 1.0], [0, 0.5, 1], 1), ({0: 1.0, 2: 0.0, "head": 0.25}, [1, 0.5, 0], 0.25),
        ({"0%": 0.2, "50%": 0.4, "100%": 0.8}, [0.2, 0.4, 0.8], 0.8),
        (
            [{"layers": "1", "value": 0.9}, {"role": "norm", "value": 0.3}, {"value": [0.0, 0.5]}],
            [0, 0.9, 0.5], 0.3,
        ),
    ],
)  # fmt: skip
def test_settings_vary_over_the_layers(
    setting: Any, by_layer: list[float], norm: float, tmp_path: Path
) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(3)} | {"model.norm.weight": (4,)}
    inputs, values = family(tmp_path, shapes)
    made = child(inputs, "task_arithmetic", base="base", models={"a": setting})
    for (name, shape), weight in zip(shapes.items(), [*by_layer, norm], strict=True):
        v = wide(values, name)
        want = v["base"] + weight * (v["a"] - v["base"])
        assert error(made.tensors[name].read().view(shape), want) < 1e-6, name


def test_stacking_renames_layers_and_copies_bytes(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(3)} | {"model.norm.weight": (4,)}
    inputs, values = family(tmp_path, shapes)
    slices = [{"model": "a", "layers": "0-1"}, {"model": "b", "layers": "1-2"}, {"model": "a", "layers": 2}]
    slices.append({"model": "b", "layers": 0})  # the last one's final norm
    made = child(inputs, "passthrough", slices=slices)
    made.save(tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    origins = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("b", 0)]
    assert len(out) == 7
    assert torch.equal(out["model.norm.weight"], values["b"]["model.norm.weight"])
    for place, (label, layer) in enumerate(origins):
        want = values[label][f"model.layers.{layer}.mlp.up_proj.weight"]
        assert torch.equal(out[f"model.layers.{place}.mlp.up_proj.weight"], want)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    with pytest.raises(RecipeError, match="layers 0 to 2"):
        child(inputs, "passthrough", slices=[{"model": "a", "layers": "0-3"}])


@pytest.mark.parametrize(
    ("op", "params", "message"),
    [
        ("linear", {"models": {"a": 1, "b": -1}}, "sum to 0"),
        ("ties", {"base": "base", "models": {"a": {"density": 1.5}}}, "density is 1.5"),
        ("dare_ties", {"base": "base", "models": {"a": {"density": 0.0}}}, "at least 5.96e-08"),
        ("dare_ties", {"base": "base", "models": {"a": {"density": 1e-46}}}, "at least 5.96e-08"),
        ("della", {"base": "base", "models": {"a": {"density": 0.95}}}, "lower epsilon"),
        ("linear", {"models": {"a": [{"role": "router", "value": 1}], "b": 1}}, "no entry of the list"),
        ("linear", {"models": {"a": 1, "b": 1}, "select": ["router"]}, "matches none"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(op: str, params: dict[str, Any], message: str, tmp_path: Path) -> None:
    inputs, _ = family(tmp_path)
    with pytest.raises(RecipeError, match=message):
        child(inputs, op, **params)
