"""The documentation's example runs, its links exist, and every shipped recipe validates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from surgery.recipe.load import load_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S)
    assert code
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], "docs/python.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "routed_expert (128, 128) fp8-block" in printed
    assert "True" in printed and (tmp_path / "child" / "surgery_manifest.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_validate(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.recipe.steps


def test_recipe_blocks_of_the_docs_validate(tmp_path: Path) -> None:
    found = 0
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            if block.startswith("parents:"):
                path = tmp_path / "recipe.yaml"
                path.write_text(block)
                load_recipe(path)
                found += 1
    assert found >= 2
