"""How far each source of a merge has moved from the base, over the whole model: norms of task vectors.

A task vector τ is all of what a source has changed, W_source − W_base. Merges measure every tensor that they
compute; here that is added up by role and in all:

    ‖τ‖ = √(Σ_l ‖τ_l‖²)        cos(τ_a, τ_b) = Σ_l τ_a,l · τ_b,l / (‖τ_a‖ · ‖τ_b‖)

A source of a far larger norm than the others drowns them, and two of a large cosine say the same twice
(DisTaC, arXiv 2508.01148); `normalize: norms` of the task-vector methods is the remedy for the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Any

from surgery.stream.checkpoint import TensorRef

KIND = "task vector"
ALL = "all"
"""What stands in place of a role for the whole model."""


@dataclass
class _Sums:
    """Of one source and role; `products` and the squares that belong to them are by other source."""

    tensors: int = 0
    weights: int = 0
    square: float = 0.0
    products: dict[str, list[float]] = field(default_factory=dict)


def norm_rows(
    tensors: Mapping[str, TensorRef], outcomes: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows for a manifest's `measurements`: by source, all of the model first, then its roles by name.

    `cosine` is by other source; None stands for that of a zero vector. Tensors that were not computed, or
    whose distances are not finite, take no part.
    """
    found: dict[str, dict[str, _Sums]] = {}
    for name, ref in tensors.items():
        metrics = outcomes.get(name, {}).get("metrics") or {}
        distance = metrics.get("distance") or {}
        if not distance or any(each["rms"] is None for each in distance.values()):
            continue
        norms = {source: each["rms"] * sqrt(metrics["weights"]) for source, each in distance.items()}
        for source, norm in norms.items():
            for role in (ALL, ref.info.role):
                sums = found.setdefault(source, {}).setdefault(role, _Sums())
                sums.tensors += 1
                sums.weights += metrics["weights"]
                sums.square += norm * norm
        for later, others in (metrics.get("cosine") or {}).items():
            for earlier, cosine in others.items():
                for role in (ALL, ref.info.role):
                    _add(found, role, (later, earlier), cosine or 0.0, norms)
    return [
        _row(source, role, sums)
        for source, roles in found.items()
        for role, sums in sorted(roles.items(), key=lambda item: (item[0] != ALL, item[0]))
    ]


def _add(
    found: dict[str, dict[str, _Sums]], role: str, pair: tuple[str, str], cosine: float,
    norms: Mapping[str, float],
) -> None:  # fmt: skip
    for mine, other in (pair, pair[::-1]):
        totals = found[mine][role].products.setdefault(other, [0.0, 0.0, 0.0])
        totals[0] += cosine * norms[mine] * norms[other]
        totals[1] += norms[mine] ** 2
        totals[2] += norms[other] ** 2


def _row(source: str, role: str, sums: _Sums) -> dict[str, Any]:
    norm = sqrt(sums.square)
    return {
        "kind": KIND,
        "source": source,
        "role": role,
        "tensors": sums.tensors,
        "weights": sums.weights,
        "norm": norm if isfinite(norm) else None,
        "rms": norm / sqrt(sums.weights) if sums.weights and isfinite(norm) else None,
        "cosine": {other: _cosine(*totals) for other, totals in sums.products.items()},
    }


def _cosine(product: float, mine: float, other: float) -> float | None:
    size = sqrt(mine) * sqrt(other)
    return product / size if size and isfinite(product / size) else None
