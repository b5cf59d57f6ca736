"""The report of an output: one HTML page that needs nothing beside it, from the manifest alone.

It is written at the end of every run, so it imports neither torch nor a plotting library; figures are
inline SVG. Names of models, files and tensors are whatever users chose: everything is escaped.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from surgery.report.by_role import cosines_in_words, norm_rows
from surgery.report.comparison import read_evaluation
from surgery.report.distances import DistanceMap, distance_maps, unplaced_distances
from surgery.report.experts import expert_sections, map_key
from surgery.report.figures import Stack, comparison_chart, coverage_bars
from surgery.report.heatmap import common_scale, describe_place, heat_legend, heat_map, in_order
from surgery.report.matrices import matrix_sections
from surgery.report.ratios import ratio_sections
from surgery.report.summary import base_of, percent, pruned_to, summarise
from surgery.report.svg import category
from surgery.stream.units import format_bytes

TEMPLATE = "report.html.j2"
HERE = "path/to/this/folder"
"""A manifest doesn't say where its output lies, which may move."""

MANY_FILES = 12
"""From here on a list of files is folded away."""


def render_report(manifest: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> str:
    """A self-contained HTML page. `manifest` is a surgery_manifest.json; `evaluation` the JSON document of
    `surgery eval`, in which the child and its parents are rows. Fields that a manifest lacks are left out."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["size"] = format_bytes
    return environment.get_template(TEMPLATE).render(
        title=_title(manifest),
        methods=list(dict.fromkeys(str(step.get("op")) for step in manifest.get("steps") or ())),
        summary=summarise(manifest),
        facts=_facts(manifest),
        events=manifest.get("events") or (),
        dropped=manifest.get("dropped") or {},
        comparison=_comparison(manifest, evaluation),
        distance=_distance(manifest),
        task_vectors=_task_vectors(manifest),
        coverage=_coverage(manifest),
        experts=expert_sections(manifest),
        expert_key=map_key(),
        ratios=ratio_sections(manifest),
        matrices=matrix_sections(manifest),
        parents=_parents(manifest),
        files=(manifest.get("output") or {}).get("files") or {},
        many_files=MANY_FILES,
        here=HERE,
        particulars=_particulars(manifest),
        recipe=_recipe(manifest),
        loading=_loading(manifest),
        evaluate=_evaluate_command(manifest),
    )


def _inputs(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    return manifest.get("inputs") or {}


def _title(manifest: Mapping[str, Any]) -> str:
    """The parents, hub ids without their owners as long as that tells them apart, and what pruning left.
    One parent goes by the name of its model: its label says no more than "model" in one-step forms."""
    inputs = _inputs(manifest)
    parents = [str(label) for label in inputs]
    if len(parents) == 1:
        model = str((inputs[parents[0]] or {}).get("model") or parents[0])
        parents = [model.partition("@")[0]]
    short = [label.rstrip("/").rpartition("/")[2] or label for label in parents]
    title = " + ".join(short if len(set(short)) == len(parents) else parents) or "checkpoint"
    left = pruned_to(manifest)
    return f"{title}, {left}" if left else title


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The row of figures under the summary, as (figure, what it is)."""
    output, run = manifest.get("output") or {}, manifest.get("run") or {}
    events = len(manifest.get("events") or ())
    facts = []
    if "tensors" in output:
        facts.append((f"{output['tensors']:,}", "tensors"))
    if "bytes" in output:
        facts.append((format_bytes(output["bytes"]), "of weight files"))
    if "seconds" in run:
        facts.append((_seconds(run["seconds"]), "to write"))
    if "peak_rss_bytes" in run:
        facts.append((format_bytes(run["peak_rss_bytes"]), "peak memory"))
    facts.append((f"{events:,}" if events else "no", "event" if events == 1 else "events"))
    return facts


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _comparison(manifest: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    found = read_evaluation(evaluation, _inputs(manifest))
    if not found.columns:
        return None
    names, children = [row.name for row in found.rows], [row.is_child for row in found.rows]
    chart = comparison_chart(names, children, found.panels) if found.panels else None
    return {"found": found, "chart": chart}


def _distance(manifest: Mapping[str, Any]) -> dict[str, Any]:
    maps = distance_maps(manifest)
    scale = common_scale(maps)
    pictures = [
        {
            "parent": each.parent, "figure": heat_map(each, scale), "words": _in_words(each),
            "table": _values(each),
        }
        for each in maps
    ]  # fmt: skip
    gaps = any(
        each.present is None
        or any(place not in each.cells for place in each.present)
        or any(cell.rms is None for cell in each.cells.values())
        for each in maps
    )
    return {
        "base": base_of(manifest),
        "maps": pictures,
        "legend": heat_legend(scale, gaps) if maps else None,
        "unplaced": unplaced_distances(manifest),
    }


def _task_vectors(manifest: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """Rows of source, role, norm, RMS, weights and cosines."""
    return [
        (
            str(row["source"]), str(row["role"]), _figure(row["norm"]), _figure(row["rms"]),
            f"{row['weights']:,}", cosines_in_words(row),
        )
        for row in norm_rows(manifest)
    ]  # fmt: skip


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _in_words(distances: DistanceMap) -> str:
    """Where the parent is farthest from the base, and how much of it was looked at."""
    sentences = []
    greatest = distances.greatest()
    if greatest is not None:
        place, cell = greatest
        sentences.append(f"Farthest: {describe_place(place)}, RMS {cell.rms:.3g}.")
    read, weights = distances.read_of()
    sampled = sum(cell.sampled for cell in distances.cells.values())
    if sampled:
        among = "" if sampled == len(distances.cells) else f" in {sampled} of {len(distances.cells)} cells"
        share = f"{read / weights * 100:.2g}%"
        sentences.append(f"Sampled{among}: {read:,} of {weights:,} weights were read ({share}).")
    elif distances.cells:
        sentences.append("Exact: every weight was read.")
    return " ".join(sentences)


def _values(distances: DistanceMap) -> dict[str, Any]:
    """The numbers behind a heat map, layers down and roles across."""
    rows = sorted({(layer is not None, mtp, layer or 0, layer) for layer, _, mtp in distances.cells})
    roles = in_order(role for _, role, _ in distances.cells)
    written = []
    for _, mtp, _, layer in rows:
        cells = [distances.cells.get((layer, role, mtp)) for role in roles]
        name = ("outside the layers" if layer is None else str(layer)) + (" (MTP)" if mtp else "")
        written.append((name, [f"{c.rms:.3e}" if c and c.rms is not None else "" for c in cells]))
    return {"roles": roles, "rows": written}


def _coverage(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Rows by role and origin; every distinct origin has a colour of its own."""
    rows: Sequence[Mapping[str, Any]] = manifest.get("coverage") or ()
    order = in_order(str(row["role"]) for row in rows)
    rows = sorted(rows, key=lambda row: (bool(row.get("mtp")), order.index(str(row["role"]))))
    origins = list(dict.fromkeys(str(row["action"]) for row in rows))
    total = sum(int(row["bytes"]) for row in rows)
    roles: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        nbytes = int(row["bytes"])
        roles.setdefault(f"{row['role']}{' (MTP)' if row.get('mtp') else ''}", []).append({
            "origin": str(row["action"]), "colour": category(origins.index(str(row["action"]))),
            "index": origins.index(str(row["action"])), "tensors": int(row["tensors"]), "bytes": nbytes,
            "share": percent(nbytes, total),
        })  # fmt: skip
    stacks = [_stack("all", [each for found in roles.values() for each in found], total)]
    stacks += [_stack(role, found, total) for role, found in roles.items()]
    return {
        "roles": roles,
        "tensors": sum(int(row["tensors"]) for row in rows),
        "bytes": total,
        "origins": [(origin, category(index)) for index, origin in enumerate(origins)],
        "figure": coverage_bars(stacks, origins) if rows else None,
    }


def _stack(label: str, rows: Sequence[Mapping[str, Any]], total: int) -> Stack:
    by_origin: dict[int, int] = {}
    for row in rows:
        by_origin[row["index"]] = by_origin.get(row["index"], 0) + row["bytes"]
    nbytes = sum(by_origin.values())
    return Stack(label, by_origin, f"{format_bytes(nbytes)} · {percent(nbytes, total)}")


def _parents(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "label": label, "model": found.get("model"), "revision": found.get("revision"),
            "files": found.get("files") or {},
            "bytes": sum(int(file.get("size") or 0) for file in (found.get("files") or {}).values()),
        }
        for label, found in _inputs(manifest).items()
    ]  # fmt: skip


def _particulars(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Small tables of names and values: versions, settings, the model, the run."""
    tables = []
    for key in ("model", "settings", "versions", "run"):
        rows = [
            (name.removesuffix("_bytes").replace("_", " "), _value(name, value))
            for name, value in (manifest.get(key) or {}).items()
        ]
        if rows:
            tables.append((key.capitalize(), rows))
    return tables


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ([], {}):
        return "none"
    if name.endswith("bytes") and isinstance(value, int):
        return format_bytes(value)
    if name == "seconds":
        return _seconds(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(key, each)}" for key, each in value.items())
    if isinstance(value, list):
        return " × ".join(map(str, value)) if name == "weight_block_size" else ", ".join(map(str, value))
    return str(value)


def _recipe(manifest: Mapping[str, Any]) -> str:
    """As YAML; the steps stand in for it where an output was made without a recipe."""
    made_of = manifest.get("recipe") or {"steps": list(manifest.get("steps") or ())}
    return yaml.safe_dump(dict(made_of), sort_keys=False, allow_unicode=True).rstrip()


def _evaluate_command(manifest: Mapping[str, Any]) -> str:
    models = [str(found.get("model") or label) for label, found in _inputs(manifest).items()]
    return shlex.join(["surgery", "eval", HERE, *models, "--tasks", "problems.jsonl", "--text", "text.txt"])


def _loading(manifest: Mapping[str, Any]) -> dict[str, Any]:
    files = (manifest.get("output") or {}).get("files") or {}
    return {
        "dtype": json.dumps((manifest.get("model") or {}).get("dtype") or "auto"),
        "remote_code": any(name.endswith(".py") for name in files),
    }
