"""Whether parents can be merged: shapes, vocabularies, architectures, stored forms, equal bytes, and configs
that disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery.errors import CheckpointError, Table
from surgery.stream.checkpoint import Checkpoint, Event, ReadContext, StoredRef, TensorRef
from surgery.stream.files import Source

_BOOKKEEPING = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config", "use_cache"}
)


def check_parents(base: str, parents: Mapping[str, Checkpoint], needs: Mapping[str, Sequence[str]]) -> None:
    """Raise CheckpointError with one table of everything that keeps the parents apart.

    `needs` names, per tensor of the base, the parents that carry weight for it.
    """
    first = parents[base]
    rows: list[tuple[str, str, str]] = []
    for name, parent in parents.items():
        mine, theirs = first.config.get("model_type"), parent.config.get("model_type")
        if mine != theirs:
            rows.append(("config.json: model_type", name, f"{theirs}, {mine} in {base}"))
    for tensor, carriers in needs.items():
        shape = first.tensors[tensor].shape
        for name in carriers:
            other = parents[name].tensors.get(tensor)
            if other is None:
                rows.append((tensor, name, "missing"))
            elif other.shape != shape:
                rows.append((tensor, name, f"{list(other.shape)}, {list(shape)} in {base}"))
    if not rows:
        return
    for name, parent in parents.items():
        mine, theirs = _vocabulary(first), _vocabulary(parent)
        if mine != theirs:
            rows.insert(0, ("config.json: vocab_size", name, f"{theirs}, {mine} in {base}"))
    raise CheckpointError(
        f"the parents do not fit together: {len(rows)} differences, first {rows[0][0]} of {rows[0][1]}: "
        f"{rows[0][2]}",
        hint="merge checkpoints of one architecture, or leave these tensors out of `select`",
        table=Table(("where", "parent", "what it has"), tuple(rows)),
    )


def _vocabulary(checkpoint: Checkpoint) -> Any:
    text = checkpoint.config.get("text_config")
    return checkpoint.config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)


def config_events(base: str, parents: Mapping[str, Checkpoint]) -> tuple[Event, ...]:
    """What the child's config (the base's) does not share with the other parents, and tensors of theirs
    that the base has no place for."""
    first = parents[base]
    events = []
    for name, parent in parents.items():
        if name == base:
            continue
        keys = sorted({*first.config, *parent.config} - _BOOKKEEPING)
        differing = [key for key in keys if first.config.get(key) != parent.config.get(key)]
        if differing:
            told = "; ".join(
                f"{key}: {first.config.get(key)!r} in {base}, {parent.config.get(key)!r} in {name}"
                for key in differing
            )
            events.append(Event("config", f"the child gets {base}'s config, {name}'s differs in {told}"))
        extra = tuple(key for key in parent.tensors if key not in first.tensors)
        if extra:
            message = (
                f"{len(extra)} tensors of {name} have no place in {base} and are not used, first {extra[0]}"
            )
            events.append(Event("unused", message, extra))
    return tuple(events)


def join_inputs(parents: Iterable[Checkpoint]) -> tuple[tuple[Source, ...], tuple[Event, ...]]:
    """All sources and all events of several checkpoints, each once."""
    sources: dict[str, Source] = {}
    events: dict[Event, None] = {}
    for parent in parents:
        sources |= {source.label: source for source in parent.inputs}
        events |= dict.fromkeys(parent.events)
    return tuple(sources.values()), tuple(events)


def equal_bytes(inputs: Sequence[TensorRef], context: ReadContext) -> bool:
    """Whether stored inputs are the same byte for byte; stops at the first tile that differs."""
    import numpy as np

    base = inputs[0]
    if not all(isinstance(ref, StoredRef) and ref.same_form(base) for ref in inputs):
        return False
    stored = [ref for ref in inputs if isinstance(ref, StoredRef)]
    for start, stop in base.tiles():
        for place in range(len(base.parts)):
            first, *rest = (
                ref.raw(ref.parts[place], start, stop, context, slot=slot) for slot, ref in enumerate(stored)
            )
            if not all(np.array_equal(other, first) for other in rest):
                return False
    return True


def check_decodable(refs: Sequence[TensorRef]) -> None:
    """Refuse arithmetic on forms that can only be copied."""
    stuck = [ref for ref in refs if not ref.codec.decodable]
    if stuck:
        raise CheckpointError(
            f"{stuck[0].name} is stored as {stuck[0].codec.name}, which can be copied but not computed with",
            hint="give it a weight of 0 or 1 and no threshold, or start from a bf16 or FP8 checkpoint",
            table=Table(("tensor", "stored as"), tuple((ref.name, ref.codec.name) for ref in stuck)),
        )
