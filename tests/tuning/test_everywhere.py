"""The same setting in every layer beside one for each, in a world where layers lose what they are said to lose."""

import math
from types import SimpleNamespace

import pytest

from lynx.tuning.allocation import allocations
from lynx.tuning.candidates import candidates
from lynx.tuning.everywhere import best_path, everywhere, rules
from lynx.tuning.sensitivity import Measured

MASSES = [{"name": "importance-threshold", "mass": mass} for mass in (0.9, 0.7, 0.5)]
POOLS = [{"name": "pooled-threshold", "least": least} for least in (0.1, 0.2, 0.4)]


def world(factors):
    """Layers in which `factors` of three masses' and three pools' losses are measured."""
    points = [
        (strategy, active, factor * (20 - active) ** 2)
        for strategy, active, factor in zip([*MASSES, *POOLS], (16, 12, 8, 16, 12, 8), factors, strict=True)
    ]
    return [Measured(before=20, points=points) for _ in range(2)]


def judged(truth):
    """What is measured of an allocation: layers lose what `truth` says of their rule."""
    asked = []

    def measured(allocation):
        asked.append(allocation)
        active = list(allocation.by_layer)
        lost = [truth[s["name"]] * (20 - a) ** 2 for s, a in zip(allocation.strategies, active, strict=True)]
        return SimpleNamespace(
            kl_value=math.fsum(lost), active=lambda when="after": active if when == "after" else [20.0, 20.0]
        )

    return measured, asked


def test_rules_differ_by_more_than_their_threshold():
    assert [len(group) for group in rules(candidates())] == [13] * 4
    assert rules([*MASSES, *POOLS]) == [MASSES, POOLS]
    assert rules(MASSES[:1]) == []


def test_a_path_has_one_setting_for_all_layers():
    layers = world([1, 1, 1, 2, 2, 2])
    masses, pools = everywhere(layers, [*MASSES, *POOLS])
    assert masses[0].loss == 0
    assert masses[0].share == 1
    assert [each.strategies[0]["mass"] for each in masses[1:]] == [0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5]
    assert pools[-1].strategies == (POOLS[-1],) * 2
    assert pools[-1].loss == 2 * 2 * 12**2
    for path in (masses, pools):
        assert all(len({*map(str, each.strategies)}) == 1 for each in path)
        assert [each.active for each in path] == sorted((each.active for each in path), reverse=True)
        assert [each.loss for each in path] == sorted(each.loss for each in path)


def test_luck_in_a_layer_is_found_out():
    """Masses look good at one setting, where pools are better in truth."""
    layers = world([1, 0.1, 1, 0.5, 0.5, 0.5])
    path = allocations([layer.curve for layer in layers])
    place = next(i for i, each in enumerate(path) if each.share <= 0.6)
    assert {each["name"] for each in path[place].strategies} == {"importance-threshold"}
    measured, asked = judged({"importance-threshold": 1.0, "pooled-threshold": 0.5})
    found = best_path(path, everywhere(layers, [*MASSES, *POOLS]), place, measured)
    assert found[-1].strategies == (POOLS[-1],) * 2
    assert len(asked) == 1 + 2 * 2
    here = min(found, key=lambda each: abs(each.share - 0.6))
    assert here.loss == pytest.approx(measured(here).kl_value, rel=0.1)


def test_a_setting_for_every_layer_stays_where_it_loses_less():
    layers = world([1, 1, 1, 2, 2, 2])
    layers[1] = Measured(before=20, points=[(s, a, 0.1 * loss) for s, a, loss in layers[1].points])
    path = allocations([layer.curve for layer in layers])
    place = next(i for i, each in enumerate(path) if each.share <= 0.75)

    def measured(allocation):
        lost = [f * (20 - a) ** 2 for f, a in zip((2.0, 0.2), allocation.by_layer, strict=True)]
        active = list(allocation.by_layer)
        return SimpleNamespace(
            kl_value=math.fsum(lost), active=lambda when="after": active if when == "after" else [20, 20]
        )

    found = best_path(path, everywhere(layers, [*MASSES, *POOLS]), place, measured)
    assert [each.strategies for each in found] == [each.strategies for each in path]
    assert found[place].loss == pytest.approx(measured(path[place]).kl_value)  # corrected


def test_there_is_nothing_to_compare_at_exact():
    layers = world([1] * 6)
    path = allocations([layer.curve for layer in layers])
    measured, asked = judged({})
    assert best_path(path, everywhere(layers, [*MASSES, *POOLS]), 0, measured) == path
    assert not asked
