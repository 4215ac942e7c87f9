"""Which layer gives up experts first: where an expert less costs the least loss."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from lynx.config import Config
from lynx.tuning.candidates import Strategy, in_layers
from lynx.tuning.curves import Curve


@dataclass(frozen=True, slots=True)
class Allocation:
    """A setting for every layer, with what is predicted of them together.

    Attributes:
        strategies: By layer.
        loss: Sum of the layers' losses: what they lose together, as long as that is little.
        by_layer: Active experts of each layer.
        before: Sum of the model's.
        places: Each layer's place on its curve.
    """

    strategies: tuple[Strategy, ...]
    loss: float
    by_layer: tuple[float, ...]
    before: float
    places: tuple[int, ...] = ()

    @property
    def active(self) -> float:
        """Sum of the layers' active experts."""
        return sum(self.by_layer)

    @property
    def share(self) -> float:
        """Active experts by those of the model."""
        return self.active / self.before

    @property
    def config(self) -> Config:
        """What to attach."""
        return in_layers(list(self.strategies))


def allocations(curves: Sequence[Curve], weights: Sequence[float] | None = None) -> list[Allocation]:
    """Return the best allocations from exact to the strongest, each one step of one layer further than the one before.

    Losses add up and curves are convex, so taking the cheapest step each time gives the least loss for the active
    experts reached (the greedy solution of a separable convex problem).

    Args:
        curves: By layer.
        weights: What an active expert of each layer costs, in any unit (time, bytes); 1 each without.
    """
    worth = list(weights) if weights is not None else [1.0] * len(curves)
    places = [0] * len(curves)
    steps = [(each.price(0) / worth[layer], layer) for layer, each in enumerate(curves) if len(each.points) > 1]
    heapq.heapify(steps)
    found = [at(curves, places)]
    while steps:
        _, layer = heapq.heappop(steps)
        places[layer] += 1
        found.append(at(curves, places))
        if places[layer] + 1 < len(curves[layer].points):
            heapq.heappush(steps, (curves[layer].price(places[layer]) / worth[layer], layer))
    return found


def at(curves: Sequence[Curve], places: Sequence[int]) -> Allocation:
    """Return the allocation that has each layer at a place of its curve."""
    points = [each.points[place] for each, place in zip(curves, places, strict=True)]
    return Allocation(
        strategies=tuple(point.strategy for point in points),
        loss=sum(point.loss for point in points),
        by_layer=tuple(point.active for point in points),
        before=sum(each.before for each in curves),
        places=tuple(places),
    )
