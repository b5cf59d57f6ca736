"""Reading from the hub: requests, bytes, time and memory, against a hub on loopback with a slow line.

    python benchmarks/hub.py [--case NAME] [--work DIR] [--keep]

    plan    `plan` of two whole DeepSeek-V3 parents, by byte ranges       requests, bytes, seconds, memory
    copy    a Chimera of two V3-shaped parents of 0.8 GB                  against the time that the line needs

The line: every request waits 50 ms for its first byte and then brings 20 MB/s, however many there are; eight
of them bring 160 MB/s. The real hub is elsewhere and faster or slower than that. Server and client share the
machine, and the server is Python.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import loopback_hub  # noqa: E402

LATENCY_S, RATE, STREAMS = 0.05, 20e6, 8
MB = 1_000_000


@dataclass
class Mapped(loopback_hub.Repo):
    """A repo whose shards are mapped, not read: those of `plan` have 689 GB."""

    def etag(self, name: str) -> str:
        return sha256(name.encode()).hexdigest()


def serve(hub: loopback_hub.Hub, name: str, folder: Path) -> None:
    """Add a folder to the hub; small files are read."""
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                files[path.name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            files[path.name] = path.read_bytes()
    hub.repos[name] = Mapped(files, sha256(name.encode()).hexdigest()[:40])


def slow_line(handler: loopback_hub.Handler, seen: loopback_hub.Seen) -> bool:
    """Answer a range of a shard as slowly as the line is."""
    if seen.host != "storage" or not seen.range:
        return False
    time.sleep(LATENCY_S)
    _, owner, repo, rest = seen.path.split("/", 3)
    data = handler.hub.repos[f"{owner}/{repo}"].files[rest.partition("?")[0]]
    start, stop = seen.range[0], min(seen.range[1], len(data))
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
    handler.send_header("Content-Length", str(stop - start))
    handler.end_headers()
    began = time.monotonic()
    for place in range(start, stop, MB):
        end = min(place + MB, stop)
        handler.wfile.write(data[place:end])
        time.sleep(max(0.0, began + (end - start) / RATE - time.monotonic()))
    return True


def surgery(hub: loopback_hub.Hub, work: Path, *arguments: str) -> tuple[float, int, dict[str, Any]]:
    """Seconds, peak RSS in bytes and JSON document of one command on two cores."""
    shutil.rmtree(work / "home", ignore_errors=True)
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(work / "home")}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(HERE.parent / "cli.py"), *arguments, "--json"],
        env=environment, stdout=subprocess.PIPE, cwd=work, text=True,
    )  # fmt: skip
    printed: list[str] = []
    reader = threading.Thread(target=lambda: printed.append(process.stdout.read()))  # type: ignore[union-attr]
    reader.start()
    peak = 0
    while process.poll() is None:
        # Not wait4: its maximum begins with this process's own, which maps the parents.
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    seconds = time.monotonic() - began
    reader.join()
    if process.returncode:
        raise SystemExit(f"surgery {' '.join(arguments)} failed")
    return seconds, peak, json.loads(printed[0])


def parents(hub: loopback_hub.Hub, work: Path, case: str, *size: str) -> tuple[str, ...]:
    """Make and serve a case's two parents; the options that name them."""
    folder = work / case
    if not folder.is_dir():
        subprocess.run([sys.executable, HERE / "synthetic.py", case, folder, *size], check=True)
    for name in ("base", "other"):
        serve(hub, f"org/{name}", folder / name)
    return "chimera", "--set", "parents.base=org/base", "--set", "parents.reasoner=org/other"


def plan_case(hub: loopback_hub.Hub, work: Path) -> list[tuple[str, str, str]]:
    rows = []
    options = parents(hub, work, "v3-full")
    for more in (("--index-only",), ()):
        hub.seen.clear()
        seconds, peak, _ = surgery(hub, work, "plan", *options, *more)
        case = " ".join(["plan", *more])
        asked = sum(each.range[1] - each.range[0] for each in hub.seen if each.range)
        rows.append((case, "requests", f"{len(hub.seen)}"))
        rows.append((case, "header bytes", f"{asked / MB:.3g} MB"))
        rows.append((case, "time", f"{seconds:.3g} s"))
        rows.append((case, "peak RSS", f"{peak / MB:.3g} MB"))
    return rows


def copy_case(hub: loopback_hub.Hub, work: Path) -> list[tuple[str, str, str]]:
    rows = []
    options = parents(hub, work, "v3-sample", "--gb", "0.8")
    for memory in ("256MB", "1GiB"):
        shutil.rmtree(work / "out", ignore_errors=True)
        arguments = ("run", *options, "-o", str(work / "out"), "--memory", memory)
        _, peak, told = surgery(hub, work, *arguments)
        network, seconds = told["run"]["remote"], told["run"]["seconds"]
        line = network["bytes"] / (STREAMS * RATE)
        case = f"copy --memory {memory}"
        rows.append((case, "read", f"{network['bytes'] / MB:.4g} MB, {network['requests']} requests"))
        rows.append((case, "run", f"{seconds:.3g} s"))
        rows.append((case, "run, to the line", f"{seconds / line:.3g} x"))
        rows.append((case, "peak RSS", f"{peak / MB:.3g} MB"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="for parents and outputs (default: a temporary folder)")
    parser.add_argument("--case", choices=("plan", "copy"), help="only this one")
    parser.add_argument("--keep", action="store_true", help="keep the parents for the next time")
    given = parser.parse_args()
    work = (given.work or Path(tempfile.mkdtemp(prefix="surgery-hub-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str, str]] = []
    try:
        with loopback_hub.running() as hub:
            hub.faults.append(slow_line)
            if given.case != "copy":
                rows += plan_case(hub, work)
            if given.case != "plan":
                rows += copy_case(hub, work)
    finally:
        if not given.keep:
            shutil.rmtree(work, ignore_errors=True)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}. {platform.machine()}, {os.cpu_count()} cores, {platform.release()}."
    )
    print("\n| case | figure | measured |\n|---|---|---:|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
