"""A transformers model from a Checkpoint: through the stream, without a decoded copy on disk.

Any stored form that the stream decodes loads on any device, FP8 blocks on a CPU included: transformers gets
decoded tensors under the names they have on disk, and its own conversion (experts of a layer into one tensor,
tied embeddings, renamings) does the rest. Lazy checkpoints load as well: what an operator would write is
computed on the way.

Every tensor must find its place: a missing, unexpected or misshapen one is an error. What transformers does
not use, the layers for multi-token prediction above all, is reported. Memory: the weights in the compute
dtype, for mixtures of experts up to twice that while transformers stacks the experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from surgery.calibrate.skeleton import build_skeleton, placement, quiet_transformers
from surgery.calibrate.state import Progress, decode_state, left_out, missing_experts, shape_state
from surgery.calibrate.tokenizer import side_folder
from surgery.errors import CheckpointError, Table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from surgery.stream.checkpoint import Checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, on `device` in `dtype`; `left_out` names the tensors it does not use."""

    label: str
    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    left_out: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Weights that the model computes with; tied ones count once."""
        return int(self.model.num_parameters())


def load_model(
    checkpoint: Checkpoint,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    stage: str = "load",
) -> LoadedModel:
    """Build the causal language model of a checkpoint and fill it.

    `device` is a torch device, or "auto" for a GPU where there is one; `dtype` defaults to float32 on a CPU
    and to bfloat16 elsewhere. What transformers keeps in float32 (router biases) stays so. Code that comes
    with the checkpoint runs only under `trust_remote_code`. Raises CheckpointError where checkpoint and
    architecture do not fit each other, naming the tensors.
    """
    place, compute = placement(device, dtype)
    with side_folder(checkpoint) as folder, quiet_transformers():
        skeleton = build_skeleton(checkpoint, folder, trust_remote_code)
        _refuse(checkpoint, [(name, "missing") for name in missing_experts(checkpoint)])
        state = decode_state(checkpoint, compute, progress, stage)
        model, info = _fill(checkpoint, skeleton, state, dtype=compute)
    _refuse(checkpoint, _faults(info))
    unused = left_out(checkpoint) + _declared_superfluous(model, state)
    cast("torch.nn.Module", model).to(place).eval()
    return LoadedModel(checkpoint.label, model, place, compute, unused)


def unplaced_keys(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a load would miss, and what it would find no place for, from names and shapes alone.

    The first are parameters of transformers' model, the second tensors of the checkpoint (with both shapes
    where these differ). Raises CheckpointError where transformers cannot build the model or a stored form
    cannot be decoded.
    """
    import torch

    with side_folder(checkpoint) as folder, quiet_transformers():
        skeleton = build_skeleton(checkpoint, folder, trust_remote_code)
        holes = missing_experts(checkpoint)
        if holes:
            return holes, ()
        state = shape_state(checkpoint)
        _, info = _fill(checkpoint, skeleton, state, dtype=torch.float32, device_map={"": "meta"})
    misshapen = [_mismatch(each) for each in info["mismatched_keys"]]
    return tuple(sorted(info["missing_keys"])), tuple(sorted([*info["unexpected_keys"], *misshapen]))


def _fill(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, state: dict[str, torch.Tensor], **options: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The skeleton's model with these tensors, and transformers' account of the loading."""
    try:
        filled: Any = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to have them all in the account instead of an exception
            **options,
        )
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"transformers cannot load the tensors of {checkpoint.label} into its "
            f"{type(skeleton).__name__}: {error}",
            hint="experts of one layer must have the same shapes: surgery inspect shows them",
        ) from error
    return cast("tuple[PreTrainedModel, Mapping[str, Any]]", filled)


def _faults(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(tensor, problem) of everything that did not find its place."""
    faults = [(str(name), "missing") for name in sorted(info["missing_keys"])]
    faults += [(str(name), "unexpected") for name in sorted(info["unexpected_keys"])]
    faults += [(_mismatch(each), "another shape") for each in info["mismatched_keys"]]
    return faults


def _refuse(checkpoint: Checkpoint, faults: list[tuple[str, str]]) -> None:
    if faults:
        raise CheckpointError(
            f"{checkpoint.label} does not fit transformers' {checkpoint.config.get('model_type')}: "
            f"{len(faults)} tensors, first {faults[0][0]} ({faults[0][1]})",
            hint="config.json and weights must be of one model: surgery inspect shows both",
            table=Table(("tensor", "problem"), tuple(faults)),
        )


def _mismatch(entry: tuple[Any, ...]) -> str:
    name, found, wanted = entry
    return f"{name} ({list(found)} in the checkpoint, {list(wanted)} in the model)"


def _declared_superfluous(model: PreTrainedModel, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Tensors that the model's class declares superfluous (old buffers, say), so that they are not loaded."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    known = model.state_dict().keys()
    return tuple(
        name for name in state if name not in known and any(re.search(each, name) for each in patterns)
    )
