"""Curves of layers, what is shared out between them, and what is verified next."""

import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx.measuring.intervals import Estimate
from lynx.tuning.allocation import Allocation, allocations
from lynx.tuning.candidates import EXACT, candidates, in_layers, label, only_in
from lynx.tuning.curves import Point, curve
from lynx.tuning.goal import Goal, Trial, passes
from lynx.tuning.search import search

LAYER = st.lists(st.tuples(st.integers(1, 19), st.integers(1, 50)), min_size=1, max_size=3)


def point(active, loss):
    return Point({"name": "top-budget", "budget": round(active)}, active, loss)


def shape(measured, before=20.0):
    return [(each.active, each.loss) for each in curve(measured, before).points]


def test_a_curve_starts_at_exact_and_keeps_what_is_worth_having():
    assert shape([point(10, 4.0), point(15, 1.0)]) == [(20, 0.0), (15, 1.0), (10, 4.0)]
    assert shape([point(10, 2.0), point(15, 1.5)]) == [(20, 0.0), (10, 2.0)]  # a mild one that costs too much
    assert shape([]) == [(20, 0.0)]
    assert shape([point(20, 0.1), point(25, 0.0)]) == [(20, 0.0)]  # no fewer experts than the model's


def test_noise_does_not_make_a_stronger_setting_better():
    """The two that contradict each other lose their mean."""
    assert shape([point(15, 3.0), point(12, 1.0), point(8, 9.0)]) == [(20, 0.0), (12, 2.0), (8, 9.0)]


@given(st.lists(st.tuples(st.floats(1, 19), st.floats(0, 5)), max_size=8))
def test_prices_rise_along_a_curve(measured):
    made = curve([point(*each) for each in measured], 20.0)
    actives = [each.active for each in made.points]
    assert actives == sorted(actives, reverse=True)
    assert len({*actives}) == len(actives)
    prices = [made.price(place) for place in range(len(made.points) - 1)]
    assert all(price >= -1e-9 for price in prices)
    assert all(one <= other * (1 + 1e-6) + 1e-9 for one, other in itertools.pairwise(prices))


@given(st.lists(LAYER, min_size=1, max_size=3))
def test_no_choice_of_the_same_size_loses_less(layers):
    """Against all combinations of the curves' points."""
    curves = [curve([point(*each) for each in layer], 20.0) for layer in layers]
    for chosen in allocations(curves):
        for other in itertools.product(*(each.points for each in curves)):
            if sum(each.active for each in other) <= chosen.active + 1e-9:
                loss = sum(each.loss for each in other)
                assert loss >= chosen.loss - 1e-6 or sum(each.active for each in other) < chosen.active - 1e-9


def test_a_path_goes_from_exact_to_the_strongest_one_layer_at_a_time():
    curves = [curve([point(15, 1.0), point(10, 4.0)], 20.0), curve([point(12, 0.5)], 16.0)]
    path = allocations(curves)
    found = [(each.by_layer, each.loss) for each in path]
    assert found == [((20, 16), 0.0), ((20, 12), 0.5), ((15, 12), 1.5), ((10, 12), 4.5)]
    assert (path[0].share, path[-1].share) == (1.0, 22 / 36)
    assert [each.strategies[1]["name"] for each in path] == ["exact", *["top-budget"] * 3]


def test_dear_experts_are_given_up_first():
    curves = [curve([point(10, 1.0)], 20.0), curve([point(10, 1.5)], 20.0)]
    assert allocations(curves)[1].by_layer == (10, 20)
    assert allocations(curves, [1.0, 2.0])[1].by_layer == (20, 10)


def test_candidates():
    every = candidates()
    assert len(every) == 52
    assert candidates(5)[0] == every[0]
    assert candidates(5)[-1] in every[-4:]
    assert len({*map(str, candidates(26))}) == 26
    rules = [(each["name"], each.get("certainty", "mass" in each)) for each in candidates(26)]
    assert all(6 <= rules.count(rule) <= 7 for rule in rules)
    assert candidates(99) == every
    assert label({"name": "importance-threshold", "ratio": 0.4}) == "importance-threshold ratio=0.4"


def test_configurations_of_layers():
    strong = {"name": "batch-union", "top": 1}
    alone = only_in(1, strong)
    assert alone.strategy.default.name == "exact"
    assert alone.strategy.strategies[1].top == 1
    assert in_layers([strong, strong]).strategy.name == "batch-union"
    both = in_layers([EXACT, strong]).strategy
    assert [both.strategies[layer].name for layer in (0, 1)] == ["exact", "batch-union"]


def quality(kl, share, spread=0.1):
    estimate = Estimate(kl, kl * (1 - spread), kl * (1 + spread))
    return SimpleNamespace(mean=lambda name: estimate, share=share, active=lambda when="after": [share * 20])


PATH = [Allocation((), float(loss), (20.0 - loss,), 20.0) for loss in range(9)]


def tried(goal, truth, rounds=8):
    """Search in a world in which an allocation loses what `truth` says of its predicted loss."""
    order = []

    def verify(allocation):
        order.append(allocation.loss)
        found = quality(truth(allocation.loss), allocation.share)
        return Trial(allocation, found, None, None, None, passes(goal, found, None, None, None))

    return search(PATH, goal, lambda each: each.share, verify, rounds), order


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_the_strongest_that_loses_little_enough_is_found(factor):
    """However far predictions are off."""
    trials, order = tried(Goal("max-kl", 4.5), lambda loss: factor * loss)
    assert trials[-1].passed
    assert trials[-1].allocation.loss == max(each.loss for each in PATH if 1.1 * factor * each.loss <= 4.5)
    assert len(order) == len({*order}) <= 5


def test_a_limit_on_loss_holds_for_the_upper_end():
    trials, _ = tried(Goal("max-kl", 4.05), lambda loss: loss)
    assert trials[-1].allocation.loss == 3.0  # 4.0 is within the limit, and its interval is not


def test_the_mildest_that_is_small_enough_is_found():
    trials, order = tried(Goal("target-active", 0.8), lambda loss: loss)
    assert trials[-1].allocation.share == 0.8
    assert len(order) <= 4


def test_what_cannot_be_met_is_not_said_to_be():
    trials, _ = tried(Goal("target-active", 0.2), lambda loss: loss)
    assert trials
    assert not any(trial.passed for trial in trials)
    nothing, _ = tried(Goal("max-kl", 1e-9), lambda loss: loss + 1.0)
    assert not any(trial.passed for trial in nothing)


def test_rounds_are_a_limit():
    _, order = tried(Goal("max-kl", 4.5), lambda loss: loss * math.exp(loss), rounds=2)
    assert len(order) == 2


def test_answers_and_time_as_goals():
    good, bad, exact = (Estimate(value, 0, 1) for value in (0.89, 0.87, 0.9))
    drop = Goal("max-drop", 0.02)
    assert passes(drop, quality(1, 0.5), good, exact, None)
    assert not passes(drop, quality(1, 0.5), bad, exact, None)
    assert passes(Goal("target-tpot", 0.01), quality(1, 0.5), None, None, 0.009)
    assert not passes(Goal("target-tpot", 0.01), quality(1, 0.5), None, None, 0.011)
    assert str(drop) == "at most 2.00% fewer questions answered"
