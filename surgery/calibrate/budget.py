"""What a walk needs, from headers and the calibration data alone; and the settings that keep it within.

On the computing device: the dense part of one layer in the compute dtype, one batch's activations, the
experts that are in flight and those that are kept for the next batch. In host memory, or in mapped files
beyond the budget: two generations of hidden states. On disk: those files, and two snapshots.

The activations of a batch are an estimate by formula (see `batch_bytes`), held to measurements in
benchmarks/README.md; everything else is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from surgery.calibrate.state import by_expert
from surgery.codecs.codec import matrix_shape
from surgery.stream.checkpoint import Checkpoint, TensorRef

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Ids of a batch, padding included. Larger batches amortise the decoding of experts."""
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
IN_FLIGHT = 3
"""Experts on their way to the computation or in it, see `experts.AHEAD`."""
SNAPSHOTS = 2


@dataclass(frozen=True)
class WalkEstimate:
    """Bytes that a walk takes and reads; `kept_bytes` are a layer's experts, stored or decoded."""

    device: str
    dtype: str
    tokens: int
    batch_tokens: int
    layer_bytes: int
    batch_bytes: int
    expert_bytes: int
    kept_bytes: int
    hidden_bytes: int
    hidden_on_disk: bool
    read_bytes: int
    model_bytes: int
    """Bytes of all layers, each counted once."""

    @property
    def device_bytes(self) -> int:
        return self.layer_bytes + self.batch_bytes + self.expert_bytes + self.kept_bytes

    @property
    def host_bytes(self) -> int:
        hidden = 0 if self.hidden_on_disk else 2 * self.hidden_bytes
        return hidden + (self.device_bytes if self.device == "cpu" else 2 * self.expert_bytes)

    @property
    def disk_bytes(self) -> int:
        return (SNAPSHOTS + (2 if self.hidden_on_disk else 0)) * self.hidden_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device, "dtype": self.dtype, "tokens": self.tokens,
            "batch_tokens": self.batch_tokens, "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes, "disk_bytes": self.disk_bytes, "bytes_read": self.read_bytes,
            "reads_of_the_model": round(self.read_bytes / self.model_bytes, 2) if self.model_bytes else 0.0,
            "parts": {
                "layer": self.layer_bytes, "batch": self.batch_bytes, "experts_in_flight": self.expert_bytes,
                "experts_kept": self.kept_bytes, "hidden_states": self.hidden_bytes,
            },
        }  # fmt: skip


def host_share(memory_bytes: int) -> int:
    """Bytes of hidden states that stay in memory under a budget; more go to mapped files."""
    return memory_bytes // 2


def expert_share(memory_bytes: int) -> int:
    """Bytes of decoded experts that a walk on a CPU keeps under a budget."""
    return memory_bytes // 4


def largest_experts(checkpoint: Checkpoint) -> int:
    """Stored bytes of all routed experts of the layer that has most."""
    layers: dict[int | None, int] = {}
    for ref in checkpoint.tensors.values():
        if ref.info.role == "routed_expert" and not ref.info.mtp:
            layers[ref.info.layer] = layers.get(ref.info.layer, 0) + ref.nbytes
    return max(layers.values(), default=0)


def estimate_walk(
    checkpoint: Checkpoint,
    shapes: Sequence[tuple[int, int]],
    *,
    device: str,
    dtype: str,
    memory_bytes: int,
) -> WalkEstimate:
    """For batches of these shapes [rows, tokens]. `device` is a kind: cpu or cuda."""
    itemsize = ITEMSIZE[dtype]
    config = _text(checkpoint)
    hidden = int(config.get("hidden_size", 0))
    layers: dict[int, list[TensorRef]] = {}
    for ref in checkpoint.tensors.values():
        if ref.info.layer is not None and not ref.info.mtp:
            layers.setdefault(ref.info.layer, []).append(ref)
    dense = max((_dense(refs, itemsize) for refs in layers.values()), default=0)
    ends = [ref for ref in checkpoint.tensors.values() if ref.info.layer is None and not ref.info.mtp]
    embedding = max((ref.numel for ref in ends if ref.info.role == "embedding"), default=0) * itemsize
    experts = max((by_expert(refs) for refs in layers.values()), key=len, default={})
    sizes = [sum(ref.nbytes for ref in refs.values()) for refs in experts.values()]
    weights = [sum(ref.numel for ref in refs.values()) for refs in experts.values()]
    largest, decoded = max(sizes, default=0), max(weights, default=0) * itemsize
    stored = sum(sizes)
    if device == "cpu":
        kept = min(expert_share(memory_bytes), decoded * len(experts))
    else:
        kept = stored
    batch = max((rows * cols for rows, cols in shapes), default=0)
    total = sum(rows * cols for rows, cols in shapes)
    hidden_bytes = total * hidden * itemsize
    return WalkEstimate(
        device=device,
        dtype=dtype,
        tokens=total,
        batch_tokens=batch,
        layer_bytes=max(dense, embedding),
        batch_bytes=batch_bytes(checkpoint, batch, itemsize),
        expert_bytes=IN_FLIGHT * (largest + decoded),
        kept_bytes=kept,
        hidden_bytes=hidden_bytes,
        hidden_on_disk=2 * hidden_bytes > host_share(memory_bytes),
        read_bytes=sum(_layer_reads(refs, itemsize, kept, len(shapes), device) for refs in layers.values())
        + sum(ref.nbytes for ref in ends if ref.info.role in ("embedding", "norm")),
        model_bytes=sum(ref.nbytes for refs in layers.values() for ref in refs),
    )


def _layer_reads(refs: Sequence[TensorRef], itemsize: int, kept: int, batches: int, device: str) -> int:
    """Bytes read for one layer: experts that are not kept again for every batch, the dense part of a layer
    with experts a second time for the routing of the pruned layer."""
    experts = [ref for ref in refs if ref.info.role == "routed_expert"]
    stored = sum(source.nbytes for ref in experts for source in ref.sources())
    dense = sum(source.nbytes for ref in refs for source in ref.sources()) - stored
    if not experts:
        return dense
    whole = sum(ref.numel for ref in experts) * itemsize if device == "cpu" else stored
    again = max(0.0, 1 - kept / whole) if whole else 0.0
    return 2 * dense + round(stored * (1 + (batches - 1) * again))


def batch_bytes(checkpoint: Checkpoint, tokens: int, itemsize: int) -> int:
    """Activations of a batch inside one layer, at most.

    Per token: six vectors of the hidden size (input, residual, normed, routed sum and two in passing), twice
    queries, keys and values (before and after the rotation) and the attention's output, and two of the widest
    MLP's inner size; the outputs of all its experts; the router's scores of every expert, four times in
    float32; one expert's tokens at twice the even share.
    """
    config = _text(checkpoint)
    hidden = int(config.get("hidden_size", 0))
    heads = int(config.get("num_attention_heads", 0))
    size = int(config.get("head_dim") or (hidden // heads if heads else 0))
    query = heads * int(config.get("qk_nope_head_dim", 0) + config.get("qk_rope_head_dim", 0) or size)
    value = heads * int(config.get("v_head_dim") or size)
    rules = checkpoint.architecture.experts
    count = int(config.get(rules.count, 0) or 0) if rules else 0
    top_k = int(config.get(rules.top_k, 0) or 0) if rules else 0
    inner = int(config.get("intermediate_size", 0))
    routed = int(config.get("moe_intermediate_size") or inner)
    per_token = (6 + top_k) * hidden + 2 * (2 * query + value) + value + 2 * inner
    routing = 4 * 4 * count
    share = 2 * tokens * top_k // count if count else 0
    return tokens * (per_token * itemsize + routing) + share * (2 * hidden + 3 * routed) * itemsize


def _text(checkpoint: Checkpoint) -> dict[str, Any]:
    return {**checkpoint.config, **(checkpoint.config.get("text_config") or {})}


def _dense(refs: Sequence[TensorRef], itemsize: int) -> int:
    return sum(prod(matrix_shape(ref.shape)) for ref in refs if ref.info.role != "routed_expert") * itemsize
