"""A hub on loopback: the endpoints that huggingface_hub asks, storage on a host of its own, and faults.

The endpoint is 127.0.0.1, storage is 127.0.0.2 (another host to every client, still loopback). Storage
hands out files under signed addresses that expire. Every request is recorded with its headers. A fault is
a function that sees a request before it is answered and may answer in its own way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopbacktoken"
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass(frozen=True)
class Seen:
    """One request: which host it reached, and what it asked for."""

    host: str
    method: str
    path: str
    headers: dict[str, str]
    name: str = ""

    @property
    def authorized(self) -> bool:
        return "authorization" in self.headers

    @property
    def range(self) -> tuple[int, int] | None:
        """First byte and the one after the last."""
        found = _RANGE.fullmatch(self.headers.get("range", ""))
        return (int(found[1]), int(found[2]) + 1) if found else None


Fault = Callable[["Handler", Seen], bool]
"""Answers a request in its own way and returns True, or leaves it alone."""


@dataclass
class Repo:
    """Files by name. `small` ones lie with the endpoint itself, the rest in storage."""

    files: dict[str, bytes]
    commit: str
    private: bool = False
    gated: bool = False
    history: frozenset[str] = frozenset()
    """Commits before this one, which answer as if their files were the same."""
    inline: frozenset[str] = frozenset()
    """Shards that the endpoint serves itself."""

    def etag(self, name: str) -> str:
        data = self.files[name]
        return git_sha1(data) if small(name) else hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def small(name: str) -> bool:
    return not name.endswith(".safetensors")


@dataclass
class Hub:
    """State that handlers share. `lifetime` is how many requests a signed address lives."""

    endpoint: str = ""
    storage: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    tokens: frozenset[str] = frozenset({TOKEN})
    read_only: frozenset[str] = frozenset()
    lifetime: int = 1 << 30
    seen: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    signatures: dict[str, int] = field(default_factory=dict)
    lfs: bool = False
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repo: str, folder: Path, commit: str = "c" * 40, **options: Any) -> Repo:
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.repos[repo] = Repo(files, commit, **options)
        return self.repos[repo]

    def sign(self) -> str:
        with self.lock:
            signature = f"s{len(self.signatures)}"
            self.signatures[signature] = self.lifetime
        return signature

    def valid(self, signature: str) -> bool:
        with self.lock:
            left = self.signatures.get(signature, 0)
            self.signatures[signature] = left - 1
        return left > 0

    def of(self, method: str, host: str = "", name: str = "") -> list[Seen]:
        """Recorded requests."""
        return [
            each
            for each in self.seen
            if each.method == method and (not host or each.host == host) and name in each.name
        ]

    def data_ranges(self, name: str) -> list[tuple[int, int]]:
        """Ranges of a shard that were asked of storage, in order."""
        return [each.range for each in self.of("GET", "storage", name) if each.range]


class Handler(BaseHTTPRequestHandler):
    """One request to the endpoint or to storage."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub
    host: str

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._handle()

    do_GET = do_POST = do_PUT = do_HEAD

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        name = ""
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            name = found[2]
        elif self.host == "storage" and self.command == "GET":
            name = path.rpartition("/")[2]
        seen = Seen(self.host, self.command, self.path, headers, name)
        if path == "/api/agent-harnesses":  # housekeeping of huggingface_hub, once a day
            self.answer(404)
            return
        with self.hub.lock:
            self.hub.seen.append(seen)
            faults = list(self.hub.faults)
        if any(fault(self, seen) for fault in faults):
            return
        (self._storage if self.host == "storage" else self._endpoint)(seen, path)

    def answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        """Send an answer; `length` may lie."""
        try:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            if "Content-Length" not in (headers or {}):
                self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(
            status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}
        )

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    # Storage

    def _storage(self, seen: Seen, path: str) -> None:
        if self.command == "PUT":
            data = self.body()
            self.hub.objects[path.rpartition("/")[2]] = data
            self.answer(200, b"", {"ETag": '"uploaded"'})
            return
        signature = parse_qs(urlsplit(self.path).query).get("signature", [""])[0]
        if not self.hub.valid(signature):
            self.answer(403, b"<Error><Code>ExpiredToken</Code></Error>")
            return
        _, owner, repo, name = path.split("/", 3)
        found = self.hub.repos[f"{owner}/{repo}"]
        self.send_range(found.files[name], seen.range, etag=f'"stored-{found.etag(name)}"')

    def send_range(
        self, data: bytes, wanted: tuple[int, int] | None, etag: str, also: dict[str, str] | None = None
    ) -> None:
        headers = {**(also or {}), "ETag": etag, "Accept-Ranges": "bytes"}
        if wanted is None:
            self.answer(200, data, headers)
        elif wanted[0] >= len(data):
            self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        else:
            first, end = wanted[0], min(wanted[1], len(data))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            self.answer(206, data[first:end], headers)

    # The endpoint

    def _endpoint(self, seen: Seen, path: str) -> None:
        given = seen.headers.get("authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            self.body()
            self.answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(seen, given, *found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(given, found[1], found[2])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            repo = self._repo(given, found[1])
            if repo is not None:
                self.json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": repo.etag(name)}
                        for name, data in repo.files.items()
                    ]
                )
        elif path == "/api/repos/create":
            self._create(given)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            files = json.loads(self.body())["files"]
            if self._writer(given, found[1]):
                modes = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if self.hub.lfs and not small(each["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": self._oid(found[1], each["path"]),
                    }
                    for each in files
                ]
                self.json({"files": modes})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._lfs_batch(given, found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(given, found[1])
        elif path == "/api/validate-yaml":
            self.body()
            self.json({"errors": [], "warnings": []})
        else:
            self.body()
            self.answer(404)

    def _repo(self, given: str, name: str) -> Repo | None:
        """The repo, or an answer that there is none for this account."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not given):
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.answer(404 if given else 401, b"", headers)
            return None
        if repo.gated and not given:
            self.answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return None
        return repo

    def _info(self, given: str, name: str, revision: str | None) -> None:
        repo = self._repo(given, name)
        if repo is None:
            return
        if revision not in (None, "main", repo.commit, *repo.history):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return
        commit = revision if revision in repo.history else repo.commit
        siblings = [{"rfilename": each} for each in repo.files]
        if "blobs" in parse_qs(urlsplit(self.path).query):
            siblings = [{"rfilename": each, "size": len(data)} for each, data in repo.files.items()]
        self.json(
            {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": repo.private,
             "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        )  # fmt: skip

    def _resolve(self, seen: Seen, given: str, name: str, revision: str, file: str) -> None:
        repo = self._repo(given, name)
        if repo is None:
            return
        if revision not in ("main", repo.commit, *repo.history):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        if file not in repo.files:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
            return
        data = repo.files[file]
        commit = revision if revision in repo.history else repo.commit
        headers = {"X-Repo-Commit": commit, "ETag": f'"{repo.etag(file)}"'}
        if small(file) or file in repo.inline:
            if self.command == "HEAD":
                self.answer(200, data, headers)
            else:
                self.send_range(data, seen.range, headers["ETag"], headers)
            return
        signature = self.hub.sign()
        headers |= {
            "X-Linked-Etag": f'"{repo.etag(file)}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.storage}/{name}/{file}?signature={signature}",
        }
        self.answer(302, b"", headers)

    # Writing

    def _writer(self, given: str, name: str) -> bool:
        if not given:
            self.answer(401, b"", {"X-Error-Message": "Invalid username or password."})
        elif given in self.hub.read_only:
            self.answer(403, b"", {"X-Error-Message": "You don't have the rights to write here"})
        elif name not in self.hub.repos:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        else:
            return True
        return False

    def _oid(self, name: str, file: str) -> str | None:
        data = self.hub.repos[name].files.get(file)
        if data is None:
            return None
        return hashlib.sha256(data).hexdigest() if self.hub.lfs and not small(file) else git_sha1(data)

    def _create(self, given: str) -> None:
        wanted = json.loads(self.body())
        if not given:
            self.answer(401, b"", {"X-Error-Message": "Invalid username or password."})
            return
        if given in self.hub.read_only:
            self.answer(403, b"", {"X-Error-Message": "You don't have the rights to create a model here"})
            return
        owner = wanted.get("organization") or "me"
        name = f"{owner}/{wanted['name']}"
        if name in self.hub.repos:
            self.json({"url": f"{self.hub.endpoint}/{name}", "name": name}, 409)
            return
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repos[name] = Repo({}, "e" * 40, private=private)
        self.json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "1"})

    def _lfs_batch(self, given: str, name: str) -> None:
        wanted = json.loads(self.body())
        if not self._writer(given, name):
            return
        objects = []
        for each in wanted["objects"]:
            found: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                found["actions"] = {"upload": {"href": f"{self.hub.storage}/upload/{each['oid']}"}}
            objects.append(found)
        self.json({"transfer": "basic", "objects": objects})

    def _commit(self, given: str, name: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        if not self._writer(given, name):
            return
        repo = self.hub.repos[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "header":
                self.hub.commits.append(value)
        repo.commit = hashlib.sha1(repr(sorted(repo.files)).encode()).hexdigest()
        self.json(
            {"success": True, "commitOid": repo.commit, "commitUrl": f"{self.hub.endpoint}/{name}/commit/1"}
        )


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    hub = Hub()
    servers = []
    for host, address in (("endpoint", "127.0.0.1"), ("storage", "127.0.0.2")):
        handler = type(host, (Handler,), {"hub": hub, "host": host})
        server = ThreadingHTTPServer((address, 0), handler)
        server.daemon_threads = True
        setattr(hub, host, f"http://{address}:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        servers.append((server, thread))
    try:
        yield hub
    finally:
        for server, thread in servers:
            server.shutdown()
            thread.join()
            server.server_close()
