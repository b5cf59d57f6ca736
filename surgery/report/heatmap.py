"""The heat map of parent distances: layers along x, roles along y, one picture per parent.

Embedding, final norm and head stand as tall cells before and after the layers. A value is written into
its cell where there is room, and is always in the cell's tooltip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from markupsafe import Markup

from surgery.report.distances import Cell, DistanceMap, Place
from surgery.report.svg import RAMP, colour, element, figure, ink_on, line, rect, round_up, text

ROLE_ORDER = (
    "attention", "router", "routed_expert", "shared_expert", "dense_mlp", "norm", "embedding", "head",
    "other",
)  # fmt: skip
AFTER_LAYERS = ("norm", "head")
LOG_ABOVE = 30
"""Greatest distance over the median from which the colours go by the logarithm."""

_WIDTH, _LABELS, _EDGE, _TOP = 1000.0, 104.0, 24.0, 8.0


def in_order(roles: Iterable[str]) -> list[str]:
    """Each role once, as in ROLE_ORDER; any other after those."""
    found = set(roles)
    return [role for role in ROLE_ORDER if role in found] + sorted(found.difference(ROLE_ORDER))


@dataclass(frozen=True)
class Scale:
    """From distances to colours: linear from 0, or logarithmic from `low`. `unit` is the power of ten
    that written values are divided by."""

    low: float
    high: float
    logarithmic: bool
    exponent: int

    def position(self, value: float) -> float:
        """0 to 1 along the ramp."""
        if self.high <= 0 or value <= self.low:
            return 0.0
        if self.logarithmic:
            return log10(value / self.low) / log10(self.high / self.low)
        return value / self.high

    def written(self, value: float) -> str:
        """In units of 10^exponent, three digits or so."""
        scaled = value / 10.0**self.exponent
        return "0" if value == 0 else f"{scaled:#.3g}".removesuffix(".")

    @property
    def unit(self) -> str:
        raised = str(self.exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"×10{raised}" if self.exponent else ""

    def ticks(self) -> list[tuple[float, str]]:
        """Places along the ramp and what is written there, round numbers from end to end."""
        if self.high <= 0:
            return [(0.0, "0")]
        if self.logarithmic:
            values = [self.low]
            while values[-1] < self.high * 0.99:
                values.append(round_up(values[-1] * 1.01))
            values = values[:: 1 if len(values) <= 9 else 3]
        else:
            step = round_up(self.high / 4)
            values = [step * index for index in range(round(self.high / step) + 1)]
        return [(self.position(value), f"{value / 10.0**self.exponent:.3g}") for value in values]


def common_scale(maps: Iterable[DistanceMap]) -> Scale:
    """One scale for all parents, so that their pictures compare; it ends at round numbers."""
    values = sorted(cell.rms for each in maps for cell in each.cells.values() if cell.rms)
    if not values:
        return Scale(0.0, 0.0, False, 0)
    high, median = values[-1], values[len(values) // 2]
    logarithmic = high > LOG_ABOVE * median
    exponent = 3 * floor(log10(high) / 3)
    if logarithmic:
        return Scale(round_up(values[0] * 0.4), round_up(high), True, exponent)
    step = round_up(high / 4)
    return Scale(0.0, step * ceil(high / step - 1e-9), False, exponent)


def heat_map(distances: DistanceMap, scale: Scale) -> Markup:
    """The picture of one parent."""
    places = distances.places
    columns: list[tuple[bool, int | None]] = []
    columns.extend(sorted({(mtp, layer) for layer, _, mtp in places if layer is not None}))
    if any(layer is None and mtp for layer, _, mtp in places):
        columns.append((True, None))  # MTP tensors of a checkpoint that doesn't number its layers
    inside = in_order(role for layer, role, mtp in places if mtp or layer is not None)
    outside = in_order(role for layer, role, mtp in places if layer is None and not mtp)
    before = [role for role in outside if role not in AFTER_LAYERS]
    after = [role for role in outside if role in AFTER_LAYERS]
    edges = (len(before) + len(after)) * (_EDGE + 6)
    step = min((_WIDTH - _LABELS - edges) / max(len(columns), 1), 120.0)
    tall = 34.0 if step >= 40 else 24.0
    height = tall * max(len(inside), 4)
    drawn: list[Markup] = []
    x = _LABELS
    for role in before:
        drawn.append(_edge(distances, (None, role, False), x, height, scale))
        x += _EDGE + 6
    for row, role in enumerate(inside):
        drawn.append(text(_LABELS - 10, _TOP + tall * (row + 0.5) + 4, role, "end"))
        for index, (mtp, layer) in enumerate(columns):
            box = (x + step * index, _TOP + tall * row, step, tall)
            drawn.append(_grid_cell(distances, (layer, role, mtp), box, scale))
    drawn.extend(_layer_axis(columns, x, step, _TOP + height))
    x += step * len(columns) + 6
    for role in after:
        drawn.append(_edge(distances, (None, role, False), x, height, scale))
        x += _EDGE + 6
    label = f"RMS distance of {distances.parent} by layer and role"
    return figure(x, _TOP + height + 38, label, *drawn, least_width=min(x, 760))


def _grid_cell(
    distances: DistanceMap, place: Place, box: tuple[float, float, float, float], scale: Scale
) -> Markup:
    x, y, width, height = box
    cell = distances.cells.get(place)
    if cell is None and distances.present is not None and place not in distances.present:
        return rect(x + 0.5, y + 0.5, width - 1, height - 1, class_="absent")
    fill = _fill(cell, scale)
    shape = rect(
        x + 0.5, y + 0.5, width - 1, height - 1, element("title", describe(place, cell)),
        class_="cell", fill=fill, rx=1.5, data_rms=_exact(cell),
    )  # fmt: skip
    if cell is None or cell.rms is None or width < 40:
        return shape
    value = scale.written(cell.rms)
    written = text(x + width / 2, y + height / 2 + 4, value, "middle", class_="value", fill=ink_on(fill))
    return Markup("").join((shape, written))


def _edge(distances: DistanceMap, place: Place, x: float, height: float, scale: Scale) -> Markup:
    """A cell as tall as the picture, its name written upwards."""
    cell = distances.cells.get(place)
    fill = _fill(cell, scale)
    role = place[1]
    name = "final norm" if role == "norm" else role
    if cell is not None and cell.rms is not None:
        name = f"{name}  {scale.written(cell.rms)}"
    middle, centre = x + _EDGE / 2, _TOP + height / 2
    shape = rect(
        x, _TOP + 0.5, _EDGE, height - 1, element("title", describe(place, cell)),
        class_="cell", fill=fill, rx=1.5, data_rms=_exact(cell),
    )  # fmt: skip
    written = text(
        middle + 4, centre, name, "middle", transform=f"rotate(-90 {middle + 4:g} {centre:g})",
        class_="value" if fill.startswith("#") else "value ink",
        fill=ink_on(fill) if fill.startswith("#") else None,
    )  # fmt: skip
    return Markup("").join((shape, written))


def _layer_axis(
    columns: Sequence[tuple[bool, int | None]], x: float, step: float, bottom: float
) -> list[Markup]:
    every = next(gap for gap in (1, 2, 5, 10, 20, 50, 100, 10**9) if gap * step >= 30)
    layers = sum(not mtp for mtp, _ in columns)
    mtp_at = x + step * (layers + len(columns)) / 2
    drawn = []
    for index, (mtp, layer) in enumerate(columns):
        at = x + step * (index + 0.5)
        if not mtp and index % every == 0 and (layers == len(columns) or mtp_at - at > 28):
            drawn.append(text(at, bottom + 15, str(layer), "middle", class_="soft"))
    if layers:
        drawn.append(text(x + step * layers / 2, bottom + 33, "layer", "middle", class_="soft"))
    if layers < len(columns):
        left, right = x + step * layers, x + step * len(columns)
        drawn.append(line(left + 1, bottom + 4, right - 1, bottom + 4, class_="mark"))
        drawn.append(text(mtp_at, bottom + 17, "MTP", "middle", class_="ink"))
    return drawn


def _fill(cell: Cell | None, scale: Scale) -> str:
    if cell is None or cell.rms is None:
        return "url(#unmeasured)"
    return colour(scale.position(cell.rms))


def _exact(cell: Cell | None) -> str | None:
    return None if cell is None or cell.rms is None else repr(cell.rms)


def describe_place(place: Place) -> str:
    """Role and layer, in words."""
    layer, role, mtp = place
    where = f"layer {layer}" if layer is not None else "outside the layers"
    return f"{role}, {where}{' (MTP)' if mtp else ''}"


def describe(place: Place, cell: Cell | None) -> str:
    """The tooltip of a cell."""
    where = describe_place(place)
    if cell is None or cell.rms is None:
        return f"{where}\nnot measured"
    lines = [where, f"RMS {cell.rms:.4g}"]
    if cell.relative is not None:
        least, greatest = cell.relative
        spread = f"{least:.3g}" if least == greatest else f"{least:.3g} to {greatest:.3g} by tensor"
        lines.append(f"relative {spread}")
    lines.append(f"{cell.tensors:,} tensor{'s' if cell.tensors != 1 else ''}")
    if cell.sampled:
        lines.append(f"sampled: {cell.read:,} of {cell.weights:,} weights read")
    elif cell.weights is not None:
        lines.append(f"all {cell.weights:,} weights read")
    return "\n".join(lines)


def heat_legend(scale: Scale, unmeasured: bool) -> Markup:
    """The colour scale with numbers. Holds the patterns that the maps refer to, so it is always drawn."""
    stops = [
        element("stop", offset=f"{index / (len(RAMP) - 1):.2%}", stop_color=shade)
        for index, shade in enumerate(RAMP)
    ]
    hatch = element(
        "pattern", rect(0, 0, 6, 6, class_="blank"), element("path", d="M0 6L6 0", class_="hatch"),
        id="unmeasured", width=6, height=6, patternUnits="userSpaceOnUse",
    )  # fmt: skip
    drawn = [element("defs", element("linearGradient", *stops, id="ramp"), hatch)]
    left, wide = _LABELS, 340.0
    kind = "logarithmic" if scale.logarithmic else "linear"
    drawn.append(text(left, 13, f"RMS distance {scale.unit} ({kind} scale)".replace("  ", " "), class_="ink"))
    drawn.append(rect(left, 22, wide, 12, fill="url(#ramp)", rx=1.5))
    for position, written in scale.ticks():
        x = left + wide * position
        drawn.append(line(x, 34, x, 38))
        drawn.append(text(x, 51, written, "middle", class_="soft"))
    if unmeasured:
        drawn.append(rect(left + wide + 50, 20, 26, 16, fill="url(#unmeasured)", class_="cell", rx=1.5))
        drawn.append(text(left + wide + 84, 32, "not measured", class_="soft"))
    return figure(left + wide + 220, 56, "colour scale of the heat maps", *drawn, least_width=480)
