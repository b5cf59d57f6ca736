"""transformers' model of a checkpoint before it has weights, and where it is to compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from surgery.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from surgery.stream.checkpoint import Checkpoint

DTYPES = ("float32", "bfloat16", "float16")


def placement(device: str, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where and in what to compute; UsageError for what torch or this machine does not have."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"no such device: {device}", hint="use cpu, cuda or auto") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("this machine has no GPU that torch can use", hint="use the device cpu")
    return place, cast("torch.dtype", getattr(torch, compute_dtype(place.type, dtype)))


def compute_dtype(kind: str, dtype: str | None) -> str:
    """The name of the dtype to compute in on a kind of device (float32 on a CPU, bfloat16 elsewhere, unless
    `dtype` says another); UsageError for what none is."""
    name = dtype or ("float32" if kind == "cpu" else "bfloat16")
    if name not in DTYPES:
        raise UsageError(f"no such compute dtype: {name}", hint=f"use one of {', '.join(DTYPES)}")
    return name


def device_kind(device: str) -> str:
    """cpu or cuda, of a device that need not be there; UsageError for what is none."""
    import torch

    try:
        kind = torch.device("cuda" if device == "auto" else device).type
    except RuntimeError as error:
        raise UsageError(f"no such device: {device}", hint="use cpu, cuda or auto") from error
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"walks run on cpu or cuda, not on {device}", hint="use the device cpu or cuda")
    return kind


def build_skeleton(
    checkpoint: Checkpoint, folder: Path, trust_remote_code: bool, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model on the meta device, its parameters in `dtype` (default: as config.json says).

    `folder` holds the checkpoint's side files, see `side_folder`. Raises CheckpointError where transformers
    cannot build it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return cast(
                "PreTrainedModel",
                AutoModelForCausalLM.from_config(
                    config, trust_remote_code=trust_remote_code, **({"dtype": dtype} if dtype else {})
                ),
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        needs_code = "auto_map" in checkpoint.config and not trust_remote_code
        raise CheckpointError(
            f"transformers cannot build {checkpoint.label} (model_type "
            f"{checkpoint.config.get('model_type')!r}): {error}",
            hint="it may need the code that comes with it; read that code, then allow remote code"
            if needs_code
            else "check config.json, or use a version of transformers that knows this architecture",
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bar and warnings: what they would say is returned or raised."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
