"""Parent distances of a manifest, summed up by layer and role for the heat map.

A manifest has them in two forms: exact, per tensor, in `metrics`; and sampled, per layer and role, in
`measurements`. A cell takes what there is of both,

    rms = √(Σ rms_i² · n_i / Σ n_i)        n_i: weights behind entry i

and says how many weights were read. Where an entry doesn't say how many weights it stands for, every
tensor of the cell counts the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

from surgery.stream.roles import Architecture, architecture_for

Place = tuple[int | None, str, bool]
"""Layer (None outside the layers), role, and whether it belongs to an MTP layer."""


@dataclass(frozen=True)
class Entry:
    """One measured distance; `read` of `weights` weights were looked at, None where not recorded."""

    rms: float
    relative: float | None
    tensors: int
    weights: int | None
    read: int | None


@dataclass(frozen=True)
class Cell:
    """One layer and role. `rms` and `relative` (least, greatest) are None where nothing could be read, or
    what was read has NaN or infinity in it."""

    rms: float | None
    relative: tuple[float, float] | None
    tensors: int
    weights: int | None
    read: int | None

    @property
    def sampled(self) -> bool:
        """Whether some weights behind the value were not read."""
        return self.weights is not None and self.read is not None and self.read < self.weights


@dataclass(frozen=True)
class DistanceMap:
    """Distances of one parent from the base. `present` has every place that holds tensors, or is None
    where the manifest doesn't say what its tensors are."""

    parent: str
    cells: Mapping[Place, Cell]
    present: frozenset[Place] | None

    @property
    def places(self) -> frozenset[Place]:
        """Where tensors are known to be, measured or not."""
        return frozenset(self.cells) | (self.present or frozenset())

    def greatest(self) -> tuple[Place, Cell] | None:
        """The cell of the largest RMS distance."""
        measured = [item for item in self.cells.items() if item[1].rms is not None]
        return max(measured, key=lambda item: item[1].rms or 0.0, default=None)

    def read_of(self) -> tuple[int, int]:
        """Weights read, of all weights in cells that say so."""
        known = [(cell.read, cell.weights) for cell in self.cells.values()]
        pairs = [(read, weights) for read, weights in known if read is not None and weights is not None]
        return sum(read for read, _ in pairs), sum(weights for _, weights in pairs)


def distance_maps(manifest: Mapping[str, Any]) -> list[DistanceMap]:
    """One map per measured parent, in the order of the manifest."""
    architecture = _architecture(manifest)
    found: dict[str, dict[Place, list[Entry]]] = {}
    unread: dict[str, dict[Place, int]] = {}
    for row in manifest.get("measurements") or ():
        if row.get("kind") != "parent distance":
            continue
        place: Place = (row["layer"], str(row["role"]), bool(row["mtp"]))
        entry = _sampled(row)
        if entry is None:
            unread.setdefault(str(row["parent"]), {})[place] = int(row["tensors"])
        else:
            found.setdefault(str(row["parent"]), {}).setdefault(place, []).append(entry)
    if architecture is not None:
        for name, metrics in (manifest.get("metrics") or {}).items():
            info = architecture.info(name)
            for parent, distance in (metrics.get("distance") or {}).items():
                place = (info.layer, info.role, info.mtp)
                found.setdefault(parent, {}).setdefault(place, []).append(_exact(distance, metrics))
    present = _present(manifest, architecture)
    maps = []
    for parent in dict.fromkeys((*found, *unread)):
        cells = {place: _cell(entries) for place, entries in found.get(parent, {}).items()}
        for place, tensors in unread.get(parent, {}).items():
            cells.setdefault(place, Cell(None, None, tensors, None, None))
        maps.append(DistanceMap(parent, cells, present))
    return maps


def unplaced_distances(manifest: Mapping[str, Any]) -> int:
    """Tensors with exact distances that no map shows, because the manifest doesn't name its architecture."""
    if _architecture(manifest) is not None:
        return 0
    return sum(1 for metrics in (manifest.get("metrics") or {}).values() if metrics.get("distance"))


def _architecture(manifest: Mapping[str, Any]) -> Architecture | None:
    model = manifest.get("model")
    return architecture_for(model) if isinstance(model, Mapping) and model.get("model_type") else None


def _present(manifest: Mapping[str, Any], architecture: Architecture | None) -> frozenset[Place] | None:
    if architecture is None:
        return None
    infos = (architecture.info(name) for name in manifest.get("tensors") or ())
    return frozenset((info.layer, info.role, info.mtp) for info in infos)


def _sampled(row: Mapping[str, Any]) -> Entry | None:
    if row.get("rms") is None:
        return None
    return Entry(row["rms"], row.get("relative"), int(row["tensors"]), row["of_weights"], row["weights"])


def _exact(distance: Mapping[str, Any], metrics: Mapping[str, Any]) -> Entry:
    weights = metrics.get("weights")
    return Entry(distance["rms"], distance.get("relative"), 1, weights, weights)


def _cell(entries: list[Entry]) -> Cell:
    by_weights = all(entry.weights for entry in entries)
    counts = [(entry.weights if by_weights else None) or entry.tensors for entry in entries]
    rms = _pooled(entries, counts)
    relative = [entry.relative for entry in entries if entry.relative is not None and isfinite(rms)]
    return Cell(
        rms=rms if isfinite(rms) else None,
        relative=(min(relative), max(relative)) if relative else None,
        tensors=sum(entry.tensors for entry in entries),
        weights=_total(entry.weights for entry in entries),
        read=_total(entry.read for entry in entries),
    )


def _pooled(entries: list[Entry], counts: list[int]) -> float:
    if len(entries) == 1:
        return entries[0].rms  # the manifest's own figure, not its root of a square
    squares = sum(entry.rms**2 * count for entry, count in zip(entries, counts, strict=True))
    return sqrt(squares / sum(counts)) if sum(counts) else 0.0


def _total(counts: Iterable[int | None]) -> int | None:
    found = list(counts)
    known = [count for count in found if count is not None]
    return sum(known) if len(known) == len(found) else None
