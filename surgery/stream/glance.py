"""A first look at a model, without its headers: what its index, its config and its file list say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError
from surgery.stream.files import StoredTensor
from surgery.stream.hub import Hub, Repo, locate
from surgery.stream.roles import architecture_for
from surgery.stream.source import (
    CONFIG,
    INDEX,
    SCALE_SUFFIX,
    local_shard,
    read_config,
    read_folder,
    read_index,
    read_json,
    read_shards,
)


@dataclass(frozen=True)
class Glance:
    """`nbytes` of all shards is None where a size is not told; `roles` counts tensors, FP8 scales with
    their weights."""

    label: str
    model: str
    revision: str | None
    architecture: str
    model_type: str | None
    shards: int
    local_shards: int
    nbytes: int | None
    roles: dict[tuple[str, bool], int]

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.label, "model": self.model, "revision": self.revision,
            "architecture": self.architecture, "model_type": self.model_type,
            "shards": self.shards, "local_shards": self.local_shards, "bytes": self.nbytes,
            "roles": [
                {"role": role, "mtp": mtp, "tensors": count}
                for (role, mtp), count in sorted(self.roles.items())
            ],
        }  # fmt: skip


def glance(model: str | Path, name: str | None = None, hub: Hub | None = None) -> Glance:
    """Reads the config and the index; of a model in one file, which has no index, the header.

    Raises CheckpointError where the model is not there or these files are unusable.
    """
    found = locate(model, hub)
    if found.repo is not None:
        config, shards, sizes, local = _of_repo(found.repo)
    elif found.folder is not None:
        config, shards, sizes, local = _of_folder(found.folder)
    else:
        raise TypeError(f"{model} is neither in a folder nor on the hub")
    architecture = architecture_for(config)
    roles: dict[tuple[str, bool], int] = {}
    for tensor in shards:
        if tensor.endswith(SCALE_SUFFIX) and tensor.removesuffix(SCALE_SUFFIX) in shards:
            continue
        info = architecture.info(tensor)
        roles[info.role, info.mtp] = roles.get((info.role, info.mtp), 0) + 1
    known = [size for size in sizes if size is not None]
    return Glance(
        name or str(model), str(model), found.revision, architecture.name, config.get("model_type"),
        len(sizes), local, sum(known) if len(known) == len(sizes) else None, roles,
    )  # fmt: skip


Seen = tuple[dict[str, Any], dict[str, str], list[int | None], int]
"""Config, shards by tensor, sizes of the shards, and how many are on this machine."""


def _of_repo(repo: Repo) -> Seen:
    if CONFIG not in repo.names:
        raise CheckpointError(f"{repo.label} has no {CONFIG}", hint="give the repo of a whole model")
    files = repo.small_files([name for name in (CONFIG, INDEX) if name in repo.names])
    if INDEX in files:
        shards = read_index(files[INDEX], repo.label)
    else:
        present = [name for name in repo.names if name.endswith(".safetensors") and "/" not in name]
        shards = _by_header(read_shards(repo.label, present, None, repo.shards)[0])
    names = sorted(set(shards.values()))
    local = sum(repo.cached(name) is not None for name in names)
    return read_json(files[CONFIG]), shards, [repo.sizes.get(name) for name in names], local


def _of_folder(folder: Path) -> Seen:
    config = read_config(folder)
    if (folder / INDEX).is_file():
        shards = read_index(folder / INDEX, str(folder))
    else:
        shards = _by_header(read_folder(folder, local_shard)[0])
    paths = [folder / name for name in sorted(set(shards.values()))]
    sizes = [path.stat().st_size if path.is_file() else None for path in paths]
    return config, shards, sizes, sum(size is not None for size in sizes)


def _by_header(tensors: Iterable[StoredTensor]) -> dict[str, str]:
    return {tensor.name: tensor.file.name for tensor in tensors if tensor.file is not None}
