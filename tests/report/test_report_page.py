"""The page as a whole: well-formed, self-contained, escaped, complete, and true to the manifest."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from surgery.report.html import render_report

VOID = {"meta", "br", "hr", "img", "input", "link"}
ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """Elements with their attributes and text; fails on tags that don't nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.titles: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "title":
            self.titles.append(data)
        if "style" not in self.stack:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.elements for key, value in attrs.items() if key == name and value]


def test_is_well_formed_and_needs_nothing_beside_it(any_manifest: dict[str, Any]) -> None:
    html = render_report(any_manifest)
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not page.attributes("src") and not page.attributes("href")
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert html.count("url(") == html.count("url(#")
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    for value in page.attributes("fill"):
        if value.startswith("url("):
            assert value[5:-1] in ids


def test_names_every_parent_file_hash_and_version(any_manifest: dict[str, Any]) -> None:
    page = Page(render_report(any_manifest))
    for label, found in any_manifest["inputs"].items():
        assert label in page.words and found["model"] in page.words
        if found["revision"]:
            assert found["revision"] in page.attributes("title")
    for name, file in any_manifest["output"]["files"].items():
        assert name in page.words
        if file["sha256"]:
            assert file["sha256"] in page.attributes("title")
    for name, version in any_manifest["versions"].items():
        assert f"{name} {version}" in page.words
    assert "not hashed" in page.words
    assert "quant_method fp8, weight_block_size 128 × 128" in page.words
    assert "61.3 MB peak memory" in page.words and "1 min 15 s to write" in page.words
    assert "vllm serve" in page.words and 'dtype="bfloat16"' in page.words
    assert "op: merge.aoe" in page.words
    assert "None: nothing fell back" in page.words


def test_the_recipe_goes_before_the_steps(copied_manifest: dict[str, Any]) -> None:
    copied_manifest["recipe"] = {"parents": {"base": "org/ü"}, "steps": [{"op": "merge.aoe"}]}
    page = Page(render_report(copied_manifest))
    assert "parents: base: org/ü steps: - op: merge.aoe" in page.words


HOSTILE = "</title></svg><script>alert(1)</script>\"'><b onload=x>&amp;{{ 7*7 }}{% raw %}"


def test_escapes_names_wherever_they_come_from(averaged_manifest: dict[str, Any]) -> None:
    text = json.dumps(averaged_manifest)
    tensor = "model.layers.0.mlp.up_proj.weight"
    for name in ("org/donor", tensor, "config.json", "merge.aoe", "3.11.7", "fp8"):
        text = text.replace(name, json.dumps(name + HOSTILE)[1:-1])
    manifest = json.loads(text)
    manifest["events"] = [{"kind": HOSTILE, "message": HOSTILE, "tensors": [HOSTILE]}]
    manifest["dropped"] = {HOSTILE: HOSTILE}
    manifest["coverage"][0]["role"] = HOSTILE
    page = Page(render_report(manifest))
    tags = {tag for tag, _ in page.elements}
    assert "script" not in tags and "b" in tags  # <b> is the page's own, without attributes
    assert not page.attributes("onload")
    assert page.words.count("<script>alert(1)</script>") >= 12
    assert "{{ 7*7 }}" in page.words


def test_a_hostile_measurement_is_escaped(copied_manifest: dict[str, Any]) -> None:
    for row in copied_manifest["measurements"]:
        row.update(parent=HOSTILE, role=row["role"] + HOSTILE)
    page = Page(render_report(copied_manifest))
    assert "script" not in {tag for tag, _ in page.elements}
    assert HOSTILE in page.words


def test_events_come_first_and_with_their_tensors(copied_manifest: dict[str, Any]) -> None:
    copied_manifest["events"] = [
        {"kind": "re-encoded", "message": "2 tensors are re-encoded", "tensors": ["a.weight", "b.weight"]},
        {"kind": "config", "message": "rope_theta differs", "tensors": []},
    ]
    copied_manifest["dropped"] = {"model.layers.9.weight": "not in the base"}
    words = Page(render_report(copied_manifest)).words
    assert "2 events to know of" in words and "a.weight, b.weight" in words
    assert words.index("rope_theta differs") < words.index("Parents against child")
    assert "nothing fell back" not in words
    assert "model.layers.9.weight not in the base" in words
    assert "1 of the parents' tensors is left out." in words


def test_remote_code_is_asked_for_where_it_is_shipped(copied_manifest: dict[str, Any]) -> None:
    assert "trust" not in render_report(copied_manifest)
    copied_manifest["output"]["files"]["modeling_x.py"] = {"bytes": 1, "sha256": None}
    words = Page(render_report(copied_manifest)).words
    assert "trust_remote_code=True" in words and "--trust-remote-code" in words


def test_without_an_evaluation_it_says_how_to_get_one(copied_manifest: dict[str, Any]) -> None:
    copied_manifest["inputs"]["org/base-model"]["model"] = "/my models/base"
    words = Page(render_report(copied_manifest)).words
    assert "surgery eval path/to/this/folder '/my models/base' /models/org/donor --tasks" in words


@pytest.mark.parametrize("emptied", ["fields", "document"])
def test_missing_and_empty_fields_are_left_out(any_manifest: dict[str, Any], emptied: str) -> None:
    if emptied == "document":
        assert "checkpoint" in Page(render_report({})).words
        return
    for key, value in any_manifest.items():
        Page(render_report({**any_manifest, key: type(value)() if value is not None else None}))
        Page(render_report({name: found for name, found in any_manifest.items() if name != key}))


def test_imports_no_torch_and_no_matplotlib(copied_manifest: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(copied_manifest))
    code = (
        "import json, sys; from surgery.report.html import render_report; "
        f"render_report(json.load(open({str(path)!r}))); "
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_is_the_same_page_every_time(any_manifest: dict[str, Any]) -> None:
    assert render_report(any_manifest) == render_report(json.loads(json.dumps(any_manifest)))
