"""Selecting tensors: by role, by pattern, by layer range; the first entry that matches wins.

routed_expert        a role (see `surgery.stream.roles.ROLES`)
mtp                  the tensors of the multi-token-prediction layer
all                  every tensor
layers:3-30          decoder layers 3 to 30, both included
re:PATTERN           a regular expression found anywhere in the logical name
not:ENTRY            every tensor that one of these does not take
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from surgery.stream.checkpoint import TensorRef
from surgery.stream.roles import ROLES

Matcher = Callable[[TensorRef], bool]
WORDS = (*ROLES, "mtp", "all")
_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


def check_entry(text: str) -> str:
    """`text` if it is a valid entry; ValueError with a suggestion otherwise."""
    matcher(text)
    return text


def matcher(entry: str) -> Matcher:
    """The test that one entry stands for. Raises ValueError for what is no entry."""
    if entry.startswith("not:"):
        taken = matcher(entry[4:])
        return lambda ref: not taken(ref)
    if entry.startswith("re:"):
        return pattern_matcher(entry[3:])
    if entry.startswith("layers:"):
        return layers_matcher(entry[7:])
    if entry == "all":
        return lambda ref: True
    if entry == "mtp":
        return lambda ref: ref.info.mtp
    if entry in ROLES:
        return lambda ref: ref.info.role == entry
    close = difflib.get_close_matches(entry, WORDS, 1)
    known = (
        f"did you mean `{close[0]}`?"
        if close
        else f"known: {', '.join(WORDS)}, layers:A-B, re:PATTERN, not:ENTRY"
    )
    raise ValueError(f"`{entry}` is no role or selector; {known}")


def pattern_matcher(pattern: str) -> Matcher:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ValueError(f"`{pattern}` is no regular expression: {error}") from error
    return lambda ref: compiled.search(ref.name) is not None


def layers_matcher(text: str) -> Matcher:
    """`A-B` (both included) or a single layer."""
    found = _RANGE.match(text.strip())
    if not found:
        raise ValueError(f"`{text}` is no layer range; write it as 3-30, or 3")
    first, last = int(found[1]), int(found[2] or found[1])
    if first > last:
        raise ValueError(f"the layer range {text} is empty")
    return lambda ref: ref.info.layer is not None and first <= ref.info.layer <= last
