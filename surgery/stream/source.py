"""Open a model: a local folder, or a hub id found in the local cache or read from the hub.

Reads config.json, the index and every safetensors header, checks them against one another, and
groups stored tensors to logical ones: FP8 weights with their scales, fused experts one by one, quantized
tensors as `quantized` reads them.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.codecs.codec import Codec
from surgery.codecs.fp8_block import BLOCK, Fp8Block, scale_shape
from surgery.codecs.plain import ITEMSIZE, Opaque, Plain
from surgery.errors import CheckpointError, Table
from surgery.stream.checkpoint import Checkpoint, Event, Part, StoredRef, quantization_of
from surgery.stream.files import DataFile, Source, StoredTensor, natural_key, travels
from surgery.stream.header import Header, read_header
from surgery.stream.hub import Hub, Repo, cached_shard, locate
from surgery.stream.mxfp4 import block_codec
from surgery.stream.quantized import read_quantized
from surgery.stream.roles import Architecture, architecture_for

_BUFFERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
SCALE_SUFFIX = "_scale_inv"
_ONE_OF_SEVERAL = re.compile(r"-of-0*(\d+)\.safetensors$")

Shards = Callable[[Sequence[str]], list[tuple[DataFile, Header]]]
"""Opens shards by name."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector from walking the hundred thousands of objects that a plan makes; it
    would take almost half of the time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def open_checkpoint(model: str | Path, name: str | None = None, hub: Hub | None = None) -> Checkpoint:
    """A lazy checkpoint of a folder, `repo` or `repo@revision`. Reads headers only.

    `name` is what messages and lineage call it (default: `model` itself); `hub` says how the hub is reached
    (default: as the environment says). Raises CheckpointError for whatever makes the files unusable, naming
    the file or tensor.
    """
    found = locate(model, hub)
    label = name or str(model)
    if found.repo is not None:
        config, extra, shards = read_repo(found.repo)
    elif found.folder is not None:
        config, extra = read_config(found.folder), side_files(found.folder)
        cached = found.revision is not None
        shards = read_folder(found.folder, cached_shard if cached else local_shard)
    else:
        raise TypeError(f"{model} is neither in a folder nor on the hub")
    stored, files, notes = shards
    architecture = architecture_for(config)
    if not architecture.known:
        notes = (*notes, f"no roles are known for model_type {config.get('model_type')!r}")
    source = Source(label, str(model), found.folder, found.revision, files, notes)
    refs = group(stored, config, architecture, label)
    return Checkpoint(
        tensors={ref.name: ref for ref in refs},
        config=config,
        architecture=architecture,
        side_files=extra,
        label=label,
        inputs=(source,),
        events=tuple(Event("input", f"{label}: {note}") for note in notes),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; CheckpointError where it is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}", hint="fetch this file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}", hint="point at the folder of a whole model")
    return read_json(path)


Found = tuple[list[StoredTensor], tuple[DataFile, ...], tuple[str, ...]]
"""Stored tensors in natural order, their shards, and what was odd about them."""


def read_folder(folder: Path, open_shard: Callable[[Path], tuple[DataFile, Header]]) -> Found:
    """The shards of a folder. One whose file is gone (a link into a cache that was emptied) is not there."""
    present = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    index = folder / INDEX if (folder / INDEX).is_file() else None
    return read_shards(
        str(folder), present, index, lambda names: [open_shard(folder / name) for name in names]
    )


def local_shard(path: Path) -> tuple[DataFile, Header]:
    header = read_header(path)
    return DataFile(path, header.raw), header


def read_repo(repo: Repo) -> tuple[dict[str, Any], dict[str, Path], Found]:
    """Config, side files and shards of a repo on the hub; small files come into the local cache."""
    wanted = [name for name in repo.names if travels(name) or name == INDEX]
    if CONFIG not in wanted:
        raise CheckpointError(f"{repo.label} has no {CONFIG}", hint="give the repo of a whole model")
    extra = repo.small_files(wanted)
    index = extra.pop(INDEX, None)
    present = [name for name in repo.names if name.endswith(".safetensors") and "/" not in name]
    return read_json(extra[CONFIG]), extra, read_shards(repo.label, present, index, repo.shards)


def read_index(index: Path, label: str) -> dict[str, str]:
    """Tensor names to shards, as an index file says."""
    weight_map = read_json(index).get("weight_map")
    valid = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    if not valid or not weight_map:
        raise CheckpointError(
            f"{label}/{INDEX} has no weight_map of tensor names to files", hint="fetch this file again"
        )
    return dict(weight_map)


def read_shards(label: str, present: Sequence[str], index: Path | None, shards: Shards) -> Found:
    """The shards that the index names, or the only one; `present` are the safetensors files there are."""
    weight_map = None
    if index is not None:
        weight_map = read_index(index, label)
        names = sorted(set(weight_map.values()))
    elif SINGLE in present or len(present) == 1:
        names = [SINGLE if SINGLE in present else present[0]]
        part = _ONE_OF_SEVERAL.search(names[0])
        if part and int(part[1]) > 1:
            raise CheckpointError(
                f"{label} has one shard of {int(part[1])} and no {INDEX}",
                hint="fetch the index and the other shards",
            )
    elif present:
        raise CheckpointError(
            f"{label} has {len(present)} safetensors files and no {INDEX}", hint="fetch the index"
        )
    else:
        raise CheckpointError(
            f"{label} has no safetensors files", hint="surgery reads safetensors checkpoints only"
        )
    missing = [name for name in names if name not in present]
    if missing:
        raise CheckpointError(
            f"{label} lacks {len(missing)} of {len(names)} shards that its index names: {_some(missing)}",
            hint="fetch the missing shards",
            table=Table(("missing shard",), tuple((name,) for name in missing)),
        )
    tensors: dict[str, StoredTensor] = {}
    files = []
    for name, (file, header) in zip(names, shards(names), strict=True):
        files.append(file)
        for entry in header.entries:
            if entry.name in tensors:
                other = tensors[entry.name].file
                raise CheckpointError(
                    f"tensor {entry.name} lies in two shards, {other.name if other else '?'} and {name}"
                )
            tensors[entry.name] = StoredTensor(
                entry.name, entry.dtype, entry.shape, entry.nbytes, file, entry.offset
            )
    notes = check_index(weight_map, tensors, label) if weight_map is not None else ()
    ignored = [name for name in present if name not in names]
    if ignored:
        notes = (*notes, f"{len(ignored)} safetensors files outside the index are ignored: {_some(ignored)}")
    ordered = sorted(tensors.values(), key=lambda tensor: natural_key(tensor.name))
    return ordered, tuple(files), notes


def check_index(
    weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor], label: str
) -> tuple[str, ...]:
    """Refuse an index that names tensors its shards do not hold; note tensors it forgets."""
    lies = [
        (name, shard, _place(tensors.get(name)))
        for name, shard in weight_map.items()
        if (found := tensors.get(name)) is None or found.file is None or found.file.name != shard
    ]
    if lies:
        raise CheckpointError(
            f"{label}/{INDEX} is wrong about {len(lies)} tensors, first {lies[0][0]}: it says {lies[0][1]}, "
            f"but it is in {lies[0][2]}",
            hint="fetch the index and the shards again",
            table=Table(("tensor", "index says", "found in"), tuple(lies)),
        )
    extra = [name for name in tensors if name not in weight_map]
    return (f"{len(extra)} tensors are in no index entry (kept): {_some(extra)}",) if extra else ()


def _place(tensor: StoredTensor | None) -> str:
    return tensor.file.name if tensor and tensor.file else "no shard"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def side_files(folder: Path) -> dict[str, Path]:
    """Everything that travels with the weights: tokenizer, template, generation config, remote code."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {name: path for name, path in found.items() if travels(name) and path.is_file()}


def group(
    stored: Iterable[StoredTensor], config: Mapping[str, Any], architecture: Architecture, label: str
) -> list[StoredRef]:
    """Logical refs in natural order from stored tensors in natural order."""
    tensors = {tensor.name: tensor for tensor in stored}
    quantization = quantization_of(config)
    grouping = read_quantized(tensors, quantization)
    refs = [
        StoredRef(name, shape, architecture.info(name), codec, parts, label)
        for name, shape, codec, parts in grouping.tensors
    ]
    taken = grouping.taken()
    fused: dict[str, list[Part]] = {}
    faults = grouping.faults
    for name, tensor in tensors.items():
        if name in taken:
            continue
        if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in tensors:
            continue
        scale = tensors.get(name + SCALE_SUFFIX)
        # A fused tensor with FP8 scales stays whole: its scales would need views of their own.
        split = architecture.split(name, tensor.shape) if architecture.fused and scale is None else None
        if split is not None:
            for logical, key, view in split:
                fused.setdefault(logical, []).append(Part(key, tensor, view))
            continue
        if name.endswith(SCALE_SUFFIX):
            faults.append((name, "a scale without its weight"))
        elif tensor.dtype == "F8_E4M3" and scale is None and quantization.get("quant_method") == "fp8":
            faults.append((name, f"an FP8 weight without {name}{SCALE_SUFFIX}"))
        else:
            codec, parts, fault = _unfused(tensor, scale, quantization)
            if fault:
                faults.append((name, fault))
            refs.append(StoredRef(name, tensor.shape, architecture.info(name), codec, parts, label))
    if faults:
        raise CheckpointError(
            f"{label}: {len(faults)} tensors cannot be understood, first {faults[0][0]}: {faults[0][1]}",
            hint="the checkpoint is incomplete or contradicts its config; fetch it again",
            table=Table(("tensor", "problem"), tuple(faults)),
        )
    refs.extend(_fused_ref(name, parts, architecture, label) for name, parts in fused.items())
    if fused or taken:
        refs.sort(key=lambda ref: natural_key(ref.name))
    return refs


def _unfused(
    tensor: StoredTensor, scale: StoredTensor | None, quantization: Mapping[str, Any]
) -> tuple[Codec, tuple[Part, ...], str]:
    weight = Part("weight", tensor, None)
    if scale is None:
        return _plain_codec(tensor.dtype, quantization), (weight,), ""
    parts = (weight, Part("scale", scale, None))
    block = quantization.get("weight_block_size") or [BLOCK, BLOCK]
    if tensor.dtype != "F8_E4M3" or len(tensor.shape) != 2 or block != [BLOCK, BLOCK]:
        return Opaque(f"{tensor.dtype} with scales of {block}"), parts, ""
    if scale.dtype not in ("F32", "F8_E8M0"):
        return Opaque(f"FP8 with {scale.dtype} scales"), parts, ""
    if scale.shape != scale_shape(tensor.shape):
        want = list(scale_shape(tensor.shape))
        return Opaque("FP8"), parts, f"scales of shape {list(scale.shape)}, {want} expected"
    ue8m0 = quantization.get("scale_fmt") == "ue8m0" or scale.dtype == "F8_E8M0"
    return Fp8Block(scale.dtype, ue8m0), parts, ""


def _plain_codec(dtype: str, quantization: Mapping[str, Any]) -> Codec:
    if dtype in ITEMSIZE:
        return Plain(dtype)
    method = quantization.get("quant_method")
    whole = dtype in _BUFFERS and not method
    return Opaque(f"{dtype} ({method})" if method else dtype, weights=not whole)


def _fused_ref(name: str, parts: list[Part], architecture: Architecture, label: str) -> StoredRef:
    first = parts[0]
    if first.view is None:
        raise CheckpointError(f"{name} of {label} is fused without a view")
    keys = {part.key for part in parts}
    if keys & {"blocks", "scales"} and keys != {"blocks", "scales"}:
        lacking = "scales" if "blocks" in keys else "blocks"
        raise CheckpointError(
            f"{label}: {first.stored.name} has no {lacking} beside it",
            hint="the checkpoint is incomplete; fetch it again",
        )
    shape = first.view.shape(first.stored.shape)
    codec: Codec
    if len(parts) == 1:
        codec = _plain_codec(first.stored.dtype, {})
        parts = [Part("weight", first.stored, first.view)]
    else:
        codec, shape, fault = block_codec(tuple(parts))
        if fault:
            raise CheckpointError(
                f"{label}: {first.stored.name}: {fault}", hint="the checkpoint is damaged; fetch it again"
            )
    return StoredRef(name, shape, architecture.info(name), codec, tuple(parts), label)
