"""Whether a setting for every layer is worth having, beside the same one in all of them.

Of many candidates that were measured on little text, those that look best are partly lucky, and a choice in every layer
collects that luck. One setting for all layers has less of it, and is easier to read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lynx.measuring.quality import Quality
from lynx.tuning.allocation import Allocation
from lynx.tuning.candidates import EXACT, Strategy
from lynx.tuning.sensitivity import Measured

_THRESHOLDS = ("least", "mass")
_BETWEEN = 4  # steps from one measured threshold to the next
_APART = 0.02  # of the experts: how far neighbours are at least from what they are compared with


def rules(candidates: Sequence[Strategy]) -> list[list[Strategy]]:
    """Group candidates that differ by their threshold alone, mild ones first."""
    found: dict[str, list[Strategy]] = {}
    for each in candidates:
        rule = str({option: value for option, value in each.items() if option not in _THRESHOLDS})
        threshold = next((option for option in _THRESHOLDS if option in each), "")
        found.setdefault(rule + threshold, []).append(each)
    return [group for group in found.values() if len(group) > 1]


def everywhere(layers: Sequence[Measured], candidates: Sequence[Strategy]) -> list[list[Allocation]]:
    """Return a path for every rule, from exact to its strongest candidate, with the same setting in every layer.

    Args:
        layers: What each loses alone; losses are added up.
        candidates: Those that were measured, of every layer the same.
    """
    before = sum(layer.before for layer in layers)
    exact = Allocation((EXACT,) * len(layers), 0.0, tuple(layer.before for layer in layers), before)
    paths = []
    for rule in rules(candidates):
        measured: list[Allocation] = []
        for strategy in rule:
            points = [next(point for point in layer.points if point[0] == strategy) for layer in layers]
            loss = max(sum(point[2] for point in points), measured[-1].loss if measured else 0.0)
            active = tuple(point[1] for point in points)
            measured.append(Allocation((strategy,) * len(layers), loss, active, before))
        steps = [step for pair in itertools.pairwise(measured) for step in _between(*pair)]
        paths.append([exact, *steps, measured[-1]])
    return paths


def best_path(
    path: Sequence[Allocation],
    others: Sequence[Sequence[Allocation]],
    place: int,
    measured: Callable[[Allocation], Quality],
    weights: Sequence[float] | None = None,
) -> list[Allocation]:
    """Return the path that loses least where it should meet the goal, its losses corrected by what was measured there.

    Args:
        path: With a setting for every layer.
        others: With the same in every layer.
        place: Where ``path`` should meet the goal.
        measured: Measures an allocation on the text that chooses.
        weights: What an active expert of each layer costs; 1 each without.
    """
    point = path[place]
    if point.loss <= 0:
        return list(path)  # exact: all are the same
    worth = list(weights) if weights is not None else [1.0] * len(point.by_layer)

    def size(active: Sequence[float]) -> float:
        return math.fsum(weight * each for weight, each in zip(worth, active, strict=True))

    quality = measured(point)
    full, here = size(quality.active("before")), size(quality.active())
    best, found = quality.kl_value, _scaled(path, quality.kl_value / point.loss)
    for other in others:
        milder = [each for each in other[1:] if size(each.by_layer) >= here + _APART * full]
        stronger = [each for each in other[1:] if size(each.by_layer) <= here - _APART * full]
        if not milder or not stronger:
            continue
        ends = [measured(milder[-1]), measured(stronger[0])]
        kl = _at(here, [(size(end.active()), end.kl_value) for end in ends])
        predicted = milder[-1].loss + stronger[0].loss
        if 0.0 < kl < best and predicted > 0:
            best, found = kl, _scaled(other, math.fsum(end.kl_value for end in ends) / predicted)
    return found


def _between(one: Allocation, other: Allocation) -> list[Allocation]:
    """Allocations from one up to the other, without that, thresholds rounded to what is read easily."""
    (option,) = (option for option in _THRESHOLDS if option in one.strategies[0])
    made = []
    for step in range(_BETWEEN):
        part = step / _BETWEEN

        def mixed(first: float, second: float, part: float = part) -> float:
            return (1 - part) * first + part * second

        threshold = round(mixed(one.strategies[0][option], other.strategies[0][option]), 4)
        strategy = one.strategies[0] | {option: threshold}
        active = tuple(map(mixed, one.by_layer, other.by_layer))
        made.append(Allocation((strategy,) * len(active), mixed(one.loss, other.loss), active, one.before))
    return made


def _at(size: float, ends: Sequence[tuple[float, float]]) -> float:
    """The KL at a size, on the line through two in its logarithm; 0 where that says nothing."""
    (first, kl), (second, other) = ends
    if kl <= 0 or other <= 0 or first == second:
        return 0.0
    part = (first - size) / (first - second)
    return math.exp((1 - part) * math.log(kl) + part * math.log(other))


def _scaled(path: Sequence[Allocation], factor: float) -> list[Allocation]:
    return [replace(each, loss=factor * each.loss) for each in path]
