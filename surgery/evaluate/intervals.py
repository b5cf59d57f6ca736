"""95 % confidence intervals for the figures in an evaluation table.

Shares (right answers, replies with a tag) get Wilson's score interval, which stays inside [0, 1] and keeps
its coverage for few trials and for shares near 0 and 1:

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)                           (Wilson 1927)

Means get Student's t. The mean of a quantity over tokens that come in windows is a ratio of sums,
m = Σs / Σn, and windows rather than tokens are the independent observations, so its standard error is taken
over windows:

    se² = W/(W-1) · Σ (sᵢ - m nᵢ)² / (Σn)²                                      (Cochran 1977, ch. 6)

With every nᵢ = 1 this is the usual s²/W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import atan, cos, fsum, pi, sin, sqrt
from statistics import NormalDist
from typing import Any

CONFIDENCE = 0.95
_EXACT_UP_TO = 300
"""Degrees of freedom from which on the expansion around the normal quantile is good to 1e-9."""


@dataclass(frozen=True)
class Share:
    """`count` of `total`, with the ends of Wilson's interval. All three are 0..1; nothing of nothing is 0."""

    count: int
    total: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> Share:
        return cls(count, total, count / total if total else 0.0, *wilson(count, total))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Mean:
    """A mean over `count` observations; `low` and `high` are None where there is but one."""

    value: float
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, sums: Sequence[float], sizes: Sequence[int] | None = None) -> Mean:
        """Σ sums / Σ sizes. Without sizes every observation counts once. Raises ValueError for none."""
        weights = sizes if sizes is not None else [1] * len(sums)
        total = sum(weights)
        if total <= 0 or len(weights) != len(sums):
            raise ValueError(f"no mean of {len(sums)} sums over {total} items in {len(weights)} groups")
        value = fsum(sums) / total
        observations = len(sums)
        if observations < 2:
            return cls(value, None, None, observations)
        residuals = fsum((each - value * size) ** 2 for each, size in zip(sums, weights, strict=True))
        error = sqrt(observations / (observations - 1) * residuals) / total
        reach = student_t(observations - 1) * error
        return cls(value, value - reach, value + reach, observations)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Ends of Wilson's score interval for `count` of `total`; (0, 1) where nothing was tried."""
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = count / total
    centre = share + z * z / (2 * total)
    reach = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the exact value is 0 or 1; rounding would leave it a hair inside.
    low = 0.0 if count == 0 else (centre - reach) / scale
    high = 1.0 if count == total else (centre + reach) / scale
    return low, high


@cache
def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile t with P(|T| ≤ t) = `confidence` for `freedom` ≥ 1 degrees of freedom."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    if freedom > _EXACT_UP_TO:
        return _expansion(z, freedom)
    low, high = 0.0, 1.0
    while student_t_mass(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if student_t_mass(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return high


def student_t_mass(t: float, freedom: int) -> float:
    """P(|T| ≤ t), by the finite sums for whole degrees of freedom (Abramowitz & Stegun 26.7.3-4)."""
    angle = atan(t / sqrt(freedom))
    squared = cos(angle) ** 2
    odd = freedom % 2
    term = cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= squared * (k - 1) / k
        total += term
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total


def _expansion(z: float, freedom: int) -> float:
    """Cornish-Fisher expansion of the t quantile around the normal one (Abramowitz & Stegun 26.7.5)."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
