"""Parent distances of a manifest, summed up by role for terminals and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

from surgery.report.distances import Cell, distance_maps


def distance_rows(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per parent and role: the RMS distance over its layers, the range of relative distances,
    and on how much of the weights they were measured."""
    rows: list[dict[str, Any]] = []
    for each in distance_maps(manifest):
        by_role: dict[str, list[Cell]] = {}
        for (_, role, _), cell in each.cells.items():
            by_role.setdefault(role, []).append(cell)
        rows.extend(_row(each.parent, role, cells) for role, cells in sorted(by_role.items()))
    return rows


def _row(parent: str, role: str, cells: list[Cell]) -> dict[str, Any]:
    known = [cell for cell in cells if cell.rms is not None]
    sizes = [cell.weights or cell.tensors for cell in known]
    squares = sum((cell.rms or 0.0) ** 2 * size for cell, size in zip(known, sizes, strict=True))
    relative = [end for cell in known if cell.relative for end in cell.relative]
    sampled = [(cell.read or 0, cell.weights or 0) for cell in known if cell.sampled]
    read, of = sum(pair[0] for pair in sampled), sum(pair[1] for pair in sampled)
    return {
        "parent": parent,
        "role": role,
        "rms": sqrt(squares / sum(sizes)) if known else None,
        "relative": [min(relative), max(relative)] if relative else None,
        "measured": (f"sampled, {read / of:.1%} of the weights" if of else "exact") if known else "no",
    }
