"""The shape of the code base: import direction, file sizes, names, and what importing must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "surgery"
FILES = sorted(PACKAGE.rglob("*.py"))
LEVELS = {
    "cli": 7,
    "recipe": 6,
    "recover": 5,
    "evaluate": 5,
    "report": 5,
    "operators": 4,
    "calibrate": 3,
    "stream": 2,
    "codecs": 1,
    "errors": 0,
    "resources": 0,
}
SHARED = ("protocol", "together", "fingerprint", "layerwise")
"""What families of operators have in common."""


def part_of(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def imported_modules(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    if len(relative.parts) < 2:
        return
    mine = relative.parts[0]
    for module in imported_modules(path):
        other = part_of(module) if module.startswith("surgery.") else ""
        if other and other != mine:
            assert LEVELS[other] < LEVELS[mine], f"{relative} imports {module}"


def test_operator_families_do_not_import_one_another() -> None:
    for path in (PACKAGE / "operators").rglob("*.py"):
        if path.stem in SHARED:
            continue
        family = path.relative_to(PACKAGE / "operators").parts[0]
        for module in imported_modules(path):
            pieces = module.split(".")
            if pieces[:2] == ["surgery", "operators"] and len(pieces) > 2:
                assert pieces[2] in (family, *SHARED), f"{path} imports {module}"


def test_files_are_short_and_say_what_they_are() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, f"{path} has more than 400 lines"
        assert ast.get_docstring(ast.parse(text)) or path.name == "__main__.py", f"{path} has no docstring"
        assert path.stem not in ("utils", "common", "helpers", "misc"), path


def test_data_folders_are_no_packages() -> None:
    for folder in ("kernels", "recipes"):
        assert (ROOT / folder).is_dir()
        assert not list((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import surgery", ("torch", "transformers", "pydantic", "numpy")),
        ("from surgery.cli.app import main; main(['--help'])", ("torch", "transformers", "numpy")),
        ("from surgery.cli.app import main; main(['plan', 'demo/chimera'])", ("torch", "transformers")),
    ],
)  # fmt: skip
def test_heavy_packages_are_not_loaded(code: str, absent: tuple[str, ...]) -> None:
    script = f"{code}\nimport sys; print([m for m in {absent!r} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip().splitlines()[-1] == "[]", done.stderr


def test_every_operator_has_its_row_in_the_readme() -> None:
    from surgery.recipe.table import OPERATORS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for op, path in OPERATORS.items():
        file = path.partition(":")[0].replace(".", "/") + ".py"
        assert f"`{op}`" in readme and file in readme, f"{op} is not in README's table"
