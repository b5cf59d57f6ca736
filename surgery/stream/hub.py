"""Find a model by folder or hub id, without fetching weights.

A hub id is looked up in the local cache first. What the cache does not hold is planned from the
shards' headers, which huggingface_hub reads by byte ranges; such a model can be planned, not run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError
from surgery.stream.files import DataFile, RemoteFile, StoredTensor, natural_key
from surgery.stream.header import DTYPE_BITS, tensor_nbytes


@dataclass(frozen=True)
class Located:
    """Where a model is; without a folder, what its headers say."""

    label: str
    folder: Path | None
    revision: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: list[StoredTensor] = field(default_factory=list)
    files: tuple[DataFile, ...] = ()
    side_files: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def locate(model: str | Path) -> Located:
    """A local folder as it is; otherwise `repo` or `repo@revision` on the hub."""
    text = str(model)
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{text}: {error}", hint="give the path in full") from error
    if path.is_dir():
        return Located(text, path)
    if isinstance(model, Path) or path.exists() or not is_hub_id(text):
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"{text} {what}", hint="give a model folder, or a hub id like org/name")
    repo, _, revision = text.partition("@")
    cached = _cached_snapshot(repo, revision or None)
    if cached is not None:
        return Located(text, cached, cached.name)
    return _from_headers(text, repo, revision or None)


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form org/name or org/name@revision."""
    name = text.partition("@")[0]
    pieces = name.split("/")
    return len(pieces) == 2 and all(pieces) and not name.startswith((".", "~", "/"))


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The cached snapshot, if it holds every shard that its index names."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index} in the local cache is damaged", hint=f"fetch it again: hf download {repo}"
            ) from error
        return folder if all((folder / shard).is_file() for shard in shards) else None
    return folder if any(folder.glob("*.safetensors")) else None


def _from_headers(label: str, repo: str, revision: str | None) -> Located:
    from hashlib import sha256

    from httpx import HTTPError
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    failures = (
        HfHubHTTPError, HTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError, ValueError,
        KeyError,
    )  # fmt: skip

    api = HfApi()
    try:
        info = api.model_info(repo, revision=revision)
        commit = info.sha
        metadata = api.get_safetensors_metadata(repo, revision=commit)
        side = {
            item.rfilename: Path(hf_hub_download(repo, item.rfilename, revision=commit))
            for item in info.siblings or []
            if item.rfilename.endswith((".json", ".jinja", ".txt", ".model", ".py"))
            and not item.rfilename.endswith(".index.json")
            and "/" not in item.rfilename
        }
        config = json.loads(side["config.json"].read_bytes()) if "config.json" in side else {}
    except failures as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{label} is no local folder, not whole in the local cache, and the hub did not answer: {reason}",
            hint=f"check the name and the network (HF_ENDPOINT, HF_TOKEN), or: hf download {repo}",
        ) from error
    tensors, files = [], []
    for name, shard in metadata.files_metadata.items():
        described = {key: (str(value.dtype), tuple(value.shape)) for key, value in shard.tensors.items()}
        for key, (dtype, _) in described.items():
            if dtype not in DTYPE_BITS:
                raise CheckpointError(
                    f"{label}: tensor {key} has the unknown dtype {dtype}", hint="update surgery"
                )
        sizes = {key: tensor_nbytes(*each) for key, each in described.items()}
        digest = sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        file = RemoteFile(name, digest, label, sum(sizes.values()))
        files.append(file)
        tensors += [StoredTensor(key, *each, sizes[key], file) for key, each in described.items()]
    tensors.sort(key=lambda tensor: natural_key(tensor.name))
    return Located(
        label, None, commit, config, tensors, tuple(files), side,
        notes=("known by its headers only: it can be planned, not run",),
    )  # fmt: skip
