"""Keep rules: the declarative rung of the ladder, which one fused kernel can execute for every strategy.

A rule says which experts stay active. Rules by rank, ratio and mass say what each token wants of its own top-k, and
sharing takes the union over tokens; the others look at the batch as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lynx.routing import Routing, in_units, sum_votes

Utility = Literal["own-mass", "normalised-own-mass", "count"]


@dataclass(frozen=True, slots=True)
class ByRank:
    """A token wants its own best ``top`` experts."""

    top: int
    share: bool = True

    def keep(self, routing: Routing) -> Tensor:
        """Return ``(E,)`` bool, or ``(T, E)`` without sharing."""
        return _share(routing, routing.slot_rank < self.top, self.share)


@dataclass(frozen=True, slots=True)
class ByRatio:
    """A token wants the own experts whose weight is at least ``ratio`` times its best own weight."""

    ratio: float
    share: bool = True

    def keep(self, routing: Routing) -> Tensor:
        """Return ``(E,)`` bool, or ``(T, E)`` without sharing."""
        mass = routing.slot_mass
        return _share(routing, mass >= self.ratio * mass.amax(-1, keepdim=True), self.share)


@dataclass(frozen=True, slots=True)
class ByMass:
    """A token wants its best own experts until their cumulative own mass reaches ``mass`` (top-p over its own k)."""

    mass: float
    share: bool = True

    def keep(self, routing: Routing) -> Tensor:
        """Return ``(E,)`` bool, or ``(T, E)`` without sharing."""
        return _share(routing, routing.slot_before < self.reach * routing.slot_total, self.share)

    @property
    def reach(self) -> float:
        """The mass to compare with: beyond all there is where everything is to be kept, slots of weight 0 included."""
        return _reach(self.mass)


@dataclass(frozen=True, slots=True)
class ByDemand:
    """The experts that the batch wants most.

    Candidates are the experts wanted by OPEN rows that no EXACT row has woken already: those cost nothing and count
    towards nothing. Protected experts come first, then demand, then the lowest id.

    Attributes:
        budget: How many candidates to keep; None keeps all but ``drop``.
        drop: How many of the least-wanted candidates to leave out, where ``budget`` is None.
        utility: What a token's wish is worth, see :meth:`lynx.Routing.demand`.
        protect: Each token's best ``protect`` experts come before any demand.
    """

    budget: int | None = None
    drop: int = 0
    utility: Utility = "normalised-own-mass"
    protect: int = 1

    def keep(self, routing: Routing) -> Tensor:
        """Return ``(E,)`` bool."""
        return most_wanted(routing, routing.demand(self.utility), self.budget, self.drop, self.protect)


@dataclass(frozen=True, slots=True)
class ByCoverage:
    """The fewest experts that answer a share of the batch's demand.

    Experts are taken by demand, ties by lowest id, until they cover ``share`` of all there is. Those that EXACT rows
    have woken already come before all others, as they cost nothing, then each token's best ``protect`` experts.

    Attributes:
        share: Of the demand; 1 keeps all that is wanted.
        utility: What a token's wish is worth, see :meth:`lynx.Routing.demand`.
        protect: Each token's best ``protect`` experts stay in any case, and count towards the share.
    """

    share: float
    utility: Utility = "normalised-own-mass"
    protect: int = 1

    def keep(self, routing: Routing) -> Tensor:
        """Return ``(E,)`` bool."""
        demand = routing.demand(self.utility)
        candidate, order = _in_order(routing, demand, self.protect)
        units = in_units(demand).clamp_min(0)
        woken = units.masked_fill(~routing.woken, 0).sum(-1, keepdim=True)
        total = units.sum(-1, keepdim=True).clamp_min(1)
        taken = units.masked_fill(~candidate, 0).gather(-1, order)
        before = woken + taken.cumsum(-1) - taken
        needed = before.float() < self.reach * total.float()
        protected = routing.protected(self.protect).any(-2)
        return candidate & (torch.empty_like(needed).scatter(-1, order, needed) | protected)

    @property
    def reach(self) -> float:
        """The share to compare with: beyond all there is where all is to be kept, experts of no demand included."""
        return _reach(self.share)


@dataclass(frozen=True, slots=True)
class AnyOf:
    """The union of several rules."""

    rules: tuple[KeepRule, ...]

    def keep(self, routing: Routing) -> Tensor:
        """Return ``(E,)`` bool, or ``(T, E)`` if one of the rules does not share."""
        kept = [rule.keep(routing) for rule in self.rules]
        wide = max(mask.ndim for mask in kept)
        masks = [mask.unsqueeze(-2) if mask.ndim < wide else mask for mask in kept]
        union = masks[0]
        for mask in masks[1:]:
            union = union | mask
        return union


@dataclass(frozen=True, slots=True)
class ByPool:
    """The experts that matter enough to the tokens together.

    Attributes:
        least: An expert stays if ``(sum over OPEN tokens of mass ** power) ** (1 / power)`` reaches this.
        power: 1 adds masses up, a large one is the largest mass that any token has; between them many small wishes
            count for something, and one large wish for more.
        certainty: Power of the token's certainty (:attr:`lynx.Routing.certainty`) by which its masses are multiplied:
            a token whose router finds other experts about as good asks for less.
    """

    least: float
    power: int = 4
    certainty: float = 0.0

    def keep(self, routing: Routing) -> Tensor:
        """Return ``(E,)`` bool."""
        if self.least <= 0.0:
            return routing.wanted
        # by the threshold, so that no power of a small mass is lost in the sum; one whole vote is enough
        mass = routing.mass
        if self.certainty > 0.0:
            mass = mass * routing.certainty**self.certainty
        votes = (mass / self.least).clamp_max(1.0) ** self.power
        if routing.priority is not None:
            votes = votes * routing.priority.unsqueeze(-1)
        # rows that are not OPEN contribute exactly 0, NaN included
        votes = votes.masked_fill(~routing.own, 0.0)
        return routing.wanted & (sum_votes(votes) >= 1.0)


KeepRule = ByRank | ByRatio | ByMass | ByDemand | ByCoverage | ByPool | AnyOf


def most_wanted(routing: Routing, score: Tensor, budget: int | None = None, drop: int = 0, protect: int = 1) -> Tensor:
    """Keep the candidates with the highest ``score``, protected ones first, ties by lowest id.

    Args:
        routing: The batch.
        score: ``(E,)`` float, non-negative.
        budget: How many candidates to keep; None keeps all but ``drop``.
        drop: How many of the lowest to leave out, where ``budget`` is None.
        protect: Each token's best ``protect`` experts are ranked before all others.

    Returns:
        ``(E,)`` bool.
    """
    candidate, order = _in_order(routing, score, protect)
    places = torch.arange(routing.num_experts, device=order.device).expand_as(order)
    place = torch.empty_like(order).scatter(-1, order, places)
    limit: int | Tensor = candidate.sum(-1, keepdim=True) - drop if budget is None else budget
    return candidate & (place < limit)


def _in_order(routing: Routing, score: Tensor, protect: int) -> tuple[Tensor, Tensor]:
    """Candidates ``(E,)`` bool, and ``(E,)`` ids in the order in which they are taken."""
    candidate = routing.wanted & ~routing.woken
    key = score.masked_fill(routing.protected(protect).any(-2), torch.inf).masked_fill(~candidate, -torch.inf)
    return candidate, torch.sort(key, dim=-1, descending=True, stable=True).indices


def _reach(share: float) -> float:
    return 2.0 if share >= 1.0 else share


def _share(routing: Routing, wanted: Tensor, share: bool) -> Tensor:
    """Turn ``(T, k)`` wishes of OPEN rows into ``(E,)`` (union over tokens) or ``(T, E)``."""
    wishes = routing.spread(wanted & routing.open_rows.unsqueeze(-1))
    return wishes.any(-2) if share else wishes
