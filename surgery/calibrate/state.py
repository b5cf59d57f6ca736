"""The state dict of a checkpoint: tensors under their names on disk, decoded, in the compute dtype.

Logical tensors that the stream took out of a fused one go back to where they were, so that the names are
those that transformers converts from. MTP layers are left out: transformers does not run them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

from surgery.codecs.mxfp4 import Mxfp4Blocks
from surgery.errors import CheckpointError, Table
from surgery.stream.checkpoint import Part
from surgery.stream.mxfp4 import value_parts

if TYPE_CHECKING:
    import torch

    from surgery.stream.checkpoint import Checkpoint, TensorRef
    from surgery.stream.layouts import View

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how many are done, and how many there are."""


@dataclass(frozen=True)
class Place:
    """Where a logical tensor goes: the whole tensor `name`, or `view` of it."""

    name: str
    shape: tuple[int, ...]
    view: View | None
    ref: TensorRef


def left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the tensors that have no place in a state dict: those of MTP layers."""
    return tuple(name for name, ref in checkpoint.tensors.items() if ref.info.mtp)


def places(refs: Iterable[TensorRef], label: str) -> Iterator[Place]:
    """One place for each tensor. Raises CheckpointError for stored forms that cannot be decoded, and where a
    fused tensor lacks some of its experts; `label` is what messages call the checkpoint."""
    wanted = list(refs)
    opaque = [(ref.name, ref.codec.name) for ref in wanted if not ref.codec.decodable]
    if opaque:
        raise CheckpointError(
            f"{label} cannot be loaded: {len(opaque)} tensors are stored as {opaque[0][1]}, "
            f"first {opaque[0][0]}",
            hint="use a version of it in bf16, fp16, fp32 or FP8 blocks",
            table=Table(("tensor", "stored as"), tuple(opaque)),
        )
    filled: dict[str, int] = {}
    for ref in wanted:
        if ref.is_view:
            stored = _values(ref).stored.name
            filled[stored] = filled.get(stored, 0) + ref.numel
    for ref in wanted:
        if not ref.is_view:
            yield Place(ref.name, ref.shape, None, ref)
            continue
        part = _values(ref)
        if filled[part.stored.name] != prod(part.stored.shape):
            raise CheckpointError(
                f"{label} holds {filled[part.stored.name]} of the {prod(part.stored.shape)} "
                f"weights of {part.stored.name}",
                hint="experts of this layer are gone, but not from the tensor that is to hold them",
            )
        yield Place(part.stored.name, part.stored.shape, part.view, ref)


def _values(ref: TensorRef) -> Part:
    """Where the values of a part of a fused tensor go: where they are, or in its unquantized form."""
    return value_parts(ref)[0] if isinstance(ref.codec, Mxfp4Blocks) else ref.parts[0]


def used(checkpoint: Checkpoint) -> list[TensorRef]:
    """The tensors that are not left out."""
    return [ref for ref in checkpoint.tensors.values() if not ref.info.mtp]


def missing_experts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Tensors that some experts of a layer have and others lack. transformers cannot stack such a layer, and
    says no more than that."""
    found: dict[tuple[str, str], set[int]] = {}
    for name, ref in checkpoint.tensors.items():
        expert = ref.info.expert
        if expert is not None and not ref.info.mtp:
            before, _, after = name.partition(f".experts.{expert}.")
            found.setdefault((before, after), set()).add(expert)
    counts: dict[str, int] = {}
    for (before, _), experts in found.items():
        counts[before] = max(counts.get(before, 0), 1 + max(experts))
    return tuple(
        f"{before}.experts.{expert}.{after}"
        for (before, after), experts in found.items()
        for expert in range(counts[before])
        if expert not in experts
    )


def by_expert(refs: Iterable[TensorRef]) -> dict[int, dict[str, TensorRef]]:
    """Routed experts' tensors of one layer by expert, then by the name behind the expert's index."""
    found: dict[int, dict[str, TensorRef]] = {}
    for ref in refs:
        if ref.info.role == "routed_expert" and ref.info.expert is not None:
            name = ref.name.partition(f".experts.{ref.info.expert}.")[2]
            found.setdefault(ref.info.expert, {})[name] = ref
    return found


def shape_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The state dict on the meta device: names and shapes, nothing read."""
    import torch

    return {
        place.name: torch.empty(place.shape, device="meta")
        for place in places(used(checkpoint), checkpoint.label)
    }


def decode_state(
    checkpoint: Checkpoint, dtype: torch.dtype, progress: Progress | None = None, stage: str = "load"
) -> dict[str, torch.Tensor]:
    """The state dict of a whole checkpoint in `dtype`, on the CPU."""
    return decode_refs(used(checkpoint), dtype, checkpoint.label, progress=progress, stage=stage)


def decode_refs(
    refs: Iterable[TensorRef],
    dtype: torch.dtype,
    label: str,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
    stage: str = "load",
) -> dict[str, torch.Tensor]:
    """Decoded tensors in `dtype`, under the names that they have on disk.

    Tensors stored in float32 stay in it, so that transformers can keep those that it wants so (router
    biases).
    """
    import torch

    found = list(places(refs, label))
    state: dict[str, torch.Tensor] = {}
    for done, place in enumerate(found, start=1):
        form = torch.float32 if place.ref.codec.name == "f32" else dtype
        if place.view is None:
            state[place.name] = decode(place.ref, form, device)
        else:
            if place.name not in state:
                state[place.name] = torch.empty(place.shape, dtype=form)
            # A view slices and transposes a torch tensor exactly as it does a numpy array.
            slab = cast("Any", state[place.name][place.view.index])
            inside = cast("torch.Tensor", place.view.of(slab))
            inside.copy_(place.ref.read().view(inside.shape))
        if progress:
            progress(stage, done, len(found))
    return state


def decode(ref: TensorRef, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """The whole tensor in `dtype` on `device` (default: the CPU).

    A tensor as it lies in a parent travels to another device as stored and is decoded there; anything else
    is computed on the CPU tile by tile, so that no float32 copy of it is needed.
    """
    import torch

    if device is not None and device.type != "cpu":
        from surgery.calibrate.carried import stored_form

        form = stored_form(ref, dtype)
        return form.to(device).values(dtype).view(ref.shape)
    whole = torch.empty(ref.shape, dtype=dtype)
    if ref.numel:
        rows = whole.view(ref.rows, -1)
        for start, stop in ref.tiles():
            rows[start:stop] = ref.read(slice(start, stop)).view(stop - start, -1)
    return whole
