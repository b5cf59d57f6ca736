"""Matrices that were solved (sparsified, quantized): how far they are from what they were, layer by layer.

Made from the manifest's measurements of kind `matrices`, whose rows are one matrix each: the relative error
‖(W − W')X‖ / ‖WX‖ on the calibration data, the same for plain rounding or cutting, zeros, tokens, damping,
fallback, and where inputs are scaled the ratio of AWQ. The figure has the root mean square error of each
projection by layer: the layers that suffer most stand out (sensitivity).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from markupsafe import Markup

from surgery.report.svg import category, element, figure, line, round_up, text

KIND = "matrices"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 1000.0, 300.0, 64.0, 20.0, 12.0, 36.0
WORST = 12
"""Matrices that are named."""
Row = Mapping[str, Any]


def matrix_tables(manifest: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """(operator, its matrices) of each step that solved some."""
    return [
        (str(table["op"]), [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]])
        for table in manifest.get("measurements") or ()
        if table.get("kind") == KIND and table.get("rows")
    ]


def in_words(op: str, rows: Sequence[Row]) -> list[str]:
    """Sentences on a step: how many matrices, how far off, and what fell back."""
    forms = sorted({str(row["form"]) for row in rows})
    found = [
        f"{op}: {len(rows):,} matrices as {', '.join(forms)}; relative error of their outputs "
        f"{rms(rows, 'error'):.3g}, {rms(rows, 'error_plain'):.3g} without making up for it."
    ]
    zeros = sum(float(row["zeros"]) for row in rows) / len(rows)
    if op.startswith("sparsify."):
        found.append(f"{zeros:.1%} of their weights are zero.")
    if "ratio" in rows[0]:
        found.append(_scaled(rows))
    fallen = sum(row["fallback"] is not None for row in rows)
    if fallen:
        found.append(f"{fallen:,} were treated without their inputs; the events say why.")
    return found


def _scaled(rows: Sequence[Row]) -> str:
    """How many matrices have scaled inputs, and why others have none."""
    scaled = sum(row["ratio"] is not None for row in rows)
    reasons = Counter(str(row["unscaled"]) for row in rows if row["unscaled"] is not None)
    apart = "".join(f"; {count:,} could not be: {reason}" for reason, count in reasons.most_common())
    return f"The inputs of {scaled:,} are scaled{apart}."


def rms(rows: Sequence[Row], key: str) -> float:
    """Root mean square of a column."""
    return sqrt(sum(float(row[key]) ** 2 for row in rows) / len(rows))


def by_place(rows: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
    """Rows by projection, then by layer; experts together."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        place = _LAYER.search(str(row["tensor"]))
        if place:
            projection = _EXPERT.sub(".experts.", place[2])
            found.setdefault(projection, {}).setdefault(int(place[1]), []).append(row)
    return found


def matrix_sections(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each step: sentences, the figure, the worst matrices and the numbers by projection."""
    sections = []
    for op, rows in matrix_tables(manifest):
        places = by_place(rows)
        worst = sorted(rows, key=lambda row: -float(row["error"]))[:WORST]
        sections.append({
            "op": op,
            "words": in_words(op, rows),
            "figure": sensitivity(places),
            "key": [(name, category(index)) for index, name in enumerate(places)],
            "worst": [
                (row["tensor"], f"{row['error']:.3g}", f"{row['error_plain']:.3g}", f"{row['tokens']:,}",
                 "" if row["damping"] is None else f"{row['damping']:g}", row["fallback"] or "")
                for row in worst
            ],
            "places": [
                (name, str(sum(map(len, layers.values()))), *_range(layers, "error"),
                 f"{rms([row for each in layers.values() for row in each], 'error_plain'):.3g}")
                for name, layers in places.items()
            ],
        })  # fmt: skip
    return sections


def sensitivity(places: Mapping[str, Mapping[int, Sequence[Row]]]) -> Markup:
    """Lines over the layers, one for each projection."""
    curves = {
        name: [(layer, rms(rows, "error")) for layer, rows in sorted(layers.items())]
        for name, layers in places.items()
    }
    return layer_curves(curves, "relative error of each projection's output, by layer")


def layer_curves(curves: Mapping[str, Sequence[tuple[int, float]]], label: str) -> Markup:
    """Lines over the layers from (layer, value) by name; values are 0 or more."""
    points = [point for each in curves.values() for point in each]
    if not points:
        return Markup("")
    last = max(max(layer for layer, _ in points), 1)
    top = round_up(max(value for _, value in points) or 1.0)
    bottom = _HEIGHT - _BOTTOM

    def at(layer: int, value: float) -> tuple[float, float]:
        return (
            _LEFT + (_WIDTH - _LEFT - _RIGHT) * layer / last,
            bottom - (bottom - _TOP) * value / top,
        )

    drawn: list[Markup] = []
    for share in (0.0, 0.5, 1.0):
        _, y = at(0, share * top)
        drawn += [line(_LEFT, y, _WIDTH - _RIGHT, y), text(_LEFT - 8, y + 4, f"{share * top:g}", "end")]
    for layer in sorted({0, last // 2, last}):
        drawn.append(text(at(layer, 0)[0], _HEIGHT - 14, f"layer {layer}", "middle", class_="soft"))
    for index, (name, curve) in enumerate(curves.items()):
        places_on = [at(*point) for point in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places_on)
        drawn.append(element("polyline", points=path, fill="none", stroke=category(index), stroke_width=2))
        for (layer, value), (x, y) in zip(curve, places_on, strict=True):
            tip = element("title", f"{name}, layer {layer}: {value:.3g}")
            drawn.append(element("circle", tip, cx=x, cy=y, r=3.0, fill=category(index)))
    return figure(_WIDTH, _HEIGHT, label, *drawn, least_width=640)


def _range(layers: Mapping[int, Sequence[Row]], key: str) -> tuple[str, str]:
    """(over all layers, the worst layer with its number)."""
    errors = {layer: rms(rows, key) for layer, rows in layers.items()}
    worst = max(errors, key=lambda layer: errors[layer])
    whole = rms([row for rows in layers.values() for row in rows], key)
    return f"{whole:.3g}", f"{errors[worst]:.3g} in layer {worst}"
