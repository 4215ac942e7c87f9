"""Intervals of what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        value: The figure.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def bootstrap(sums: Tensor, counts: Tensor, seed: int = 0) -> Estimate:
    """Estimate a mean per place; what is drawn anew are sequences, as the places of one are not independent.

    Args:
        sums: ``(S,)`` sum over a sequence's places.
        counts: ``(S,)`` its places.
        seed: Of the draws.
    """
    sums, counts = sums.double(), counts.double()
    drawn = torch.randint(len(sums), (_RESAMPLES, len(sums)), generator=torch.Generator().manual_seed(seed))
    means = sums[drawn].sum(-1) / counts[drawn].sum(-1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(sums.sum() / counts.sum()), low, high)


def wilson(right: int, asked: int) -> Estimate:
    """Estimate a share (Wilson's interval)."""
    z, n, p = 1.959964, asked, right / asked
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))
