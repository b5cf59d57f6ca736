"""The naming rules against models that transformers itself builds and saves under the published names.

What is expected comes from the config given to transformers, and from the classes of its modules; never from
the tables under test.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from safetensors import safe_open
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

import surgery.stream
from surgery.stream.roles import Architecture, Role, TensorInfo, architecture_for

LAYERS = 4
HIDDEN = 32
EXPERTS = 5
WIDTH = 16  # of an expert; a dense MLP has 48

BASE = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
HEADS_OF_8 = {"head_dim": 8}
DEEPSEEK_MOE = {
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT_ATTENTION = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
DEEPSEEK = DEEPSEEK_MOE | LATENT_ATTENTION | HEADS_OF_8
QWEN_MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
MIXTRAL_MOE = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": WIDTH}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS + 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
LLAMA4_VISION = {
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "pixel_shuffle_ratio": 0.5,
}


@dataclass(frozen=True)
class Case:
    """A config for transformers, and what follows from it: layers with experts, tensors in each layer."""

    model_type: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    moe_layers: tuple[int, ...] = ()
    routers: int = 1
    shared: int = 0
    per_expert: int = 3
    per_dense: int = 3
    norms: int = 2


AFTER_FIRST = (1, 2, 3)
ALL = (0, 1, 2, 3)
CASES = [
    Case("deepseek_v2", "deepseek", DEEPSEEK, AFTER_FIRST, shared=3),
    Case("deepseek_v3", "deepseek", DEEPSEEK, AFTER_FIRST, routers=2, shared=3),
    Case("deepseek_v32", "deepseek", DEEPSEEK, AFTER_FIRST, routers=2, shared=3),
    Case("dots1", "deepseek", DEEPSEEK_MOE, AFTER_FIRST, routers=2, shared=3),
    Case("glm4_moe", "glm4_moe", DEEPSEEK_MOE | {"use_qk_norm": True}, AFTER_FIRST, routers=2, shared=3),
    Case("glm4_moe_lite", "glm4_moe", DEEPSEEK, AFTER_FIRST, routers=2, shared=3),
    Case(
        "qwen2_moe",
        "qwen_moe",
        QWEN_MOE | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [2]},
        (0, 1, 3),
        shared=4,
    ),
    Case("qwen3_moe", "qwen_moe", QWEN_MOE | HEADS_OF_8 | {"decoder_sparse_step": 2}, (1, 3)),
    Case("olmoe", "qwen_moe", QWEN_MOE | {"intermediate_size": WIDTH}, ALL),
    Case("mixtral", "mixtral", MIXTRAL_MOE, ALL),
    Case("gpt_oss", "gpt_oss", MIXTRAL_MOE | HEADS_OF_8, ALL, routers=2, per_expert=6),
    Case(
        "llama4_text",
        "llama4",
        MIXTRAL_MOE | HEADS_OF_8 | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
        (1, 3),
        shared=3,
    ),
    Case("llama", "llama"),
    Case("mistral", "llama"),
    Case("qwen2", "llama"),
    Case("qwen3", "llama", HEADS_OF_8),
    Case("gemma2", "llama", HEADS_OF_8, norms=4),
    Case("gemma3_text", "llama", HEADS_OF_8, norms=4),
    Case("phi3", "llama", per_dense=2),
]
# Vision and language in one checkpoint: model class -> the text model's case.
MULTIMODAL = {
    "llama4": ("Llama4ForConditionalGeneration", "llama4_text", VISION | LLAMA4_VISION, {}),
    "gemma3": ("Gemma3ForConditionalGeneration", "gemma3_text", VISION, {"mm_tokens_per_image": 4}),
}
BY_TYPE = {case.model_type: case for case in CASES}


@dataclass(frozen=True)
class Published:
    """A saved model: its config.json, its stored tensors, and the logical ones that our rules make of it."""

    config: dict[str, Any]
    architecture: Architecture
    stored: dict[str, tuple[int, ...]]
    logical: dict[str, tuple[int, ...]]
    infos: dict[str, TensorInfo]
    model: Any

    def names(self, role: str) -> list[str]:
        return [name for name, info in self.infos.items() if info.role == role]


def read_published(folder: Path, model: Any) -> Published:
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    stored: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            stored |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    architecture = architecture_for(config)
    logical: dict[str, tuple[int, ...]] = {}
    for name, shape in stored.items():
        views = architecture.split(name, shape)
        logical |= {name: shape} if views is None else {n: view.shape(shape) for n, _, view in views}
    infos = {name: architecture.info(name) for name in logical}
    return Published(config, architecture, stored, logical, infos, model)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Published]]:
    """Builds, saves and reads back the tiny model of a model_type, once."""
    transformers.utils.logging.disable_progress_bar()
    built: dict[str, Published] = {}

    def of(model_type: str) -> Published:
        if model_type not in built:
            if model_type in MULTIMODAL:
                class_name, text_type, vision, extra = MULTIMODAL[model_type]
                model_class = getattr(transformers, class_name)
                text = BASE | BY_TYPE[text_type].config
                model = model_class(model_class.config_class(text_config=text, vision_config=vision, **extra))
            else:
                config = BASE | BY_TYPE[model_type].config
                model = transformers.AutoModelForCausalLM.from_config(
                    transformers.AutoConfig.for_model(model_type, **config)
                )
            built[model_type] = read_published(tmp_path_factory.mktemp(model_type), model)
        return built[model_type]

    yield of
    transformers.utils.logging.enable_progress_bar()


def check_language_model(case: Case, found: Published) -> None:
    """Counts and layers of every role, from the case alone."""
    counts = Counter(info.role for info in found.infos.values())
    moe, dense = len(case.moe_layers), LAYERS - len(case.moe_layers)
    assert counts["routed_expert"] == moe * EXPERTS * case.per_expert
    assert counts["router"] == moe * case.routers
    assert counts["shared_expert"] == moe * case.shared
    assert counts["dense_mlp"] == dense * case.per_dense
    assert counts["norm"] == LAYERS * case.norms + 1
    assert counts["embedding"] == 1
    text = found.config.get("text_config", found.config)
    assert counts["head"] == (0 if text.get("tie_word_embeddings", False) else 1)

    for role, layers in (("routed_expert", case.moe_layers), ("router", case.moe_layers), ("attention", ALL)):
        assert {found.infos[name].layer for name in found.names(role)} == set(layers), role
    for role in ("embedding", "head"):
        assert {found.infos[name].layer for name in found.names(role)} <= {None}
    per_expert = Counter((i.layer, i.expert) for i in found.infos.values() if i.role == "routed_expert")
    assert per_expert == {(layer, n): case.per_expert for layer in case.moe_layers for n in range(EXPERTS)}
    assert not any(info.mtp for info in found.infos.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_type)
def test_counts_and_layers_follow_from_the_config(case: Case, published: Callable[[str], Published]) -> None:
    found = published(case.model_type)
    assert (found.architecture.name, found.architecture.known) == (case.family, True)
    assert found.names("other") == []
    check_language_model(case, found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_type)
def test_roles_agree_with_the_classes_of_the_modules(
    case: Case, published: Callable[[str], Published]
) -> None:
    found = published(case.model_type)
    attention, norms, embedding = set[str](), set[str](), set[str]()
    for module_name, module in found.model.named_modules():
        names = {f"{module_name}.{name}" for name in module.state_dict()}
        if "Attention" in type(module).__name__:
            attention |= names
        elif type(module).__name__.endswith("Norm"):
            norms |= names
        elif type(module).__name__.endswith("Embedding"):
            embedding |= names
    embedding &= found.stored.keys()
    head = {"lm_head.weight"} & found.stored.keys()
    assert found.model.get_output_embeddings() is found.model.lm_head

    assert set(found.names("attention")) == attention
    assert set(found.names("norm")) == norms - attention
    assert set(found.names("embedding")) == embedding
    assert set(found.names("head")) == head


@pytest.mark.parametrize("case", [c for c in CASES if c.moe_layers], ids=lambda case: case.model_type)
def test_experts_have_the_shapes_of_the_config(case: Case, published: Callable[[str], Published]) -> None:
    found = published(case.model_type)
    shapes = Counter(found.logical[n] for n in found.names("routed_expert") if n.endswith(".weight"))
    each = len(case.moe_layers) * EXPERTS
    assert shapes == {(WIDTH, HIDDEN): 2 * each, (HIDDEN, WIDTH): each}
    down = [n for n in found.names("routed_expert") if found.logical[n] == (HIDDEN, WIDTH)]
    assert all(re.search(r"\.experts\.\d+\.(down_proj|w2)\.weight$", name) for name in down)
    weights = {n for n in found.names("router") if n.endswith(".weight")}
    assert {found.logical[name] for name in weights} == {(EXPERTS, HIDDEN)}
    assert {found.logical[name] for name in set(found.names("router")) - weights} <= {(EXPERTS,)}
    assert sum(map(prod, found.logical.values())) == sum(map(prod, found.stored.values()))


@pytest.mark.parametrize("case", [c for c in CASES if c.moe_layers], ids=lambda case: case.model_type)
def test_routed_experts_agree_with_the_conversion_mapping(
    case: Case, published: Callable[[str], Published]
) -> None:
    found = published(case.model_type)
    converters = get_checkpoint_conversion_mapping(case.model_type) or []
    sources = [
        source
        for converter in converters
        if isinstance(converter, WeightConverter) and any("experts" in t for t in converter.target_patterns)
        for source in converter._original_source_patterns
    ]
    if not sources:
        assert found.architecture.fused, "published as transformers holds it: fused"
        return
    pattern = "|".join(re.escape(source).replace(r"\*", r"\d+") for source in sources)
    assert {name for name in found.stored if re.search(pattern, name)} == set(found.names("routed_expert"))


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_towers_and_projectors_are_other(model_type: str, published: Callable[[str], Published]) -> None:
    found = published(model_type)
    check_language_model(BY_TYPE[MULTIMODAL[model_type][1]], found)
    language = {name for name in found.infos if name.startswith("language_model.")}
    assert {found.infos[name] for name in found.infos.keys() - language} == {
        TensorInfo("other", None, None, False)
    }
    assert not {name for name in language if found.infos[name].role == "other"}
    assert any("self_attn" in name for name in found.names("other"))


def test_every_claim_and_every_rule_is_backed_by_a_model(published: Callable[[str], Published]) -> None:
    folder = Path(surgery.stream.__file__).parent / "architectures"
    documents = [yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")]
    claimed = [model_type for document in documents for model_type in document["model_types"]]
    no_class = {"kimi_k2"}
    assert sorted(claimed) == sorted({*BY_TYPE, *MULTIMODAL, *no_class})
    assert all(config in transformers.CONFIG_MAPPING for config in set(claimed) - no_class)

    rules = {start for document in documents for rule in document.get("roles", []) for start in rule.values()}
    names = [name for model_type in [*BY_TYPE, *MULTIMODAL] for name in published(model_type).logical]
    names += [name for name, _ in MTP_LAYER]
    inner = {re.sub(r"\.\d+", ".N", re.sub(r"^(language_model\.)?(model\.)?", "", name)) for name in names}
    assert {rule for rule in rules if not any(name.startswith(rule) for name in inner)} == set()


MTP_LAYER: list[tuple[str, Role]] = [
    ("model.layers.61.embed_tokens.weight", "embedding"),
    ("model.layers.61.enorm.weight", "norm"),
    ("model.layers.61.hnorm.weight", "norm"),
    ("model.layers.61.eh_proj.weight", "other"),
    ("model.layers.61.shared_head.norm.weight", "norm"),
    ("model.layers.61.shared_head.head.weight", "head"),
    ("model.layers.61.input_layernorm.weight", "norm"),
    ("model.layers.61.self_attn.q_a_layernorm.weight", "attention"),
    ("model.layers.61.mlp.gate.weight", "router"),
    ("model.layers.61.mlp.gate.e_score_correction_bias", "router"),
    ("model.layers.61.mlp.experts.255.up_proj.weight", "routed_expert"),
    ("model.layers.61.mlp.shared_experts.down_proj.weight", "shared_expert"),
]


@pytest.mark.parametrize(("model_type", "layers"), [("deepseek_v3", 61), ("glm4_moe", 46)])
def test_mtp_layer_has_the_roles_it_would_have_elsewhere(model_type: str, layers: int) -> None:
    architecture = architecture_for({"model_type": model_type, "num_hidden_layers": layers})
    for name, role in MTP_LAYER:
        expert = 255 if role == "routed_expert" else None
        assert architecture.info(name.replace("61", str(layers))) == TensorInfo(role, layers, expert, True)
        last = name.replace("61", str(layers - 1))
        assert architecture.info(last) == TensorInfo(role, layers - 1, expert, False)
    assert architecture.info("lm_head.weight") == TensorInfo("head", None, None, False)


def test_layers_under_mtp_are_numbered_after_the_decoder() -> None:
    name = "mtp.layers.1.mlp.experts.3.up_proj.weight"
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 48}
    assert architecture_for(config).info(name) == TensorInfo("routed_expert", 49, 3, True)
    assert architecture_for(config).info("mtp.norm.weight") == TensorInfo("norm", None, None, True)
    uncounted = architecture_for({"model_type": "qwen3_moe"})
    assert uncounted.info(name) == TensorInfo("routed_expert", None, 3, True)


def test_kimi_k2_goes_by_deepseeks_names() -> None:
    architecture = architecture_for({"model_type": "kimi_k2", "num_hidden_layers": 61})
    expected = {
        "model.embed_tokens.weight": TensorInfo("embedding", None, None, False),
        "model.layers.0.mlp.gate_proj.weight": TensorInfo("dense_mlp", 0, None, False),
        "model.layers.60.mlp.experts.383.down_proj.weight": TensorInfo("routed_expert", 60, 383, False),
        "model.layers.60.mlp.gate.e_score_correction_bias": TensorInfo("router", 60, None, False),
        "model.layers.60.self_attn.kv_a_proj_with_mqa.weight": TensorInfo("attention", 60, None, False),
        "model.norm.weight": TensorInfo("norm", None, None, False),
    }
    assert {name: architecture.info(name) for name in expected} == expected


def test_a_wrapper_of_a_known_text_model_goes_by_text_config() -> None:
    config = {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2", "num_hidden_layers": 61}}
    architecture = architecture_for(config)
    assert (architecture.name, architecture.known) == ("deepseek", True)
    name = "model.layers.60.mlp.experts.7.up_proj.weight"
    for wrapped in (name, f"language_model.{name}", name.replace("model.", "model.language_model.", 1)):
        assert architecture.info(wrapped) == TensorInfo("routed_expert", 60, 7, False)
    tower = "vision_tower.encoder.blocks.3.mlp.fc0.weight"
    assert architecture.info(tower) == TensorInfo("other", None, None, False)


@pytest.mark.parametrize("config", [{}, {"model_type": "brand_new"}, {"model_type": None, "text_config": 3}])
def test_an_unknown_architecture_still_has_layers(config: dict[str, Any]) -> None:
    architecture = architecture_for(config)
    assert (architecture.name, architecture.known) == ("unknown", False)
    assert architecture.info("model.layers.7.mlp.up.weight") == TensorInfo("other", 7, None, False)
    assert architecture.info("lm_head.weight") == TensorInfo("other", None, None, False)
    assert architecture.split("model.layers.0.mlp.experts.gate_up_proj", (4, 8, 8)) is None


@pytest.mark.parametrize("segment", ["", "N", "9" * 5000, "\N{SUPERSCRIPT TWO}", "-1", "1e3"])
def test_segments_that_are_no_index_give_none(segment: str) -> None:
    architecture = architecture_for({"model_type": "deepseek_v3", "num_hidden_layers": 2})
    info = architecture.info(f"model.layers.{segment}.mlp.experts.{segment}.up_proj.weight")
    assert (info.layer, info.expert, info.mtp) == (None, None, False)
    assert architecture.info(f"model.layers.1.mlp.experts.{segment}.up_proj.weight").layer == 1


@pytest.mark.parametrize("name", ["", ".", "model", "model.layers", "layers.3", "mtp", "experts.1"])
def test_truncated_names_are_other(name: str) -> None:
    info = architecture_for({"model_type": "deepseek_v3", "num_hidden_layers": 2}).info(name)
    assert info == TensorInfo("other", None, None, name == "mtp")
