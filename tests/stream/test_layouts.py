"""Views of fused experts, against index formulas written out and against what transformers computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import GptOssConfig, Llama4TextConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from surgery.errors import CheckpointError
from surgery.stream.layouts import View
from surgery.stream.roles import architecture_for

EXPERTS, HIDDEN, WIDTH, GROUPS = 3, 8, 6, 2
GPT_OSS = architecture_for({"model_type": "gpt_oss", "num_hidden_layers": 2})
LLAMA4 = architecture_for({"model_type": "llama4_text", "num_hidden_layers": 2})

Array = npt.NDArray[Any]


def logical(architecture: Any, stored: dict[str, Array]) -> dict[tuple[str, str], Array]:
    """(logical name without the prefix, part) -> the tensor, through split and View.of."""
    out: dict[tuple[str, str], Array] = {}
    for name, array in stored.items():
        for logical_name, part, view in architecture.split(name, array.shape):
            tensor = view.of(array[view.index])
            assert tensor.shape == view.shape(array.shape)
            out[logical_name.partition(".experts.")[2], part] = tensor
    return out


def random(*shape: int, dtype: str = "float32") -> Array:
    generator = np.random.default_rng(sum(shape))
    if dtype == "uint8":
        return generator.integers(0, 256, shape, dtype="uint8")
    return generator.standard_normal(shape, dtype="float32")


def gpt_oss_mxfp4() -> dict[str, Array]:
    prefix = "model.layers.0.mlp.experts."
    return {
        prefix + "gate_up_proj_blocks": random(EXPERTS, 2 * WIDTH, GROUPS, 16, dtype="uint8"),
        prefix + "gate_up_proj_scales": random(EXPERTS, 2 * WIDTH, GROUPS, dtype="uint8"),
        prefix + "gate_up_proj_bias": random(EXPERTS, 2 * WIDTH),
        prefix + "down_proj_blocks": random(EXPERTS, HIDDEN, GROUPS, 16, dtype="uint8"),
        prefix + "down_proj_scales": random(EXPERTS, HIDDEN, GROUPS, dtype="uint8"),
        prefix + "down_proj_bias": random(EXPERTS, HIDDEN),
    }


def gpt_oss_plain() -> dict[str, Array]:
    prefix = "model.layers.0.mlp.experts."
    return {
        prefix + "gate_up_proj": random(EXPERTS, HIDDEN, 2 * WIDTH),
        prefix + "gate_up_proj_bias": random(EXPERTS, 2 * WIDTH),
        prefix + "down_proj": random(EXPERTS, WIDTH, HIDDEN),
        prefix + "down_proj_bias": random(EXPERTS, HIDDEN),
    }


def llama4() -> dict[str, Array]:
    prefix = "language_model.model.layers.1.feed_forward.experts."
    return {
        prefix + "gate_up_proj": random(EXPERTS, HIDDEN, 2 * WIDTH),
        prefix + "down_proj": random(EXPERTS, WIDTH, HIDDEN),
    }


def test_gpt_oss_mxfp4_by_index() -> None:
    stored = gpt_oss_mxfp4()
    blocks, scales, bias, down_blocks, down_scales, down_bias = stored.values()
    tensors = logical(GPT_OSS, stored)
    assert len(tensors) == EXPERTS * 9
    for e in range(EXPERTS):
        for row in range(WIDTH):
            for odd, projection in enumerate(("gate_proj", "up_proj")):
                weight = f"{e}.{projection}.weight"
                assert np.array_equal(tensors[weight, "blocks"][row], blocks[e, 2 * row + odd])
                assert np.array_equal(tensors[weight, "scales"][row], scales[e, 2 * row + odd])
                assert tensors[f"{e}.{projection}.bias", "bias"][row] == bias[e, 2 * row + odd]
        assert np.array_equal(tensors[f"{e}.down_proj.weight", "blocks"], down_blocks[e])
        assert np.array_equal(tensors[f"{e}.down_proj.weight", "scales"], down_scales[e])
        assert np.array_equal(tensors[f"{e}.down_proj.bias", "bias"], down_bias[e])


def test_gpt_oss_plain_by_index() -> None:
    stored = gpt_oss_plain()
    gate_up, _, down, _ = stored.values()
    tensors = logical(GPT_OSS, stored)
    assert len(tensors) == EXPERTS * 6
    for e in range(EXPERTS):
        for out in range(WIDTH):
            for i in range(HIDDEN):
                assert tensors[f"{e}.gate_proj.weight", "weight"][out, i] == gate_up[e, i, 2 * out]
                assert tensors[f"{e}.up_proj.weight", "weight"][out, i] == gate_up[e, i, 2 * out + 1]
                assert tensors[f"{e}.down_proj.weight", "weight"][i, out] == down[e, out, i]


def test_llama4_by_index() -> None:
    stored = llama4()
    gate_up, down = stored.values()
    tensors = logical(LLAMA4, stored)
    assert len(tensors) == EXPERTS * 3
    for e in range(EXPERTS):
        for out in range(WIDTH):
            for i in range(HIDDEN):
                assert tensors[f"{e}.gate_proj.weight", "weight"][out, i] == gate_up[e, i, out]
                assert tensors[f"{e}.up_proj.weight", "weight"][out, i] == gate_up[e, i, WIDTH + out]
                assert tensors[f"{e}.down_proj.weight", "weight"][i, out] == down[e, out, i]


def test_names_come_expert_by_expert() -> None:
    (name, array), *_ = llama4().items()
    views = LLAMA4.split(name, array.shape)
    assert views is not None
    prefix = "language_model.model.layers.1.feed_forward.experts"
    assert [logical_name for logical_name, _, _ in views] == [
        f"{prefix}.{e}.{p}.weight" for e in range(EXPERTS) for p in ("gate_proj", "up_proj")
    ]
    assert LLAMA4.info(views[-1][0]).expert == EXPERTS - 1
    assert LLAMA4.split("language_model.model.layers.1.feed_forward.router.weight", (4, 8)) is None


def test_gpt_oss_views_compute_what_transformers_computes() -> None:
    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS)
    experts = GptOssExperts(config)
    stored = gpt_oss_plain()
    for name, parameter in experts.named_parameters():
        parameter.data = torch.from_numpy(stored[f"model.layers.0.mlp.experts.{name}"])
    tensors = {name: torch.from_numpy(array.copy()) for (name, _), array in logical(GPT_OSS, stored).items()}
    x = torch.from_numpy(random(5, HIDDEN))
    for e in range(EXPERTS):
        gate, up = (
            x @ tensors[f"{e}.{p}.weight"].T + tensors[f"{e}.{p}.bias"] for p in ("gate_proj", "up_proj")
        )
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        ours = hidden @ tensors[f"{e}.down_proj.weight"].T + tensors[f"{e}.down_proj.bias"]
        with torch.no_grad():
            theirs = experts(x, torch.full((5, 1), e), torch.ones(5, 1))
        torch.testing.assert_close(ours, theirs)


def test_llama4_views_compute_what_transformers_computes() -> None:
    config = Llama4TextConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS)
    experts = Llama4TextExperts(config)
    stored = llama4()
    for name, parameter in experts.named_parameters():
        parameter.data = torch.from_numpy(
            stored[f"language_model.model.layers.1.feed_forward.experts.{name}"]
        )
    tensors = {name: torch.from_numpy(array.copy()) for (name, _), array in logical(LLAMA4, stored).items()}
    x = torch.from_numpy(random(EXPERTS, 5, HIDDEN))
    with torch.no_grad():
        theirs = experts(x.reshape(-1, HIDDEN)).reshape(EXPERTS, 5, HIDDEN)
    for e in range(EXPERTS):
        gate, up = (x[e] @ tensors[f"{e}.{p}.weight"].T for p in ("gate_proj", "up_proj"))
        ours = (torch.nn.functional.silu(gate) * up) @ tensors[f"{e}.down_proj.weight"].T
        torch.testing.assert_close(ours, theirs[e])


def test_both_gpt_oss_forms_hold_the_same_experts() -> None:
    packed = gpt_oss_mxfp4()
    prefix = "model.layers.0.mlp.experts."
    plain: dict[str, Array] = {}
    for projection in ("gate_up_proj", "down_proj"):
        blocks = torch.from_numpy(packed[f"{prefix}{projection}_blocks"])
        scales = torch.from_numpy(packed[f"{prefix}{projection}_scales"]) // 16 + 120
        packed[f"{prefix}{projection}_scales"] = scales.numpy()
        plain[prefix + projection] = convert_moe_packed_tensors(blocks, scales).float().numpy()
    parts, whole = logical(GPT_OSS, packed), logical(GPT_OSS, plain)
    for (name, _), weight in whole.items():
        blocks, scales = (torch.from_numpy(parts[name, key].copy())[None] for key in ("blocks", "scales"))
        decoded = convert_moe_packed_tensors(blocks, scales).float()[0].T  # [1, in, out] -> [out, in]
        assert np.array_equal(decoded.numpy(), weight), name


@pytest.mark.parametrize(
    "stored", [gpt_oss_mxfp4(), gpt_oss_plain(), llama4()], ids=["mxfp4", "plain", "llama4"]
)
def test_writing_through_the_views_rebuilds_the_stored_tensors(stored: dict[str, Array]) -> None:
    architecture = LLAMA4 if any("feed_forward" in name for name in stored) else GPT_OSS
    for name, array in stored.items():
        rebuilt, times_written = np.zeros_like(array), np.zeros(array.shape, int)
        for _, _, view in architecture.split(name, array.shape) or []:
            view.of(rebuilt[view.index])[...] = view.of(array[view.index])
            view.of(times_written[view.index])[...] += 1
        assert np.array_equal(rebuilt, array)
        assert (times_written == 1).all()


VIEWS = [
    (View(1, 0, None, 1, False), True),
    (View(2, 0, 2, 1, False), True),
    (View(2, 2, None, 1, False), True),
    (View(0, 0, None, 2, False), False),
    (View(0, 1, None, 2, False), False),
    (View(0, 0, None, 1, True), False),
    (View(0, 0, 2, 1, True), False),
]


@pytest.mark.parametrize(("view", "contiguous"), VIEWS)
def test_span_is_where_the_bytes_are(view: View, contiguous: bool) -> None:
    stored = random(3, 4, 5)
    assert view.contiguous(stored.shape) is contiguous
    if not contiguous:
        with pytest.raises(ValueError, match="not one byte range"):
            view.span(stored.shape, 4)
        return
    begin, end = view.span(stored.shape, 4)
    assert stored.tobytes()[begin:end] == view.of(stored[view.index]).tobytes()


def test_one_row_of_two_is_contiguous() -> None:
    stored = random(3, 2, 5)
    begin, end = View(1, 1, None, 2, False).span(stored.shape, 4)
    assert stored.tobytes()[begin:end] == stored[1, 1].tobytes()


def test_a_bias_is_a_view_of_one_dimension() -> None:
    stored = random(3, 4)
    view = View(2, 2, None, 1, False)
    assert view.shape(stored.shape) == (2,)
    begin, end = view.span(stored.shape, 4)
    assert stored.tobytes()[begin:end] == stored[2, 2:].tobytes()


@pytest.mark.parametrize("shape", [(), (4,), (4, 8), (4, 8, 7), (4, 8, 6, 2), (10**6, 0, 6)])
def test_shapes_that_cannot_be_split_are_named(shape: tuple[int, ...]) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(CheckpointError, match=r"gate_up_proj.*expected \[experts, in, out\]") as raised:
        GPT_OSS.split(name, shape)
    assert str(list(shape)) in raised.value.message
    assert raised.value.hint
