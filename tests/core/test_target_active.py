"""Holding a number of active experts: what the threshold does over many steps, at its bounds, and when copied."""

import copy
import pickle

import pytest
import torch
from support import assert_same, layer_of

import lynx
from lynx.routing import Phase, Role
from lynx.selection import LayerSelection
from lynx.testing import make_routing
from lynx.testing.transforms import stack

DECODE = Phase.DECODE


def attached(min_tokens=2, **options):
    routing = make_routing(experts=32, top_k=4)
    return LayerSelection(layer_of(routing), lynx.make_strategy("target-active", **options), min_tokens)


def batches(kind, count, seed=0):
    """Steps of one kind of traffic: tokens that differ, tokens that agree, or fewer of them."""
    tokens, skew = {"apart": (16, 0.0), "alike": (16, 1.0), "few": (9, 0.0)}[kind]
    common = torch.randn(32, generator=torch.Generator().manual_seed(len(kind)))
    for step in range(count):
        routing = make_routing(tokens=tokens, experts=32, top_k=4, seed=1000 * seed + step, skew=0.0, renormalise=True)
        logits = routing.logits + skew * common
        ids = logits.topk(4).indices
        weights = torch.softmax(logits.gather(-1, ids), -1)
        yield lynx.Routing(logits, logits, ids, weights, routing.role, routing.phase, routing.rule)


def run(selection, steps):
    selection.counters.reset()
    for routing in steps:
        selection(routing)
    return selection.counters.read()[DECODE]


def odds(selection):
    return selection.bound.state[0].item()


def mass(selection):
    return torch.sigmoid(selection.bound.state[0]).item()


@pytest.mark.parametrize("options", [{"share": 0.6}, {"share": 0.8}, {"active": 14.5}], ids=str)
def test_the_target_is_held_over_changing_traffic(options):
    """Averages over windows that start where the traffic changes are within 5 %."""
    selection = attached(**options, floor=0.3)
    for number, kind in enumerate(("apart", "alike", "few", "apart", "few", "alike")):
        counts = run(selection, batches(kind, 60, number))
        before, after = counts.active_before / counts.steps, counts.active_after / counts.steps
        target = options.get("active", options.get("share", 0.0) * before)
        assert after == pytest.approx(target, rel=0.05), kind
        assert before > 1.05 * target  # there was something to hold
        assert counts.kept_mass_worst >= 0.3


def test_one_threshold_would_not_hold_it():
    """The test above can fail: the mass that is right for one kind of traffic is wrong for another."""
    strategy = lynx.make_strategy("importance-threshold", mass=0.6)
    selection = LayerSelection(layer_of(make_routing(experts=32, top_k=4)), strategy)
    counts = [run(selection, batches(kind, 20)) for kind in ("apart", "alike")]
    shares = [each.active_after / each.active_before for each in counts]
    assert abs(shares[0] - shares[1]) > 0.05


class TestBounds:
    def test_the_floor_comes_before_the_target(self):
        selection = attached(active=1.0, floor=0.7)
        counts = run(selection, batches("apart", 40))
        assert mass(selection) == pytest.approx(0.7, abs=1e-6)
        assert counts.kept_mass_worst >= 0.7 - 1e-6
        assert counts.active_after > 5 * counts.steps

    def test_beyond_what_there_is_routing_is_exact(self):
        selection = attached(active=32)
        run(selection, batches("few", 20))
        for routing in batches("few", 3, seed=1):
            result = selection(routing)
            assert_same(result.ids, routing.ids)
            assert_same(result.weights, routing.weights)

    @pytest.mark.parametrize("unreachable", ["few", "apart"])
    def test_what_could_not_be_reached_is_not_saved_up(self, unreachable):
        """After 300 steps at a bound, the way back is as long as after 100."""
        ways, reachable = [], {"few": "apart", "apart": "alike"}[unreachable]
        for steps in (100, 300):
            # fewer experts than the target are there at all; or more are due to the floor
            options = {"active": 26.0} if unreachable == "few" else {"active": 15.0, "floor": 0.6}
            selection = attached(**options)
            run(selection, batches(unreachable, steps))
            start = odds(selection)
            run(selection, batches(reachable, 12, seed=7))
            ways.append((start, odds(selection)))
        (at_100, back_100), (at_300, back_300) = ways
        assert at_100 == at_300
        assert back_300 == pytest.approx(back_100, abs=0.3)
        assert abs(back_300 - at_300) > 0.5

    def test_the_full_share_is_exact_from_the_first_step_on(self):
        selection = attached(share=1.0)
        counts = run(selection, batches("apart", 5))
        assert counts.rows_changed == 0

    @pytest.mark.parametrize("floor", [0.0, 1.0])
    def test_extreme_floors(self, floor):
        counts = run(attached(share=0.3, floor=floor), batches("apart", 10))
        assert (counts.rows_changed == 0) == (floor == 1.0)


class TestWhatMovesIt:
    def test_batches_that_stay_exact_move_nothing(self):
        selection = attached(share=0.7, min_tokens=4)
        run(selection, batches("apart", 5))
        before = selection.bound.state.clone()
        routing = make_routing(tokens=3, experts=32, top_k=4)
        selection(routing)
        selection(make_routing(tokens=6, experts=32, top_k=4, roles=[Role.PADDING] * 6))
        selection(make_routing(tokens=6, experts=32, top_k=4, phases=[Phase.PREFILL] * 6))
        selection.observe(routing)
        assert_same(selection.bound.state, before)

    def test_the_state_is_written_and_never_replaced(self):
        selection = attached(share=0.7)
        selection.place(torch.device("cpu"))
        place, values = selection.bound.state.data_ptr(), set()
        with torch.inference_mode():
            for routing in batches("apart", 4):
                selection(routing)
                values.add(odds(selection))
        run(selection, batches("apart", 1))
        assert selection.bound.state.data_ptr() == place
        assert len(values) > 1

    def test_two_ranks_that_see_the_same_stay_the_same(self):
        one, other = attached(share=0.7), attached(share=0.7)
        for routing in batches("alike", 30):
            results = [each(routing.copied()) for each in (one, other)]
            assert_same(results[0].ids, results[1].ids)
        assert_same(one.bound.state, other.bound.state)

    def test_a_reset_of_the_counters_leaves_it(self):
        selection = attached(share=0.7)
        run(selection, batches("apart", 20))
        before = selection.bound.state.clone()
        selection.counters.reset()
        assert_same(selection.bound.state, before)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
    def test_a_copy_goes_on_from_there_on_its_own(self, copied):
        selection = attached(share=0.7)
        run(selection, batches("apart", 20))
        other = copied(selection)
        assert_same(other.bound.state, selection.bound.state)
        before = other.bound.state.clone()
        run(selection, batches("alike", 5))
        assert_same(other.bound.state, before)

    def test_many_steps_in_one_call_are_taken_in_order(self):
        steps = list(batches("apart", 6))
        in_turn, at_once = attached(share=0.7), attached(share=0.7)
        results = [in_turn(step) for step in steps]
        together = at_once(stack(steps))
        for index, alone in enumerate(results):
            for name in ("ids", "weights", "lost", "lost_ids", "lost_weights"):
                assert_same(getattr(together, name)[index], getattr(alone, name))
        assert_same(at_once.bound.state, in_turn.bound.state)
        assert at_once.counters.read() == in_turn.counters.read()


class TestInsideWrappers:
    def test_each_size_of_batch_learns_from_its_own_steps(self):
        sizes = {2: {"name": "target-active", "share": 0.6}, 10: {"name": "target-active", "share": 0.8}}
        strategy = lynx.make_strategy({"name": "by-batch-size", "sizes": sizes})
        assert strategy.remembers()
        selection = LayerSelection(layer_of(make_routing(experts=32, top_k=4)), strategy)
        selection.place(torch.device("cpu"))
        small, large = (bound.state for _, bound in selection.bound._sizes)
        untouched = large.clone()
        counts = run(selection, batches("few", 40))
        assert_same(large, untouched)
        assert counts.active_after / counts.active_before == pytest.approx(0.6, rel=0.05)
        untouched = small.clone()
        counts = run(selection, batches("apart", 40))
        assert_same(small, untouched)
        assert counts.active_after / counts.active_before == pytest.approx(0.8, rel=0.05)

    def test_each_phase_learns_from_its_own_rows(self):
        both = {
            phase: {"name": "target-active", "share": share} for phase, share in (("decode", 0.5), ("prefill", 1.0))
        }
        strategy = lynx.make_strategy({"name": "phase-aware", **both})
        selection = LayerSelection(layer_of(make_routing(experts=32, top_k=4)), strategy)
        selection.place(torch.device("cpu"))
        prefill = selection.bound._by_phase[Phase.PREFILL].state.clone()
        run(selection, batches("apart", 10))
        assert_same(selection.bound._by_phase[Phase.PREFILL].state, prefill)
        assert selection.bound._by_phase[DECODE].state[2].item() == 10


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({}, "exactly one"),
        ({"active": 4, "share": 0.5}, "exactly one"),
        ({"active": 0.5}, "active"),
        ({"share": 2}, "share"),
    ],
)
def test_senseless_targets_are_refused(options, where):
    with pytest.raises(lynx.ConfigError, match=where):
        lynx.make_strategy("target-active", **options)


def test_a_target_beyond_the_layer_is_refused():
    with pytest.raises(lynx.ConfigError, match=r"active=33\.0, but layer 'layer' has E=32"):
        attached(active=33)
