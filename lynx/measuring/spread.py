"""Median and quartiles of times that were taken in rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """What rounds of a measurement gave.

    Attributes:
        median: The middle of them.
        low: Lower quartile.
        high: Upper quartile.
    """

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles of one value or more."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Divide round by round, so that what disturbs a round disturbs both sides of a ratio."""
    return spread([one / other for one, other in zip(values, base, strict=True)])
