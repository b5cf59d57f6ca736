"""What goes into a layer's matrices: the sums of a walk against hooks on transformers' whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from walk_models import Families, distance, sequences, settings, whole

import surgery
from surgery.calibrate.batches import Batch, make_batches
from surgery.calibrate.inputs import InputSums, LayerInputs
from surgery.calibrate.walk import Walk
from surgery.errors import CheckpointError

LENGTHS = (31, 17, 40, 9)


class Taking:
    """A step that takes the inputs of some modules and of all experts in every layer."""

    def __init__(self, modules: dict[int, list[str]], experts: int, gram: bool = True) -> None:
        self.modules, self.experts, self.gram = modules, experts, gram
        self.found: dict[int, LayerInputs] = {}

    def outline(self, checkpoint: Any) -> Any:
        return checkpoint

    def observe(self, layer: int, *, has_experts: bool) -> Any:
        wanted = range(self.experts) if has_experts else ()
        self.found[layer] = LayerInputs(layer, self.modules[layer], wanted, gram=self.gram)
        return self.found[layer]

    def finish(self, layer: int, refs: Any, replay: Any) -> None:
        return None

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None:
        raise AssertionError("nothing to restore")


def linears(model: Any, layer: int) -> list[str]:
    return [
        name
        for name, module in model.model.layers[layer].named_modules()
        if isinstance(module, torch.nn.Linear)
    ]


def reference(model: Any, batches: tuple[Batch, ...], layer: int, path: str) -> torch.Tensor:
    """Σ x xᵀ in float64, without padding."""
    total: Any = 0.0

    def take(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal total
        rows = args[0].flatten(0, -2)
        kept = rows[valid] if valid is not None else rows
        total = total + kept.double().t() @ kept.double()

    handle = model.model.layers[layer].get_submodule(path).register_forward_pre_hook(take)
    with torch.no_grad():
        for batch in batches:
            valid = batch.valid(torch.device("cpu"))
            model(input_ids=batch.ids, use_cache=False)
    handle.remove()
    return total


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen2_moe"])
def test_modules_see_what_the_whole_model_gives_them(tiny: Families, family: str) -> None:
    checkpoint = surgery.open(tiny(family))
    model = whole(checkpoint)
    count = len(model.model.layers)
    step = Taking({layer: linears(model, layer) for layer in range(count)}, 8)
    batches = make_batches(sequences(LENGTHS), 64)
    Walk(checkpoint, batches, [step], settings()).run()
    for layer in range(count):
        for path in step.modules[layer]:
            _, sums = step.found[layer].of_module(path)
            assert sums is not None and sums.tokens == sum(LENGTHS)
            wanted = reference(model, batches, layer, path)
            assert distance(sums.gram, wanted) < 1e-5
            assert distance(sums.squares, wanted.diagonal()) < 1e-5


def test_modules_that_share_their_input_share_the_sums(tiny: Families) -> None:
    checkpoint = surgery.open(tiny("llama"))
    step = Taking({layer: linears(whole(checkpoint), layer) for layer in range(2)}, 0)
    Walk(checkpoint, make_batches(sequences(LENGTHS), 64), [step], settings()).run()
    leaders = {path: step.found[1].of_module(path)[0] for path in step.modules[1]}
    assert leaders == {
        "self_attn.q_proj": "self_attn.q_proj", "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj", "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj", "mlp.up_proj": "mlp.gate_proj", "mlp.down_proj": "mlp.down_proj",
    }  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_see_the_tokens_routed_to_them(tiny: Families, family: str) -> None:
    """Against each expert's own tokens, told from the router's choice in transformers' eager loop."""
    checkpoint = surgery.open(tiny(family))
    model = whole(checkpoint)
    count = len(model.model.layers)
    step = Taking({layer: [] for layer in range(count)}, 8)
    batches = make_batches(sequences((32, 32)), 64)
    Walk(checkpoint, batches, [step], settings()).run()
    layer = count - 1
    block = next(m for m in model.model.layers[layer].modules() if hasattr(m, "experts"))
    seen: dict[str, Any] = {}

    def take(module: Any, args: tuple[Any, ...]) -> None:
        seen["hidden"], seen["index"] = args[0].flatten(0, -2), args[1]

    handle = block.experts.register_forward_pre_hook(take)
    with torch.no_grad():
        model(input_ids=batches[0].ids, use_cache=False)
    handle.remove()
    chosen = 0
    for expert in range(block.experts.num_experts):
        rows = seen["hidden"][(seen["index"] == expert).any(-1)]
        sums = step.found[layer].of_expert(expert, "in")
        if not len(rows):
            assert sums is None
            continue
        chosen += 1
        assert sums is not None and sums.tokens == len(rows)
        assert distance(sums.gram, rows.double().t() @ rows.double()) < 1e-5
        assert distance(sums.magnitudes, rows.double().abs().sum(0)) < 1e-5
        inner = block.experts._apply_gate(rows @ block.experts.gate_up_proj[expert].t()).detach()
        found = step.found[layer].of_expert(expert, "inner")
        assert found is not None and distance(found.gram, inner.double().t() @ inner.double()) < 1e-5
    assert chosen > 2


def test_sums_do_not_depend_on_pieces_and_need_no_gram() -> None:
    rows = torch.randn(9000, 24)
    whole_sums, parts = (InputSums.zeros(24, torch.device("cpu"), gram=gram) for gram in (True, False))
    whole_sums.add(rows)
    for piece in rows.split(1000):
        parts.add(piece)
    assert parts.gram is None and whole_sums.tokens == parts.tokens == 9000
    assert distance(whole_sums.gram, rows.double().t() @ rows.double()) < 1e-5
    assert distance(parts.squares, rows.double().square().sum(0)) < 1e-5
    assert distance(parts.magnitudes, rows.double().abs().sum(0)) < 1e-5


def test_a_module_that_is_not_there_is_named(tiny: Families) -> None:
    step = Taking({layer: ["self_attn.nothing"] for layer in range(2)}, 0)
    walk = Walk(surgery.open(tiny("llama")), make_batches(sequences((8,)), 64), [step], settings())
    with pytest.raises(CheckpointError, match=r"layer 0 .*self_attn\.nothing"):
        walk.run()
