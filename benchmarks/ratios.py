"""A tuned setting beside a family of uniform ones, at the number of active experts that it has."""

from __future__ import annotations

import itertools

import torch

from lynx.measuring.intervals import Estimate
from lynx.measuring.quality import Quality
from lynx.measuring.settings import describe


def family_name(family: list[Quality]) -> str:
    """What all settings of a family have in common."""
    first, second = (describe(each.setting).split() for each in (family[0], family[-1]))
    return " ".join(one if one == other else one.split("=")[0] for one, other in zip(first, second, strict=True))


def between(share: float, family: list[Quality]) -> tuple[Quality, Quality, float] | None:
    """The two settings next to a share, and how far it is from the first; None outside of what was measured."""
    for one, other in itertools.pairwise(sorted(family, key=lambda each: each.share)):
        if one.share <= share <= other.share and other.share > one.share:
            return one, other, (share - one.share) / (other.share - one.share)
    return None


def compared(tuned: Quality, one: Quality, other: Quality, part: float) -> tuple[float, Estimate]:
    """The KL between two settings, and tuned by that, with an interval over texts drawn for all three at once."""
    _, place = torch.tensor(tuned.examples).unique(return_inverse=True)
    values = torch.tensor([tuned.kl, one.kl, other.kl, tuned.places], dtype=torch.float64)
    sums = torch.zeros(4, int(place.max()) + 1, dtype=torch.float64).index_add(1, place, values)
    drawn = torch.randint(sums.shape[1], (2000, sums.shape[1]), generator=torch.Generator().manual_seed(0))

    def figures(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mine, first, second = (sums[:3] / sums[3]).log()
        uniform = (1 - part) * first + part * second
        return uniform.exp(), (mine - uniform).exp()

    kl, ratio = figures(sums.sum(-1))
    low, high = figures(sums[:, drawn].sum(-1))[1].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(kl), Estimate(float(ratio), low, high)
