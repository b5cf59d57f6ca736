"""The first paragraph: what is where from, in words."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest

from surgery.report.summary import base_of, percent, shares, summarise


def words(manifest: dict[str, Any]) -> str:
    return unescape(re.sub(r"<[^>]+>", "`", str(summarise(manifest))))


def row(role: str, action: str, tensors: int = 1, nbytes: int = 1000, mtp: bool = False) -> dict[str, Any]:
    return {"role": role, "mtp": mtp, "action": action, "tensors": tensors, "bytes": nbytes}


def made(*coverage: dict[str, Any], parents: tuple[str, ...] = ("v3", "r1"), **other: Any) -> dict[str, Any]:
    steps = [{"op": "merge.aoe", "base": "v3", "parents": {label: label for label in parents}}]
    return {"inputs": {label: {} for label in parents}, "steps": steps, "coverage": list(coverage), **other}


def test_a_chimera() -> None:
    manifest = made(
        row("attention", "copy of v3", 42, 380_000),
        row("routed_expert", "copy of r1", 240, 3_930_000),
        row("norm", "copy of v3", 43, 2_520_000),
    )
    assert words(manifest) == (
        "Routed experts of `r1`; everything else of `v3`. 240 of 325 tensors, 3.93 MB of 6.83 MB (57.5%), "
        "come from `r1`. Every tensor is a copy of a parent's bytes."
    )


def test_a_merge_with_some_tensors_copied_for_a_reason() -> None:
    manifest = made(
        row("attention", "copy of v3 (parents are equal)", 10, 10),
        row("attention", "merge.aoe", 32, 990),
        row("router", "copy of v3 (parents are equal)", 5, 0),
        row("dense_mlp", "merge.aoe", 3, 1000),
        row("norm", "merge.aoe", 3, 1000),
        lineage=[{"op": "merge.aoe", "inputs": [{"copy": "v3"}, {"copy": "r1"}]}, {"copy": "v3"}],
    )
    assert words(manifest) == (
        "10 of 42 attention tensors and routers of `v3`; everything else computed by `merge.aoe` from `v3` "
        "and `r1`. 38 of 53 tensors, 2.99 kB of 3 kB (99.7%), are computed. The rest is copied byte for byte."
    )


def test_three_origins_and_tensors_left_out() -> None:
    manifest = made(
        row("routed_expert", "copy of r1", 2), row("shared_expert", "copy of r2", 2),
        row("head", "copy of v3"), row("norm", "copy of v3"), parents=("v3", "r1", "r2"),
        dropped={"a": "not in the base"},
    )  # fmt: skip
    assert words(manifest).startswith(
        "Routed experts of `r1`, shared experts of `r2`, and everything else of `v3`. "
        "2 of 6 tensors, 1 kB of 4 kB (25.0%), come from `r1`; 2 of 6 tensors, "
    )
    assert words(manifest).endswith("1 of the parents' tensors is left out.")


def test_one_origin() -> None:
    manifest = made(row("head", "copy of v3"), row("norm", "copy of v3"))
    assert words(manifest) == "All 2 tensors (2 kB) are byte for byte those of `v3`."
    assert words(made(row("head", "recode", 3))) == "All 3 tensors (1 kB) are computed by `recode`."
    assert words(made()) == "The manifest says nothing of the tensors."


def test_a_pruned_model() -> None:
    """The parent's copies are not counted as news, and a router's rows are not called computed."""
    manifest = made(
        row("routed_expert", "copy of v3", 336, 900), row("router", "rows", 14, 100), parents=("v3",),
        lineage=[{"op": "rows", "inputs": [{"copy": "v3"}]}], dropped={"a": "not kept", "b": "not kept"},
    )  # fmt: skip
    manifest["steps"] = [{"op": "experts.easy_ep", "parents": {"<previous>": "v3"}}]
    assert words(manifest) == (
        "Routers as rows of `v3`; everything else of `v3`. 14 of 350 tensors, 100 B of 1 kB (10.0%), "
        "are cut to some rows. The rest is copied byte for byte. 2 of the parent's tensors are left out."
    )


def test_a_label_with_brackets_is_no_reason() -> None:
    parents = ("v3", "v3 (old)")
    coverage = [
        row("head", "copy of v3 (old)"),
        row("norm", "copy of v3 (old) (parents are equal)"),
        row("router", "copy of v3 (parents are equal)"),
    ]
    assert [share.copied_from for share in shares(coverage, parents)] == ["v3 (old)", "v3"]


def test_the_base_is_named_only_where_steps_agree() -> None:
    manifest = made()
    assert base_of(manifest) == "v3"
    manifest["steps"].append({"op": "merge.aoe", "base": "r1"})
    assert base_of(manifest) is None
    assert base_of({}) is None


@pytest.mark.parametrize(
    ("part", "whole", "written"),
    [
        (0, 5, "0.0%"),
        (1, 5, "20.0%"),
        (1, 9999, "<0.1%"),
        (9998, 9999, ">99.9%"),
        (5, 5, "100.0%"),
        (0, 0, "0.0%"),
    ],
)
def test_percent(part: int, whole: int, written: str) -> None:
    assert percent(part, whole) == written
