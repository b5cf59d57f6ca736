"""Parent distances and task vectors of a manifest by role, for terminals, pages and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

from surgery.report.distances import Cell, distance_maps
from surgery.stream.task_vectors import KIND


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


def norm_rows(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that a manifest has of task vectors, one per source and role, `all` first."""
    return [dict(row) for row in manifest.get("measurements") or () if row.get("kind") == KIND]


def cosines_in_words(row: Mapping[str, Any]) -> str:
    """`0.123 with b, …` of one of these rows; empty where no other source was measured."""
    known = {other: value for other, value in row["cosine"].items() if value is not None}
    return ", ".join(f"{value:.3f} with {other}" for other, value in known.items())


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
