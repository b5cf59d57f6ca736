"""Where scales of inputs go: what makes the input of each matrix of a decoder layer, by name.

A norm that multiplies by its weight, or the rows of the matrix before:

    input_layernorm            q, k, v; or q_a, kv_a of DeepSeek's attention
    q_a_layernorm              q_b
    kv_a_layernorm             kv_b
    post_attention_layernorm   gate, up of a dense MLP
    v                          o, where heads are not shared (no grouped queries)
    kv_b, the rows of values   o of DeepSeek's attention
    up                         down, also in each expert

A norm in front of experts feeds the router and all of them: scaling it for one would change the others, so
what reads it is not scaled. A fold holds only where all that reads its input is quantized alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.codecs.plain import Plain
from surgery.operators.layerwise.problem import Work
from surgery.stream.checkpoint import TensorRef
from surgery.stream.roles import ExpertRules

if TYPE_CHECKING:
    import torch

READERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj",
        "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa",
        "self_attn.indexer.wk", "self_attn.indexer.weights_proj",
    ),
    "self_attn.q_a_layernorm": ("self_attn.q_b_proj", "self_attn.indexer.wq_b"),
    "self_attn.kv_a_layernorm": ("self_attn.kv_b_proj",),
    "post_attention_layernorm": (
        "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "feed_forward.gate_proj", "feed_forward.up_proj",
    ),
}  # fmt: skip
"""Norms of a layer, and all that may read what they give."""
BEFORE: Mapping[str, str] = {"o_proj": "v_proj", "down_proj": "up_proj"}
"""Matrices of a block whose input is linear in the output of another, by the last part of their names."""
LATENT = "kv_b_proj"
"""What gives keys and values, head by head, of attention over a latent vector (MLA)."""
MULTIPLYING = frozenset({
    "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "olmoe",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "dots1", "glm4_moe", "glm4_moe_lite",
    "llama4", "llama4_text",
})  # fmt: skip
"""Values of model_type whose layers are as the tables say."""
OFFSET = frozenset({"gemma2", "gemma3", "gemma3_text"})
"""Those whose norms multiply by 1 + weight and stand elsewhere; the rest is as the tables say."""

ROUTED = "its norm feeds the router and all experts"
GROUPED = "its heads share values"
FUSED = "what makes its input is no matrix of its own"
BY_DESIGN = frozenset({ROUTED, GROUPED, FUSED})
"""Reasons that lie in the architecture: the method has nothing for these matrices."""
UNKNOWN = "what makes its input is not known"
OFFSET_NORM = "its norm multiplies by 1 + weight"
PARTLY = "not all that reads its input is quantized alike"
KEPT = "what makes its input is not quantized"
FORM = "its norm has another form than a weight in a plain dtype"
CLAMPED = "values are clamped"
APART = "its input is not shared as the names say"
"""What a walk finds where modules that should read one tensor read several."""

_IN_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(.+)$")


@dataclass(frozen=True)
class Fold:
    """Tensors by name: the matrices that read an input, and what 1/scale of it goes into, a norm's weight or
    the rows of a matrix, which may have a bias. `heads`: rows of a head of that matrix, and how many of them,
    the last ones, are meant; None where all are."""

    readers: frozenset[str]
    norm: str | None = None
    rows: str | None = None
    bias: str | None = None
    heads: tuple[int, int] | None = None

    def spread(self, scales: torch.Tensor, rows: int) -> torch.Tensor:
        """What each of the matrix's rows is multiplied by, for scales of what its rows give."""
        if self.heads is None:
            return 1 / scales
        every, values = self.heads
        found = scales.new_ones(rows // every, every)
        found[:, every - values :] = 1 / scales.view(-1, values)
        return found.flatten()


@dataclass
class LayerFolds:
    """The fold of each matrix that has one, and why the others have none."""

    folds: dict[str, Fold] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def beside(self) -> frozenset[str]:
        """The tensors that may change without being quantized."""
        found = {name for fold in self.folds.values() for name in (fold.norm, fold.bias)}
        return frozenset(name for name in found if name is not None)


def layer_folds(
    refs: Sequence[TensorRef],
    works: Mapping[str, Work],
    config: Mapping[str, Any],
    experts: ExpertRules | None,
) -> LayerFolds:
    """The folds of a layer with these tensors, of which those in `works` (by name) are quantized. `config`
    is that of the language model."""
    layer = _Layer(refs, works, config, experts)
    found = LayerFolds()
    for path, ref in layer.weights.items():
        if ref.name in works:
            fold = layer.fold(path, ref)
            if isinstance(fold, Fold):
                found.folds[ref.name] = fold
            else:
                found.reasons[ref.name] = fold
    return found


class _Layer:
    """The tensors of a layer by their paths in it."""

    def __init__(
        self,
        refs: Sequence[TensorRef],
        works: Mapping[str, Work],
        config: Mapping[str, Any],
        experts: ExpertRules | None,
    ) -> None:
        self.works = works
        self.config = config
        self.kind = str(config.get("model_type"))
        self.clamped = config.get("clip_qkv") is not None
        self.before = dict(BEFORE)
        if experts is not None:
            self.before[experts.projections[2]] = experts.projections[1]
        self.tensors = {found[1]: ref for ref in refs if (found := _IN_LAYER.search(ref.name))}
        self.weights = {
            path.removesuffix(".weight"): ref
            for path, ref in self.tensors.items()
            if path.endswith(".weight") and len(ref.shape) == 2
        }
        self.routed = any(ref.info.role == "router" for ref in refs)

    def fold(self, path: str, ref: TensorRef) -> Fold | str:
        """The fold of a matrix, or why it has none."""
        if self.kind not in MULTIPLYING | OFFSET:
            return UNKNOWN
        for norm, readers in READERS.items():
            if path in readers:
                return self._norm_fold(norm, readers, ref)
        block, _, last = path.rpartition(".")
        if last == "o_proj" and f"{block}.{LATENT}" in self.weights:
            return self._latent_fold(self.weights[f"{block}.{LATENT}"], ref)
        if last in self.before:
            return self._row_fold(f"{block}.{self.before[last]}", ref)
        return ROUTED if ref.info.role in ("routed_expert", "shared_expert") else UNKNOWN

    def _norm_fold(self, norm: str, paths: Sequence[str], ref: TensorRef) -> Fold | str:
        if self.kind in OFFSET:
            return OFFSET_NORM
        if norm == "post_attention_layernorm" and self.routed:
            return ROUTED
        if any(not self._is_known(path) for path in self.weights):
            return UNKNOWN
        readers = [self.weights[path].name for path in paths if path in self.weights]
        if len({self.works.get(name) for name in readers}) > 1:
            return PARTLY
        weight = self.tensors.get(f"{norm}.weight")
        if weight is None:
            return UNKNOWN
        if (
            not isinstance(weight.codec, Plain)
            or weight.shape != ref.shape[1:]
            or f"{norm}.bias" in self.tensors
        ):
            return FORM
        return Fold(frozenset(readers), norm=weight.name)

    def _is_known(self, path: str) -> bool:
        """Whether a matrix stands in the tables, so that it reads none of the norms behind their back."""
        last = path.rpartition(".")[2]
        if not path.startswith("self_attn."):
            return True
        return last in self.before or any(path in readers for readers in READERS.values())

    def _row_fold(self, path: str, ref: TensorRef) -> Fold | str:
        before = self.weights.get(path)
        if before is None:
            return FUSED
        if before.shape[0] != ref.shape[1]:
            return GROUPED
        if self.clamped and path.endswith(".v_proj"):
            return CLAMPED
        bias = self.tensors.get(f"{path}.bias")
        if before.name not in self.works or (bias is not None and not isinstance(bias.codec, Plain)):
            return KEPT
        return Fold(frozenset({ref.name}), rows=before.name, bias=bias.name if bias is not None else None)

    def _latent_fold(self, before: TensorRef, ref: TensorRef) -> Fold | str:
        nope, values = (self.config.get(key) for key in ("qk_nope_head_dim", "v_head_dim"))
        if not isinstance(nope, int) or not isinstance(values, int):
            return UNKNOWN
        heads, rest = divmod(before.shape[0], nope + values)
        if rest or heads * values != ref.shape[1]:
            return UNKNOWN
        if before.name not in self.works:
            return KEPT
        return Fold(frozenset({ref.name}), rows=before.name, heads=(nope + values, values))
