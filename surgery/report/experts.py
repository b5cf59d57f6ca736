"""Experts that were dropped: a map of layers and experts, their load before and after, overlap of domains.

Made from the manifest's measurements of kind `experts`. Scores are shown as shares of the best expert of
their layer, so that layers compare; dropped experts are thin, so that colour alone does not tell.
Cells of one shade are one path: a model of 58 layers with 256 experts stays a few hundred kilobytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from surgery.report.summary import percent
from surgery.report.svg import colour, element, figure, text

SHADES = 24
THIN = 0.25
"""Height of a dropped expert's cell."""
_LABELS, _TOP, _WIDTH = 64.0, 8.0, 1000.0
Row = Mapping[str, Any]


def expert_sections(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each step that dropped experts: figure, sentences and tables; none without them."""
    rows = [row for row in manifest.get("measurements") or () if row.get("kind") == "experts"]
    return [_section(row) for row in rows if row.get("layers")]


def _section(row: Row) -> dict[str, Any]:
    layers: Sequence[Row] = row["layers"]
    return {
        "op": row.get("op"),
        "words": in_words(row),
        "figure": expert_map(layers, int(row["experts"])),
        "loads": load_rows(row),
        "overlap": [
            (" and ".join(each["domains"]), percent(each["share"], 1)) for each in row.get("overlap") or ()
        ],
        "kept": [(layer["layer"], ", ".join(map(str, layer["kept"]))) for layer in layers],
    }


def in_words(row: Row) -> list[str]:
    """What was kept and what it carried."""
    layers: Sequence[Row] = row["layers"]
    groups = f", groups: {row['groups']}" if row.get("groups") else ""
    sentences = [f"{row['kept']} of {row['experts']} experts stay in each of {len(layers)} layers{groups}."]
    loads = [layer for layer in layers if layer.get("load")]
    total = sum(sum(layer["load"]) for layer in loads)
    if total:
        held = sum(layer["load"][expert] for layer in loads for expert in layer["kept"])
        idle = sum(count == 0 for layer in loads for count in layer["load"])
        sentences.append(
            f"They took {percent(held, total)} of the tokens' choices before the others were dropped."
        )
        if idle:
            sentences.append(f"{idle} experts were never chosen on the calibration data.")
    calibration = (row.get("walk") or {}).get("calibration")
    if calibration:
        domains = ", ".join(f"{name} ({count})" for name, count in calibration["domains"].items())
        sentences.append(
            f"Calibrated on {calibration['sequences']} sequences of {domains}: "
            f"{calibration['tokens']:,} tokens."
        )
    return sentences


def expert_map(layers: Sequence[Row], count: int) -> Markup:
    """Layers down, experts across; shade by score in the layer, dropped ones thin."""
    step = min((_WIDTH - _LABELS) / max(count, 1), 24.0)
    tall = max(7.0, min(step, 18.0))
    shades: dict[int, list[str]] = {}
    drawn: list[Markup] = []
    every = max(1, -(-len(layers) // 30))
    for number, layer in enumerate(layers):
        y = _TOP + tall * number
        if number % every == 0:
            drawn.append(text(_LABELS - 8, y + tall / 2 + 4, str(layer["layer"]), "end", class_="soft"))
        scores: Sequence[float] = layer["scores"]
        lowest, best = min([*scores, 0.0]), max(scores)
        kept = {*layer["kept"]}
        for expert, score in enumerate(scores):
            share = (score - lowest) / (best - lowest) if best > lowest else 0.0
            x = _LABELS + step * expert
            high = (tall - 0.4) * (1 if expert in kept else THIN)
            shades.setdefault(round(share * (SHADES - 1)), []).append(
                f"M{x:.4g} {y + tall - 0.4 - high:.4g}h{step - 0.4:.3g}v{high:.3g}h-{step - 0.4:.3g}z"
            )
    cells = [
        element("path", d="".join(paths), fill=colour(shade / (SHADES - 1)), data_shade=shade)
        for shade, paths in sorted(shades.items())
    ]
    bottom = _TOP + tall * len(layers)
    between = next(gap for gap in (1, 2, 4, 8, 16, 32, 64, 128, 1 << 30) if gap * step >= 24)
    for expert in range(0, count, between):
        drawn.append(text(_LABELS + step * (expert + 0.5), bottom + 16, str(expert), "middle", class_="soft"))
    width = _LABELS + step * count
    drawn.append(text(_LABELS + step * count / 2, bottom + 34, "expert", "middle", class_="soft"))
    drawn.append(text(14, _TOP + tall * len(layers) / 2, "layer", "middle", class_="soft",
                      transform=f"rotate(-90 14 {_TOP + tall * len(layers) / 2:g})"))  # fmt: skip
    label = "scores of experts by layer, dropped ones thin"
    return figure(width + 4, bottom + 40, label, *cells, *drawn, least_width=min(width, 700))


def map_key() -> Markup:
    """What shades and heights mean."""
    drawn = []
    for shade in range(SHADES):
        path = f"M{64 + 8 * shade} 6h8v12h-8z"
        drawn.append(element("path", d=path, fill=colour(shade / (SHADES - 1))))
    drawn.append(text(60, 17, "0", "end", class_="soft"))
    drawn.append(text(64 + 8 * SHADES + 4, 17, "best of the layer", class_="soft"))
    drawn.append(element("path", d=f"M420 6h12v12h-12zM480 {18 - 12 * THIN:g}h12v{12 * THIN:g}h-12z",
                         fill=colour(0.4)))  # fmt: skip
    drawn.append(text(438, 17, "kept", class_="soft"))
    drawn.append(text(498, 17, "dropped", class_="soft"))
    return figure(560, 24, "shades of the map of experts", *drawn)


def load_rows(row: Row) -> list[tuple[str, ...]]:
    """By layer: share of choices that went to kept experts, the fullest expert over the mean before and
    after, and how far the layer moves the hidden states."""
    walked = {each["layer"]: each for each in (row.get("walk") or {}).get("layers", ())}
    found: list[tuple[str, ...]] = []
    for layer in row["layers"]:
        load, after = layer.get("load"), layer.get("load_after")
        passage = walked.get(layer["layer"], {})
        found.append((
            str(layer["layer"]),
            percent(sum(load[expert] for expert in layer["kept"]), sum(load)) if load and sum(load) else "–",
            _peak(load), _peak(after), f"{passage['change']:.3f}" if "change" in passage else "–",
        ))  # fmt: skip
    return found


def _peak(load: Sequence[float] | None) -> str:
    """The fullest expert's load over the mean."""
    return f"{max(load) * len(load) / sum(load):.2f}" if load and sum(load) else "–"
