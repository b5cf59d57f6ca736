"""Find a model by folder or hub id, and read from the hub what is not on this machine.

A hub id whose files are all in the local cache is that folder; nothing is asked of the network. Otherwise
the revision is pinned to a commit, and file by file the cached copy is taken where there is one and the
hub read by byte ranges where there is none. Everything goes through huggingface_hub's public functions, so
HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean there.

Shards come by HTTP ranges from the signed address, xet-stored ones too: that is what huggingface_hub's
own reader of remote files does, and it has no public function for ranges of a xet file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit

from surgery.errors import CheckpointError
from surgery.stream.files import DataFile
from surgery.stream.header import Header, header_length, parse_header, read_header
from surgery.stream.refusals import fault_of, refusal
from surgery.stream.remote import Address, RemoteFile
from surgery.stream.transfer import Transfer

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")


@dataclass(frozen=True)
class Hub:
    """How the hub is reached; None means what huggingface_hub takes from the environment."""

    endpoint: str | None = None
    token: str | bool | None = None
    cache: Path | None = None
    transfer: Transfer = field(default_factory=Transfer)

    def api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token, library_name="surgery")


@dataclass(frozen=True)
class Located:
    """Where a model is: in a folder, or (without one) in a repo of the hub."""

    folder: Path | None
    revision: str | None = None
    repo: Repo | None = None


class Repo:
    """One commit of a repo on the hub. `sizes` are the bytes of its files, None where they are not told."""

    def __init__(self, hub: Hub, repo: str, commit: str, sizes: Mapping[str, int | None]) -> None:
        self.transfer = hub.transfer
        self.commit = commit
        self.sizes = dict(sorted(sizes.items()))
        self.label = f"{repo}@{commit[:12]}"
        self._hub = hub
        self._api = hub.api()
        self._repo = repo
        self._site = _site(self._api.endpoint)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def cached(self, name: str) -> Path | None:
        """The copy in the local cache."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self._repo, name, cache_dir=self._hub.cache, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def small_files(self, names: Sequence[str]) -> dict[str, Path]:
        """Files that are kept whole, fetched into the local cache where they are not there."""
        return dict(zip(names, self._each(self._fetched, names), strict=True))

    def shards(self, names: Sequence[str]) -> list[tuple[DataFile, Header]]:
        """Shards with their headers: cached ones as local files, the rest by byte ranges."""
        return self._each(self._shard, names)

    def address(self, name: str) -> Address:
        from huggingface_hub import hf_hub_url

        place = f"{self.label}/{name}"
        url = hf_hub_url(self._repo, name, revision=self.commit, endpoint=self._api.endpoint)

        def ask() -> Address:
            self.transfer.wait_for_turn(urlsplit(url).netloc)
            self.transfer.count(requests=1)
            found = asked(place, lambda: self._api.get_hf_file_metadata(url=url), reached=True)
            if found.etag is None or found.size is None:
                raise CheckpointError(
                    f"{place}: the hub does not say its etag and size, so that nothing read from it could "
                    "be checked",
                    hint=f"download it first: hf download {self._repo} --revision {self.commit}",
                )
            if found.commit_hash not in (None, self.commit):
                raise CheckpointError(f"{place}: the hub answers with commit {found.commit_hash}")
            return Address(urljoin(url, found.location), found.etag, found.size)

        return self.transfer.persist(f"asking for {place}", ask)

    def headers(self, url: str) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # a lazy facade

        mine = _site(url) == self._site
        return build_hf_headers(token=self._hub.token if mine else False, library_name="surgery")

    def _shard(self, name: str) -> tuple[DataFile, Header]:
        import numpy as np

        path = self.cached(name)
        if path is not None:
            return cached_shard(path)
        file = RemoteFile(self, self.label, name, self.address(name))
        label = f"{self.label}/{name}"
        first = np.empty(min(self.transfer.limits.header_bytes, file.size), np.uint8)
        file.fetch(first.data, 0)
        head = first.tobytes()
        length = header_length(head[:8], file.size, label)
        rest = np.empty(max(0, 8 + length - first.size), np.uint8)
        file.fetch(rest.data, first.size)
        header = parse_header((head + rest.tobytes())[8 : 8 + length], file.size, label)
        return file, header

    def _fetched(self, name: str) -> Path:
        place = f"{self.label}/{name}"

        def ask() -> Path:
            self.transfer.check()
            path = asked(
                place,
                lambda: self._api.hf_hub_download(
                    self._repo, name, revision=self.commit, cache_dir=self._hub.cache
                ),
                reached=True,
            )
            return Path(path)

        return self.transfer.persist(f"fetching {place}", ask)

    def _each(self, work: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """`work` of every name, on a few threads; the first error ends the rest."""
        pool = ThreadPoolExecutor(self.transfer.limits.streams, thread_name_prefix="hub")
        try:
            return list(pool.map(work, names))
        except BaseException:
            self.transfer.cancel()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self.transfer.resume()


def locate(model: str | Path, hub: Hub | None = None) -> Located:
    """A local folder as it is; otherwise `repo` or `repo@revision` on the hub."""
    text = str(model)
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{text}: {error}", hint="give the path in full") from error
    if path.is_dir():
        return Located(path)
    if isinstance(model, Path) or path.exists() or not is_hub_id(text):
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"{text} {what}", hint="give a model folder, or a hub id like org/name")
    repo, _, revision = text.partition("@")
    hub = hub or Hub()
    cached = cached_snapshot(hub, repo, revision or None)
    if cached is not None:
        return Located(cached, cached.name)
    found = open_repo(hub, text, repo, revision or None)
    return Located(None, found.commit, found)


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form org/name or org/name@revision."""
    name = text.partition("@")[0]
    pieces = name.split("/")
    return len(pieces) == 2 and all(pieces) and not name.startswith((".", "~", "/"))


def pinned(model: str, revision: str | None) -> str:
    """A hub id at the commit it was read at; a folder as it is."""
    return f"{model.partition('@')[0]}@{revision}" if revision else model


def cached_snapshot(hub: Hub, repo: str, revision: str | None) -> Path | None:
    """The cached snapshot, if it holds every shard that its index names."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, cache_dir=hub.cache))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None
    index = folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        return None
    if index.is_file():
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index} in the local cache is damaged", hint=f"fetch it again: hf download {repo}"
            ) from error
        return folder if all((folder / shard).is_file() for shard in shards) else None
    return folder if any(folder.glob("*.safetensors")) else None


def cached_shard(path: Path) -> tuple[DataFile, Header]:
    """A shard of the cache, known by the etag that its blob is named after."""
    header = read_header(path)
    etag = Path(os.readlink(path)).name if path.is_symlink() else None
    return DataFile(path, header.raw, etag), header


def open_repo(hub: Hub, label: str, repo: str, revision: str | None) -> Repo:
    """The repo at the commit that `revision` is now."""
    from huggingface_hub import is_offline_mode

    absent = f"{label} is no local folder, not whole in the local cache, and"
    fetch = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    if is_offline_mode():
        raise CheckpointError(f"{absent} HF_HUB_OFFLINE is set", hint=f"unset it, or fetch it once: {fetch}")
    api = hub.api()

    def ask() -> Any:
        hub.transfer.wait_for_turn(urlsplit(api.endpoint).netloc)
        hub.transfer.count(requests=1)
        return asked(label, lambda: api.model_info(repo, revision=revision, files_metadata=True))

    try:
        info = hub.transfer.persist(f"asking for {label}", ask)
    except CheckpointError as error:
        raise CheckpointError(
            f"{absent} the hub does not give it: {error.message.removeprefix(f'{label}: ')}", hint=error.hint
        ) from error
    if not info.sha:
        raise CheckpointError(f"{label}: the hub does not say which commit it is")
    return Repo(hub, repo, info.sha, {item.rfilename: item.size for item in info.siblings or ()})


def asked(place: str, question: Callable[[], T], *, reached: bool = False) -> T:
    """The hub's answer. Raises Fault where another try may help, CheckpointError where it will not. Of a
    host that was `reached` before, a failing connection is taken for a passing one."""
    from httpx import HTTPError

    try:
        return question()
    except (HTTPError, OSError, ValueError) as error:
        fault = fault_of(error, reached=reached)
        if fault is not None:
            raise fault from error
        raise refusal(error, place) from error


def _site(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what a token must not leave."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)
