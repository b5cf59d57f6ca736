"""Layers of different sparsity: what a first walk found of each, and what it got for it.

Made from the manifest's measurements of kind `layer_ratios`, one row for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.report.matrices import layer_curves

KIND = "layer_ratios"
MEASURED = {
    "owl": "share of outliers among its Wanda scores", "lsa": "least output error of losing half its weights",
}  # fmt: skip


def ratio_tables(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The table of each step that gave its layers different sparsities."""
    return [table for table in manifest.get("measurements") or () if table.get("kind") == KIND]


def ratios_in_words(table: Mapping[str, Any]) -> str:
    """Which layer got the most zeros, and which the fewest."""
    by_share = sorted((row[2], row[0]) for row in table["rows"])
    (low, fewest), (high, most) = by_share[0], by_share[-1]
    return (
        f"{table['op']}: {table['allocate']} spreads {table['sparsity']:.1%} of zeros over the layers, "
        f"{low:.1%} (layer {fewest}) to {high:.1%} (layer {most})."
    )


def ratio_sections(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each step: a sentence, the figure, and a row for each layer."""
    return [
        {
            "op": table["op"],
            "words": ratios_in_words(table),
            "measured": MEASURED[table["allocate"]],
            "figure": layer_curves(
                {"sparsity": [(row[0], row[2]) for row in table["rows"]]}, "sparsity of each layer"
            ),
            "rows": [
                (str(layer), f"{value:.4g}", f"{share:.1%}", f"{weights:,}")
                for layer, value, share, weights in table["rows"]
            ],
        }
        for table in ratio_tables(manifest)
    ]
