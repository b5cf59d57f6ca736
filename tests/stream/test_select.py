"""Selectors: `not:` is the complement of whatever stands behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.stream.select import check_entry, matcher
from surgery.stream.source import open_checkpoint


@pytest.mark.parametrize(
    "entry", ["routed_expert", "mtp", "layers:1-2", r"re:\.experts\.[0-3]\.", "not:norm"]
)
def test_not_takes_what_the_entry_leaves(parents: dict[str, Path], entry: str) -> None:
    refs = list(open_checkpoint(parents["base"], "base").tensors.values())
    taken = {ref.name for ref in refs if matcher(entry)(ref)}
    others = {ref.name for ref in refs if matcher(f"not:{entry}")(ref)}
    assert taken and others
    assert not taken & others and taken | others == {ref.name for ref in refs}


@pytest.mark.parametrize("entry", ["not:", "not:routed", "not:layers:3-1", "not:re:(", "not:not:"])
def test_not_of_nothing_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=r"no role|empty|no regular"):
        check_entry(entry)
