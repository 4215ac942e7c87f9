"""How a layer's loss grows as it is left fewer experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lynx.tuning.candidates import EXACT, Strategy


@dataclass(frozen=True, slots=True)
class Point:
    """One candidate in one layer, all others exact.

    Attributes:
        strategy: The candidate.
        active: Mean active experts of the layer per decode step.
        loss: KL(exact || policy) in nats per token.
    """

    strategy: Strategy
    active: float
    loss: float


@dataclass(frozen=True, slots=True)
class Curve:
    """A layer's candidates that are worth having, mild ones first.

    Attributes:
        points: From exact on; every one has fewer active experts than the one before, at a higher price each.
    """

    points: tuple[Point, ...]

    @property
    def before(self) -> float:
        """Active experts of the model."""
        return self.points[0].active

    def price(self, place: int) -> float:
        """Loss for each expert less, from the point at ``place`` to the next."""
        here, there = self.points[place], self.points[place + 1]
        return (there.loss - here.loss) / (here.active - there.active)


def curve(measured: Sequence[Point], before: float) -> Curve:
    """Keep the candidates on the lower convex hull of loss by active experts.

    Loss is measured on few tokens that matter much, so a stronger setting may come out with less of it than a milder
    one. Where that happens the two, and what lies between, are taken to lose their mean (isotonic regression).

    Args:
        measured: The candidates.
        before: Active experts of the model.
    """
    exact = Point(EXACT, before, 0.0)
    falling = sorted((point for point in measured if point.active < before), key=lambda point: -point.active)
    hull = [exact]
    for point in _rising(falling):
        if point.active >= hull[-1].active:
            continue
        while len(hull) > 1 and _price(hull[-2], hull[-1]) >= _price(hull[-2], point):
            hull.pop()
        hull.append(point)
    return Curve(tuple(hull))


def _price(one: Point, other: Point) -> float:
    return (other.loss - one.loss) / (one.active - other.active)


def _rising(points: Sequence[Point]) -> list[Point]:
    """Make loss rise along the points (pool adjacent violators)."""
    pools: list[list[Point]] = []
    for point in points:
        pools.append([point])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [Point(point.strategy, point.active, _mean(pool)) for pool in pools for point in pool]


def _mean(pool: Sequence[Point]) -> float:
    return sum(point.loss for point in pool) / len(pool)
