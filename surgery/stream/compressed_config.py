"""The quantization_config of compressed-tensors: which module is stored on which scheme.

A config has groups of targets: module names, patterns behind `re:`, or names of classes; the ignore list wins
over all of them. Names are matched before patterns and patterns before classes, as the library does. Files do
not say what class a module has: `Embedding` is taken to match modules that embed, any other class the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import CheckpointError

METHOD = "compressed-tensors"
EXPLICIT = "re:"
_CLASS = re.compile(r"[A-Z]\w*")


@dataclass(frozen=True)
class WeightScheme:
    """The weights of a group: `group_size` is 0 where a scale covers a whole row."""

    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, ...]
    form: str
    """The storage format that the group or the config names, `mixed-precision` where neither does."""


@dataclass(frozen=True)
class _Target:
    text: str
    pattern: re.Pattern[str] | None
    scheme: WeightScheme | None

    def names(self, module: str) -> bool:
        if self.pattern is not None:
            return self.pattern.match(module) is not None
        return self.text == module


class CompressedConfig:
    """A parsed quantization_config. Raises CheckpointError for what is none."""

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        self.version = _version(quantization.get("version"))
        groups = quantization.get("config_groups")
        if not isinstance(groups, Mapping):
            raise _wrong("has no config_groups")
        form = str(quantization.get("format") or "mixed-precision")
        targets = []
        for name, group in groups.items():
            if not isinstance(group, Mapping):
                raise _wrong(f"has {name}, which is no group of targets and weights")
            scheme = _scheme(name, group, form)
            targets += [_target(text, scheme) for text in _texts(group.get("targets"), f"{name}.targets")]
        self._ignored = [_target(text, None) for text in _texts(quantization.get("ignore") or [], "ignore")]
        self._named = [each for each in targets if each.pattern is None]
        self._patterns = [each for each in targets if each.pattern is not None]

    def scheme(self, module: str) -> WeightScheme | None:
        """What the weights of a module are stored on; None for those that stay as they are."""
        if self.ignores(module):
            return None
        for target in (*self._named, *self._patterns):
            if target.names(module):
                return target.scheme
        kind = "Embedding" if "embed" in module.rpartition(".")[2] else "Linear"
        for target in self._named:
            if _CLASS.fullmatch(target.text) and (target.text == "Embedding") == (kind == "Embedding"):
                return target.scheme
        return None

    def ignores(self, module: str) -> bool:
        """Whether the ignore list has a module."""
        return any(each.names(module) for each in self._ignored)


def _version(told: Any) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", str(told))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _texts(found: Any, place: str) -> Sequence[str]:
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise _wrong(f"has no list of names as {place}")
    return found


def _target(text: str, scheme: WeightScheme | None) -> _Target:
    if not text.startswith(EXPLICIT):
        return _Target(text, None, scheme)
    try:
        return _Target(text, re.compile(text.removeprefix(EXPLICIT)), scheme)
    except re.error as error:
        raise _wrong(f"has `{text}`, which is no regular expression: {error}") from error


def _scheme(name: str, group: Mapping[str, Any], form: str) -> WeightScheme | None:
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise _wrong(f"has {name}.weights, which says nothing about weights")
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    size = -1 if size is None and weights.get("strategy") == "channel" else size
    if not isinstance(bits, int) or not (size is None or isinstance(size, int)):
        raise _wrong(f"has {name}.weights with num_bits {bits!r} and group_size {size!r}")
    inferred = "tensor" if size is None else "group" if size > 0 else "channel"
    return WeightScheme(
        bits=bits,
        floating=str(weights.get("type", "int")).lower() == "float",
        symmetric=bool(weights.get("symmetric", True)),
        strategy=str(weights.get("strategy") or inferred).lower(),
        group_size=max(size or 0, 0),
        block=_block(weights.get("block_structure")),
        form=str(group.get("format") or form),
    )


def _block(told: Any) -> tuple[int, ...]:
    """[128, 128], or `128x128` as old files have it."""
    sides = told.split("x") if isinstance(told, str) else told
    if not isinstance(sides, list) or not all(str(side).isdigit() for side in sides):
        return ()
    return tuple(int(side) for side in sides)


def _wrong(what: str) -> CheckpointError:
    return CheckpointError(
        f"the quantization_config of {METHOD} {what}", hint="fetch config.json again, or mend it"
    )
