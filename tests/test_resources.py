"""Recipes and kernel sources are found in a checkout and in an installed package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from surgery import resources
from surgery.errors import SurgeryError

FINDERS = [("recipes", resources.recipe_folder), ("kernels", resources.kernel_folder)]
Finder = Callable[[], Path]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that takes the place of the package's."""
    folder = tmp_path / "surgery"
    folder.mkdir()
    monkeypatch.setattr(resources, "__file__", str(folder / "resources.py"))
    return folder


def test_this_checkout() -> None:
    root = Path(resources.__file__).parents[1]
    assert resources.recipe_folder() == root / "recipes"
    assert (resources.recipe_folder() / "chimera.yaml").is_file()
    assert resources.kernel_folder() == root / "kernels"


@pytest.mark.parametrize("name, find", FINDERS)
def test_shipped_in_the_package(package: Path, name: str, find: Finder) -> None:
    shipped = package / f"_{name}"
    shipped.mkdir()
    assert find() == shipped


@pytest.mark.parametrize("name, find", FINDERS)
def test_checkout_beside_the_package(package: Path, name: str, find: Finder) -> None:
    folder = package.parent / name
    folder.mkdir()
    (package.parent / "pyproject.toml").touch()
    assert find() == folder


@pytest.mark.parametrize("name, find", FINDERS)
def test_a_foreign_folder_in_site_packages_is_not_taken(package: Path, name: str, find: Finder) -> None:
    (package.parent / name).mkdir()
    with pytest.raises(SurgeryError, match=f"{name}/ is missing") as caught:
        find()
    assert caught.value.hint


@pytest.mark.parametrize("name, find", FINDERS)
def test_neither(package: Path, name: str, find: Finder) -> None:
    with pytest.raises(SurgeryError, match=f"{name}/ is missing"):
        find()


def test_the_folders_are_no_python_packages() -> None:
    for folder in (resources.recipe_folder(), resources.kernel_folder()):
        assert not (folder / "__init__.py").exists()
