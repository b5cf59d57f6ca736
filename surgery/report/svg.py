"""SVG as text: elements with everything escaped, and the colours and round numbers that figures share.

Elements are `Markup`: text put into them is escaped once, and a template doesn't escape them again.
Colours of text and lines come from the page's CSS (classes `ink`, `soft`, `rule`), so that figures follow
dark mode and print; colours that carry data are fixed.
"""

from __future__ import annotations

from math import floor, log10

from markupsafe import Markup, escape

RAMP = ("#38245c", "#3d3f85", "#33619a", "#2a80a0", "#2a9d9a", "#45b98a", "#86d06f", "#cbdf6a", "#fdf0a3")
"""Dark indigo to pale yellow through blue and green: lightness rises evenly, so the order survives
colour blindness and grey print."""

CATEGORIES = ("#4477aa", "#ee8866", "#44aa99", "#ddaa33", "#aa4499", "#88ccee", "#999933", "#bbbbbb")
"""Told apart with any common colour blindness; taken in order, round and round."""


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """`class_` becomes class, `text_anchor` text-anchor; attributes that are None are left out. Children
    that are no Markup are escaped."""
    written = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), number(value))
        for name, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(escape(child) for child in children)
    name = Markup(escape(tag))
    if not children:
        return Markup("<{}{}/>").format(name, written)
    return Markup("<{}{}>{}</{}>").format(name, written, inner, name)


def number(value: object) -> str:
    """Coordinates with two decimals at most; anything else as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def figure(width: float, height: float, label: str, *children: str, least_width: float = 0) -> Markup:
    """An <svg> as wide as the page allows up to `width`; below `least_width` its box scrolls instead.
    `label` is what a screen reader says."""
    drawing = element(
        "svg", element("title", label), *children,
        viewBox=f"0 0 {number(float(width))} {number(float(height))}", role="img", aria_label=label,
        style=f"max-width:{number(float(width))}px;min-width:{number(float(least_width))}px",
    )  # fmt: skip
    return element("div", drawing, class_="figure")


def text(x: float, y: float, content: str, anchor: str = "start", **attributes: object) -> Markup:
    """Text with its baseline at y."""
    attributes.setdefault("class_", "ink")
    return element("text", content, x=float(x), y=float(y), text_anchor=anchor, **attributes)


def rect(x: float, y: float, width: float, height: float, *children: str, **attributes: object) -> Markup:
    return element(
        "rect", *children, x=float(x), y=float(y),
        width=float(max(width, 0)), height=float(max(height, 0)), **attributes,
    )  # fmt: skip


def line(x1: float, y1: float, x2: float, y2: float, class_: str = "rule") -> Markup:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def round_up(value: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `value`."""
    power = 10.0 ** floor(log10(value))
    return next(each * power for each in (1, 2, 5, 10) if each * power >= value * (1 - 1e-9))


def category(index: int) -> str:
    return CATEGORIES[index % len(CATEGORIES)]


def colour(position: float) -> str:
    """Of the ramp, for 0 to 1."""
    place = min(max(position, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    mixed = (
        round(a + (b - a) * (place - low))
        for a, b in zip(_channels(RAMP[low]), _channels(RAMP[low + 1]), strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def ink_on(fill: str) -> str:
    """Black or white, whichever reads better on a fill (WCAG relative luminance)."""
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in (value / 255 for value in _channels(fill))
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def _channels(fill: str) -> tuple[int, int, int]:
    return int(fill[1:3], 16), int(fill[3:5], 16), int(fill[5:7], 16)
