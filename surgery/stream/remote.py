"""A shard on the hub, read by byte ranges.

Every answer is checked before it is believed: status, Content-Range against the range that was asked for
and the size that the hub told, Content-Encoding, length, and the storage's own etag against the one it
gave first. A broken answer is continued behind its last byte, not started again. Where storage refuses an
address, the hub is asked for a new one and its etag and size must still be those of the plan.

The token goes to the endpoint alone: the address that the hub hands out is asked without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urljoin, urlsplit

from surgery.errors import CheckpointError
from surgery.stream.files import DataFile, Source
from surgery.stream.transfer import RETRIED, Fault, Traffic, Transfer, pause_of, range_text, used_up

if TYPE_CHECKING:
    import httpx
    import numpy as np

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_SIZE = re.compile(r"bytes \*/(\d+)")
REDIRECTS = 5
STALE = frozenset({400, 401, 403, 404, 410})
"""How storage answers an address whose signature has expired."""


@dataclass(frozen=True)
class Address:
    """What the hub says of a file: where it is now, and what it is. `size` in bytes."""

    url: str
    etag: str
    size: int


class Desk(Protocol):
    """Where addresses come from: the hub, as `surgery.stream.hub` asks it."""

    transfer: Transfer

    def address(self, name: str) -> Address:
        """One metadata request."""

    def headers(self, url: str) -> dict[str, str]:
        """Headers for a request to `url`; the token only where it is the endpoint's."""


class Window(Protocol):
    """Bytes that were read ahead."""

    def read(self, file: RemoteFile, buffer: np.ndarray[Any, Any], offset: int) -> None: ...


class RemoteFile(DataFile):
    """A shard that is read from the hub. `label` is org/name@commit."""

    local = False

    def __init__(self, desk: Desk, label: str, name: str, address: Address) -> None:
        self.path = Path(name)
        self.name = name
        self.label = label
        self.size = address.size
        self.etag = address.etag
        self.window: Window | None = None
        self._desk = desk
        self._address = address
        self._lock = Lock()
        self._stored_etags: dict[str, str] = {}

    @property
    def transfer(self) -> Transfer:
        return self._desk.transfer

    def descriptor(self) -> int:
        raise TypeError(f"{self.label}/{self.name} is no local file")

    def read_into(self, buffer: np.ndarray[Any, Any], offset: int) -> None:
        """Fill a uint8 buffer with the bytes from `offset` on; those read ahead are not asked for again."""
        if self.window is not None:
            self.window.read(self, buffer, offset)
        else:
            self.fetch(buffer.data, offset)

    def fetch(self, view: memoryview, offset: int) -> None:
        """Read one range over the network. CheckpointError once the limits of patience are reached."""
        if offset + len(view) > self.size:
            raise CheckpointError(
                f"{self.label}/{self.name} ends at byte {self.size}, though its header promises more",
                hint="the file on the hub is damaged",
            )
        done = 0

        def attempt() -> None:
            nonlocal done
            url = self._address.url
            try:
                done += self._get(url, view[done:], offset + done)
            except Fault as fault:
                done += fault.gained
                if fault.stale:
                    self._renew(url)
                raise

        if len(view):
            self.transfer.persist(
                f"reading {range_text(offset, len(view))} of {self.label}/{self.name}", attempt
            )

    def _renew(self, url: str) -> None:
        """Ask the hub for a new address, unless another stream just did."""
        with self._lock:
            if self._address.url != url:
                return
            found = self._desk.address(self.name)
            told = [
                f"{what} was {was}, is {now}"
                for what, was, now in (("etag", self.etag, found.etag), ("size", self.size, found.size))
                if was != now
            ]
            if told:
                raise self._changed("; ".join(told))
            self._address = found

    def _get(self, url: str, view: memoryview, offset: int) -> int:
        """One request, redirects followed; the bytes that it brought are in `view`."""
        import httpx
        from huggingface_hub import constants, get_session

        last = offset + len(view) - 1
        gained = 0
        with ExitStack() as stack:
            try:
                for _ in range(REDIRECTS):
                    self.transfer.wait_for_turn(urlsplit(url).netloc)
                    self.transfer.count(requests=1)
                    response = stack.enter_context(
                        get_session().stream(
                            "GET", url,
                            headers={
                                **self._desk.headers(url),
                                "Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity",
                            },
                            follow_redirects=False, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                        )
                    )  # fmt: skip
                    if not response.has_redirect_location:
                        break
                    url = urljoin(url, response.headers["location"])
                else:
                    raise Fault(f"more than {REDIRECTS} redirects")
                expected = self._check(response, url, offset, len(view))
                for data in response.iter_raw():
                    self.transfer.check()
                    if gained + len(data) > expected:
                        raise Fault(f"more than the {expected} bytes that were announced", gained=gained)
                    view[gained : gained + len(data)] = data
                    gained += len(data)
            except httpx.TransportError as error:
                raise Fault(str(error) or type(error).__name__, gained=gained) from error
            finally:
                self.transfer.count(nbytes=gained)
        if gained < len(view):
            raise Fault(f"{gained} of {len(view)} bytes came", gained=gained)
        return gained

    def _check(self, response: httpx.Response, url: str, offset: int, nbytes: int) -> int:
        """How many bytes the answer will bring, from `offset` on; raises where it is not that."""
        status, headers = response.status_code, response.headers
        host = urlsplit(url).netloc
        spent = used_up(headers)
        if spent is not None:
            self.transfer.pause(host, spent)
        if status in RETRIED:
            pause = pause_of(status, headers)
            if pause is not None:
                self.transfer.pause(host, pause)
            raise Fault(f"{host} answered {status} {response.reason_phrase}", pause_s=pause)
        if status in STALE:
            raise Fault(f"{host} answered {status} {response.reason_phrase}", stale=True)
        if status == 416:
            told = _SIZE.fullmatch(headers.get("content-range", ""))
            if told and int(told[1]) != self.size:
                raise self._changed(f"size was {self.size}, is {told[1]}")
        if status not in (200, 206):
            raise Fault(f"{host} answered {status} {response.reason_phrase}")
        if headers.get("content-encoding", "identity") != "identity":
            raise Fault(f"the answer is encoded as {headers['content-encoding']}")
        expected = self._length(headers.get("content-range") if status == 206 else None, offset, nbytes)
        announced = headers.get("content-length")
        if announced is not None and announced != str(expected):
            raise Fault(f"{announced} bytes are announced for a range of {expected}")
        self._same_content(host, headers.get("etag"))
        return expected

    def _length(self, told: str | None, offset: int, nbytes: int) -> int:
        """Bytes of the range that was answered, which may end early but must begin where it was asked to."""
        if told is None:
            if offset == 0 and nbytes == self.size:
                return nbytes
            raise Fault("the whole file came, or a range that does not say which, instead of a range")
        found = _RANGE.fullmatch(told)
        if not found:
            raise Fault(f"Content-Range says {told!r}")
        first, last, size = (int(number) for number in found.groups())
        if size != self.size:
            raise self._changed(f"size was {self.size}, is {size}")
        if first != offset or not first <= last < offset + nbytes:
            raise Fault(f"bytes {first}–{last} came instead of {offset}–{offset + nbytes - 1}")
        return last - first + 1

    def _same_content(self, host: str, etag: str | None) -> None:
        """Storage keeps etags of its own; the first that a host gives must stay."""
        if etag is None:
            return
        with self._lock:
            before = self._stored_etags.setdefault(host, etag)
        if before != etag:
            raise self._changed(f"the etag of {host} was {before}, is {etag}")

    def _changed(self, difference: str) -> CheckpointError:
        return CheckpointError(
            f"{self.label}/{self.name} changed since it was opened: {difference}",
            hint="start again with --fresh, so that all of it is read in one state",
        )


def remote_files(sources: Iterable[Source]) -> list[RemoteFile]:
    """The shards that are read over the network."""
    return [file for source in sources for file in source.files if isinstance(file, RemoteFile)]


def traffic(sources: Iterable[Source]) -> dict[str, int] | None:
    """What was read over the network, opening included; None where nothing is remote."""
    transfers = {id(file.transfer): file.transfer for file in remote_files(sources)}
    if not transfers:
        return None
    total = Traffic()
    for each in transfers.values():
        total.requests += each.traffic.requests
        total.nbytes += each.traffic.nbytes
        total.retries += each.traffic.retries
    return total.as_dict()
