"""`surgery doctor`: what this machine has, and what of it will get in the way."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from pathlib import Path
from typing import Any

import typer

from surgery.cli.options import Json
from surgery.cli.render import Output

PACKAGES = (
    "torch", "transformers", "safetensors", "huggingface_hub", "accelerate", "numpy", "pydantic", "pyyaml",
    "typer", "rich", "jinja2",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(json: Json = False) -> None:
    """Show versions, devices, compilers, cache and anything that will get in the way."""
    output = Output(json=json)
    found = examine()
    if json:
        output.document(found)
        return
    for section in ("machine", "packages", "tools", "hub"):
        output.table(section, ("", ""), [(key, value) for key, value in found[section].items()])
    for problem in found["problems"]:
        output.mark("noted", problem)
    if not found["problems"]:
        output.mark("passed", "nothing in the way")


def examine() -> dict[str, Any]:
    """The findings as one JSON document. Tokens are looked for, never shown."""
    from surgery.stream.manifest import DISTRIBUTION, tool_version
    from surgery.stream.units import format_bytes

    packages = {name: _version(name) for name in PACKAGES}
    problems = [f"{name} is not installed" for name, found in packages.items() if found == "missing"]
    owners = packages_distributions().get("surgery", [])
    foreign = [name for name in owners if name != DISTRIBUTION]
    if foreign:
        problems.append(
            f"another distribution owns the package `surgery`: {', '.join(foreign)}; uninstall it"
        )
    for folder in ("kernels", "recipes"):
        if (Path.cwd() / folder / "__init__.py").is_file():
            problems.append(f"{folder}/__init__.py in this folder hides a package that transformers imports")
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    token = bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()
    if _at_most(packages["transformers"], (5, 17)):
        problems.append(
            "transformers up to 5.17 misreads FP8 tensors whose sides are no multiple of 128 when it "
            "dequantizes; `surgery inspect` and `verify` say which"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "schema": 1,
        "machine": {
            "surgery": tool_version(),
            "python": platform.python_version(),
            "system": platform.platform(),
            "cores": len(os.sched_getaffinity(0)),
            "memory": format_bytes(memory),
            "free disk here": format_bytes(shutil.disk_usage(Path.cwd()).free),
            "gpu": _gpu(),
        },
        "packages": packages,
        "tools": {name: shutil.which(name) or "not found" for name in ("g++", "nvcc", "nvidia-smi")},
        "hub": {
            "cache": os.environ.get("HF_HUB_CACHE") or str(home / "hub"),
            "endpoint": os.environ.get("HF_ENDPOINT", "default"),
            "offline": os.environ.get("HF_HUB_OFFLINE", "no"),
            "token": "present" if token else "none",
        },
        "problems": problems,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _at_most(found: str, limit: tuple[int, int]) -> bool:
    pieces = found.split(".")
    return (
        len(pieces) >= 2
        and pieces[0].isdigit()
        and pieces[1].isdigit()
        and (int(pieces[0]), int(pieces[1])) <= limit
    )


def _gpu() -> str:
    devices = [path.name for path in Path("/proc/driver/nvidia/gpus").glob("*")]
    if not devices:
        return "none"
    try:
        build = distribution("torch").version
    except PackageNotFoundError:
        build = "no torch"
    return f"{len(devices)} NVIDIA (torch {build})"
