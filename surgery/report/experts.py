"""Experts that were dropped: a map of layers and experts, their load before and after, overlap of domains.

Made from the manifest's measurements of kind `experts`. Scores are shown between the worst and the best of
their layer, so that layers compare and criteria whose scores lie close together (AIMER) still tell experts
apart; dropped experts are thin, so that colour alone does not tell. Which end is the best, and what a
criterion was calibrated on where it read statistics instead of walking, the step of the manifest says.
Cells of one shade are one path: a model of 58 layers with 256 experts stays a few hundred kilobytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
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
    return [_section(row, _step_of(row, manifest)) for row in rows if row.get("layers")]


def _step_of(row: Row, manifest: Mapping[str, Any]) -> Row:
    """The step that a row was measured in: of the same operator and with the same decision."""
    kept = {str(layer["layer"]): list(layer["kept"]) for layer in row["layers"]}
    for step in manifest.get("steps") or ():
        decided = (step.get("decision") or {}).get("layers") or {}
        if step.get("op") == row.get("op") and {key: list(each) for key, each in decided.items()} == kept:
            found: Row = step
            return found
    return {}


def _section(row: Row, step: Row) -> dict[str, Any]:
    layers: Sequence[Row] = row["layers"]
    low = step.get("important") == "low"
    return {
        "op": row.get("op"),
        "words": in_words(row, step),
        "figure": expert_map(layers, int(row["experts"]), low=low),
        "low": low,
        "loads": load_rows(row) if any(layer.get("load") for layer in layers) else [],
        "overlap": [
            (" and ".join(each["domains"]), percent(each["share"], 1)) for each in row.get("overlap") or ()
        ],
        "values": value_rows(layers),
    }


def in_words(row: Row, step: Row | None = None) -> list[str]:
    """What was kept, what it carried and what it was chosen by."""
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
            were = "expert was" if idle == 1 else "experts were"
            sentences.append(f"{idle} {were} never chosen on the calibration data.")
    read = ((step or {}).get("decision") or {}).get("provenance") or {}
    calibration = (row.get("walk") or read).get("calibration")
    if calibration:
        domains = ", ".join(f"{name} ({count})" for name, count in calibration["domains"].items())
        sentences.append(
            f"Calibrated on {calibration['sequences']} sequences of {domains}: "
            f"{calibration['tokens']:,} tokens."
        )
    return sentences


def value_rows(layers: Sequence[Row]) -> list[tuple[str, str, str]]:
    """By layer: the kept experts and the dropped ones, each with its score."""
    found: list[tuple[str, str, str]] = []
    for layer in layers:
        kept, scores = {*layer["kept"]}, layer["scores"]
        parts = (layer["kept"], [expert for expert in range(len(scores)) if expert not in kept])
        stay, go = (", ".join(f"{expert}: {scores[expert]:.4g}" for expert in part) for part in parts)
        found.append((str(layer["layer"]), stay, go))
    return found


def expert_map(layers: Sequence[Row], count: int, *, low: bool = False) -> Markup:
    """Layers down, experts across; shade by score in the layer, dropped ones thin. `low`: low scores are
    the good ones."""
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
        worst, best = (max(scores), min(scores)) if low else (min(scores), max(scores))
        kept = {*layer["kept"]}
        for expert, score in enumerate(scores):
            share = (score - worst) / (best - worst) if best != worst else 0.0
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
    drawn.append(text(60, 17, "worst", "end", class_="soft"))
    drawn.append(text(64 + 8 * SHADES + 4, 17, "best of the layer", class_="soft"))
    drawn.append(element("path", d=f"M420 6h12v12h-12zM480 {18 - 12 * THIN:g}h12v{12 * THIN:g}h-12z",
                         fill=colour(0.4)))  # fmt: skip
    drawn.append(text(438, 17, "kept", class_="soft"))
    drawn.append(text(498, 17, "dropped", class_="soft"))
    return figure(560, 24, "shades of the map of experts", *drawn)


def load_rows(row: Row) -> list[tuple[str, ...]]:
    """By layer: share of choices that went to kept experts; the fullest expert over the mean, before and
    after; the coefficient of variation, before and after; RMS of the hidden states behind the layer, and
    how far it moves them."""
    walked = {each["layer"]: each for each in (row.get("walk") or {}).get("layers", ())}
    found: list[tuple[str, ...]] = []
    for layer in row["layers"]:
        load, after = layer.get("load"), layer.get("load_after")
        passage = walked.get(layer["layer"], {})
        found.append((
            str(layer["layer"]),
            percent(sum(load[expert] for expert in layer["kept"]), sum(load)) if load and sum(load) else "–",
            _peak(load), _peak(after), _variation(load), _variation(after),
            *(f"{passage[key]:.3g}" if key in passage else "–" for key in ("rms", "change")),
        ))  # fmt: skip
    return found


def _peak(load: Sequence[float] | None) -> str:
    """The fullest expert's load over the mean."""
    return f"{max(load) * len(load) / sum(load):.2f}" if load and sum(load) else "–"


def _variation(load: Sequence[float] | None) -> str:
    """Standard deviation of the experts' loads over their mean."""
    if not load or not sum(load):
        return "–"
    mean = sum(load) / len(load)
    return f"{sqrt(sum((each - mean) ** 2 for each in load) / len(load)) / mean:.2f}"
