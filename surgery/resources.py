"""Finds the recipes and kernel sources: shipped inside the package, or in the checkout beside it.

The wheel carries them as surgery/_recipes and surgery/_kernels, because top-level folders of these
names would claim generic import names in everybody's environment.
"""

from __future__ import annotations

from pathlib import Path

from surgery.errors import SurgeryError


def recipe_folder() -> Path:
    """The folder of the recipes that come with surgery. Raises SurgeryError where there is none."""
    return _folder("recipes")


def kernel_folder() -> Path:
    """The folder of the C++ and CUDA sources. Raises SurgeryError where there is none."""
    return _folder("kernels")


def _folder(name: str) -> Path:
    package = Path(__file__).resolve().parent
    shipped, checkout = package / f"_{name}", package.parent / name
    if shipped.is_dir():
        return shipped
    # Beside an installed package, a folder of that name belongs to somebody else.
    if checkout.is_dir() and (package.parent / "pyproject.toml").is_file():
        return checkout
    raise SurgeryError(
        f"{name}/ is missing: neither {shipped} nor a checkout's {checkout} is there",
        hint="install surgery again from its wheel, or run it from a complete checkout",
    )
