"""What a checkpoint is made of, in words: the first paragraph of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from surgery.report.svg import element
from surgery.stream.units import format_bytes

ALL_OF = {
    "routed_expert": "routed experts", "shared_expert": "shared experts", "router": "routers",
    "dense_mlp": "dense MLPs", "norm": "norms", "other": "other tensors",
}  # fmt: skip
"""How a whole role is called, where that is not its name."""
COPY = "copy of "
ROWS = "rows"
"""The origin of a router that keeps the rows of the experts that stay."""


@dataclass
class Share:
    """What has one origin, a parent or an operator, whatever the reason: tensors and bytes by role."""

    origin: str
    tensors: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def copied_from(self) -> str | None:
        """The parent that the bytes are copied from; None where they were computed."""
        return self.origin.removeprefix(COPY) if self.origin.startswith(COPY) else None

    @property
    def count(self) -> int:
        return sum(self.tensors.values())


def shares(coverage: Sequence[Mapping[str, Any]], parents: Sequence[str]) -> list[Share]:
    """By origin. The reason that stands behind a copy in brackets is no origin of its own."""
    found: dict[str, Share] = {}
    for row in coverage:
        action = str(row["action"])
        # A label may have brackets of its own, so the parents' names decide where the reason begins.
        donors = [p for p in parents if action == COPY + p or action.startswith(f"{COPY}{p} (")]
        donor = max(donors, key=len, default=None)
        origin = action if donor is None else COPY + donor
        share = found.setdefault(origin, Share(origin))
        role = str(row["role"])
        share.tensors[role] = share.tensors.get(role, 0) + int(row["tensors"])
        share.nbytes += int(row["bytes"])
    return list(found.values())


def base_of(manifest: Mapping[str, Any]) -> str | None:
    """The label of the base, where all steps that have one agree on it."""
    found = set()
    for step in manifest.get("steps") or ():
        if step.get("base") is not None:
            found.add(str((step.get("parents") or {}).get(step["base"], step["base"])))
    return found.pop() if len(found) == 1 else None


def summarise(manifest: Mapping[str, Any]) -> Markup:
    """A few sentences: which roles come from where, in tensors and bytes."""
    found = shares(manifest.get("coverage") or (), [str(label) for label in manifest.get("inputs") or {}])
    if not found:
        return Markup("The manifest says nothing of the tensors.")
    sentences: list[str]
    if len(found) == 1:
        sentences = [_all_of(found[0], manifest)]
    else:
        copied = all(share.copied_from is not None for share in found)
        how = "Every tensor is a copy of a parent's bytes." if copied else "The rest is copied byte for byte."
        sentences = [
            _composition(found, manifest),
            _amounts(found, base_of(manifest) or _only(manifest)),
            how,
        ]
    dropped = len(manifest.get("dropped") or {})
    if dropped:
        whose = "parent's" if _only(manifest) else "parents'"
        sentences.append(f"{dropped:,} of the {whose} tensors {'is' if dropped == 1 else 'are'} left out.")
    return Markup(" ").join(sentences)


def _only(manifest: Mapping[str, Any]) -> str | None:
    """The parent, where there is one: what is copied from it is no news."""
    labels = [str(label) for label in manifest.get("inputs") or {}]
    return labels[0] if len(labels) == 1 else None


def pruned_to(manifest: Mapping[str, Any]) -> str | None:
    """How many experts the last step that dropped some left of how many; None without such a step."""
    rows = [row for row in manifest.get("measurements") or () if row.get("kind") == "experts"]
    return f"{rows[-1]['kept']} of {rows[0]['experts']} experts" if rows else None


def _all_of(share: Share, manifest: Mapping[str, Any]) -> Markup:
    how = "are" if share.copied_from is None else "are byte for byte those"
    origin = _origin(share, _sources(manifest))
    return Markup("All {:,} tensors ({}) {} {}.").format(share.count, format_bytes(share.nbytes), how, origin)


def _composition(found: Sequence[Share], manifest: Mapping[str, Any]) -> Markup:
    """Which roles come from where; the share with the most roles is "everything else"."""
    base, sources = base_of(manifest) or _only(manifest), _sources(manifest)
    of_role: dict[str, int] = {}
    for share in found:
        for role, count in share.tensors.items():
            of_role[role] = of_role.get(role, 0) + count
    rest = max(found, key=lambda share: (len(share.tensors), share.copied_from == base, share.nbytes))
    parts = [
        Markup("{} {}").format(_roles(share, of_role), _origin(share, sources))
        for share in found
        if share is not rest
    ]
    parts.append(Markup("everything else {}").format(_origin(rest, sources)))
    text = _listed(parts, ", and " if len(parts) > 2 else "; ")
    return text[:1].upper() + text[1:] + "."


def _amounts(found: Sequence[Share], base: str | None) -> Markup:
    """How much comes from elsewhere than the base."""
    tensors, nbytes = sum(share.count for share in found), sum(share.nbytes for share in found)
    amounts = []
    for share in found:
        if share.copied_from is None or share.copied_from != base:
            size = f"{format_bytes(share.nbytes)} of {format_bytes(nbytes)}"
            how = Markup("are cut to some rows" if share.origin == ROWS else "are computed")
            if share.copied_from is not None:
                how = Markup("come from {}").format(element("code", share.copied_from))
            amounts.append(
                Markup("{:,} of {:,} tensors, {} ({}), {}").format(
                    share.count, tensors, size, percent(share.nbytes, nbytes), how
                )
            )
    return Markup("; ").join(amounts) + "."


def percent(part: float, whole: float) -> str:
    """A share, where a little is not nothing and nearly all is not all."""
    share = part / whole if whole else 0.0
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < share < 1 else f"{share:.1%}"


def _sources(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """By operator: the parents whose tensors it computes with."""
    found: dict[str, dict[str, None]] = {}
    for lineage in manifest.get("lineage") or ():
        for each in lineage.get("inputs") or ():
            if "op" in lineage and "copy" in each:
                found.setdefault(str(lineage["op"]), {})[str(each["copy"])] = None
    return {op: list(labels) for op, labels in found.items()}


def _roles(share: Share, of_role: Mapping[str, int]) -> Markup:
    names = [
        ALL_OF.get(role, role) if count == of_role[role]
        else f"{count:,} of {of_role[role]:,} {role.replace('_', ' ').replace('mlp', 'MLP')} tensors"
        for role, count in share.tensors.items()
    ]  # fmt: skip
    return _listed([Markup("{}").format(name) for name in names])


def _origin(share: Share, sources: Mapping[str, Sequence[str]]) -> Markup:
    if share.copied_from is not None:
        return Markup("of {}").format(element("code", share.copied_from))
    labels = [element("code", label) for label in sources.get(share.origin, ())]
    if share.origin == ROWS:
        return Markup("as rows of ") + (_listed(labels) or Markup("a parent's"))
    written = Markup("computed by {}").format(element("code", share.origin))
    return written + " from " + _listed(labels) if labels else written


def _listed(parts: Sequence[Markup], conjunction: str = " and ") -> Markup:
    if len(parts) < 2:
        return Markup("").join(parts)
    return Markup(", ").join(parts[:-1]) + conjunction + parts[-1]
