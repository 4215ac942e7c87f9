"""Holding a time per output token: what a control does with the times of steps, on a clock that the tests turn."""

import copy
import itertools
import math
import pickle
import random
import statistics

import pytest
import torch
from support import assert_same, layer_of

import lynx
from lynx.counters import Phase
from lynx.selection import LayerSelection
from lynx.strategy import steered
from lynx.testing import make_routing
from lynx.tpot import TpotControl

LEAST = {"share": 0.3, "floor": 0.3}


def traffic(kind, count, seed=0):
    """Decode steps whose tokens differ, agree, or are fewer."""
    tokens, skew = {"apart": (16, 0.0), "alike": (16, 1.0), "few": (9, 0.0)}[kind]
    common = torch.randn(32, generator=torch.Generator().manual_seed(len(kind)))
    for step in range(count):
        routing = make_routing(tokens=tokens, experts=32, top_k=4, seed=1000 * seed + step, skew=0.0, renormalise=True)
        logits = routing.logits + skew * common
        ids = logits.topk(4).indices
        weights = torch.softmax(logits.gather(-1, ids), -1)
        yield lynx.Routing(logits, logits, ids, weights, routing.role, routing.phase, routing.rule)


class Machine:
    """Two layers under a strategy; a step takes ``constant`` and a second for each expert that is active in a layer."""

    def __init__(self, target, noise=0.0, **options):
        strategy = lynx.make_strategy("target-active", **(options or LEAST))
        layer = layer_of(make_routing(experts=32, top_k=4))
        self.layers = [LayerSelection(layer, strategy) for _ in range(2)]
        self.control = TpotControl(target, [s for each in self.layers for s in steered(each.bound)])
        self.chance, self.noise = random.Random(0), noise

    def run(self, constant, steps):
        """The seconds of each step."""
        taken = []
        for routing in steps:
            active = 0
            for layer in self.layers:
                layer.counters.reset()
                layer(routing)
                active += layer.counters.read()[Phase.DECODE].active_after
            taken.append((constant + active / 2) * (1 + self.chance.gauss(0, self.noise)))
            self.control.took(taken[-1], routing.choice.shape[0])
        return taken


class TestTheTimeIsHeld:
    @pytest.mark.parametrize("noise", [0.0, 0.1])
    @pytest.mark.parametrize(
        ("constant", "target", "options"),
        [
            (5, 20, LEAST),
            (60, 75, LEAST),  # experts are a small part of a step
            (0, 14, {"share": 0.2, "floor": 0.1}),  # they are all of it
            (5, 20, {"active": 9, "floor": 0.3}),
        ],
        ids=["half of it", "a small part", "all of it", "a count"],
    )
    def test_within_some_tens_of_steps(self, constant, target, options, noise):
        machine = Machine(target, noise, **options)
        machine.run(constant, traffic("apart", 40))
        taken = machine.run(constant, traffic("apart", 40, seed=1))
        assert statistics.mean(taken) == pytest.approx(target, rel=0.05)
        assert machine.control.limit is None
        assert machine.control.reached

    def test_over_changes_of_the_machine_and_of_the_traffic(self):
        """A window of 40 steps, 20 after each change."""
        machine = Machine(20.0)
        positions = []
        for number, (constant, kind) in enumerate(
            [(5, "apart"), (6.5, "apart"), (5, "alike"), (8, "few"), (5, "apart")]
        ):
            machine.run(constant, traffic(kind, 20, 2 * number))
            taken = machine.run(constant, traffic(kind, 40, 2 * number + 1))
            assert statistics.mean(taken) == pytest.approx(20.0, rel=0.05), (constant, kind)
            positions.append(machine.control.position)
        assert max(positions) - min(positions) > 0.2  # one position would not have done

    def test_a_target_may_be_changed_at_any_time(self):
        machine = Machine(20.0)
        machine.run(5, traffic("apart", 40))
        machine.control.target = 24.0
        machine.run(5, traffic("apart", 40, 1))
        assert statistics.mean(machine.run(5, traffic("apart", 40, 2))) == pytest.approx(24.0, rel=0.05)


class TestEnds:
    def test_where_there_is_time_routing_becomes_exact(self):
        machine = Machine(60.0)
        machine.run(5, traffic("apart", 80))
        assert (machine.control.position, machine.control.limit) == (1.0, "exact")
        machine.layers[0].counters.reset()
        machine.run(5, traffic("apart", 5, 1))
        counts = machine.layers[0].counters.read()[Phase.DECODE]
        assert counts.active_after == counts.active_before

    def test_where_it_cannot_be_reached_the_configured_target_holds_and_it_is_said_once(self, caplog):
        machine = Machine(10.0, share=0.6, floor=0.3)
        machine.run(5, traffic("apart", 40))
        assert "not_reached" not in caplog.text  # it may yet come
        taken = machine.run(5, traffic("apart", 100, 1))
        assert machine.control.limit == "targets"
        assert not machine.control.reached
        shares = []
        for routing in traffic("apart", 20, 2):
            machine.layers[0].counters.reset()
            machine.run(5, [routing])
            counts = machine.layers[0].counters.read()[Phase.DECODE]
            assert counts.kept_mass_worst >= 0.3 - 1e-6
            shares.append(counts.active_after / counts.active_before)
        assert statistics.mean(shares) == pytest.approx(0.6, rel=0.05)
        said = [record.message for record in caplog.records if "tpot" in record.message]
        assert len(said) == 1
        assert said[0].startswith("lynx.tpot_not_reached target_ms=10000.0 measured_ms=")
        assert float(said[0].rpartition("=")[2]) == pytest.approx(1e3 * statistics.mean(taken), rel=0.05)

    @pytest.mark.parametrize(("constant", "back"), [(60, 5), (0, 9)], ids=["too slow", "too fast"])
    def test_nothing_is_saved_up_at_an_end(self, constant, back):
        """After 300 steps at an end the way back is as long as after 60."""
        ways = []
        for steps in (60, 300):
            machine = Machine(20.0 if constant else 33.0)
            machine.run(constant, traffic("apart", steps))
            assert machine.control.limit is not None
            machine.run(back, traffic("apart", 15, 1))
            ways.append(machine.control.position)
        assert ways[0] == pytest.approx(ways[1], abs=0.05)
        assert 0.0 < ways[0] < 1.0

    def test_one_step_that_waited_for_something_moves_little(self):
        machine = Machine(20.0)
        machine.run(5, traffic("apart", 60))
        before = machine.control.position
        machine.control.took(2000.0, 16)
        assert 0.0 < before - machine.control.position <= 0.1 + 1e-9


class TestWhatMovesIt:
    def test_it_starts_as_configured_and_stays_there_until_a_step_is_timed(self):
        machine, alone = Machine(1e9), Machine(1e9)
        for routing in traffic("apart", 20):
            results = [each.layers[0](routing) for each in (machine, alone)]
            assert_same(results[0].ids, results[1].ids)
        plain = LayerSelection(
            layer_of(make_routing(experts=32, top_k=4)), lynx.make_strategy("target-active", **LEAST)
        )
        for routing in traffic("apart", 20):
            plain(routing)
        assert_same(machine.layers[0].bound.state[:4], plain.bound.state[:4])
        assert machine.control.position == 0.0

    def test_steps_of_fewer_rows_than_min_tokens_move_nothing(self):
        control = TpotControl(1.0, [], min_tokens=4)
        for _ in range(100):
            control.took(100.0, 3)
            control.took(0.01, 3)
        assert (control.steps, control.position, control.measured) == (0, 0.0, None)
        control.took(0.5, 4)
        control.took(0.5)
        assert control.steps == 2

    @pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
    def test_what_is_no_time_is_refused(self, seconds):
        with pytest.raises(lynx.ConfigError, match="a number of seconds"):
            TpotControl(1.0, []).took(seconds)

    def test_hooks_time_from_step_to_step_and_not_over_a_break(self):
        times = iter([0.0, 1.0, 2.0, 50.0, 51.5])
        control = TpotControl(2.0, [], clock=lambda: next(times))
        seen = []
        control._learn = lambda seconds, rows: seen.append((seconds, rows))
        control.begins(8)
        control.begins(8)
        control.begins(6)
        control.breaks()
        control.begins(4)
        control.begins(4)
        assert seen == [(1.0, 8), (1.0, 8), (1.5, 4)]

    def test_who_tells_the_times_silences_the_hooks(self):
        times = itertools.count()
        control = TpotControl(2.0, [], clock=lambda: float(next(times)))
        control.begins(8)
        control.took(1.0)
        control.begins(8)
        control.breaks()
        control.begins(8)
        assert (control.steps, next(times)) == (1, 1)

    def test_as_a_streamer_it_times_decode_steps_alone(self):
        """`generate` gives it the prompt, then the tokens of each step, of which the first is the prefill's."""
        times = iter([10.0, 11.0, 13.0, 100.0, 101.0])
        control = TpotControl(2.0, [], clock=lambda: next(times))
        seen = []
        control._learn = lambda seconds, rows: seen.append((seconds, rows))
        for tokens in (torch.zeros(3, 7), torch.zeros(3), torch.zeros(3), torch.zeros(3)):
            control.put(tokens)
        control.end()
        for tokens in (torch.zeros(2, 7), torch.zeros(2), torch.zeros(2)):
            control.put(tokens)
        assert seen == [(1.0, 3), (2.0, 3), (1.0, 2)]


class TestWhatIsWritten:
    def test_the_state_is_written_and_never_replaced(self):
        machine = Machine(20.0)
        for layer in machine.layers:
            layer.place(torch.device("cpu"))
        places = [layer.bound.state.data_ptr() for layer in machine.layers]
        with torch.inference_mode():
            machine.run(5, traffic("apart", 10))
        machine.run(5, traffic("apart", 10, 1))
        assert [layer.bound.state.data_ptr() for layer in machine.layers] == places
        assert machine.layers[0].bound.state[4] == machine.layers[1].bound.state[4] > 0

    def test_little_is_written_once_the_time_is_held(self):
        """A launch in every layer and step would cost what selection saves."""
        machine, writes = Machine(20.0), []
        machine.run(5, traffic("apart", 60))
        for each in machine.control._steered:
            each.steer = writes.append
        machine.run(5, traffic("apart", 100, 1))
        assert 0 < len(writes) <= 2 * 25

    def test_ends_are_written_however_near(self):
        found = []

        class Layer:
            def steer(self, position):
                found.append(position)

        control = TpotControl(1.0, [Layer()])
        control.position = control._written = 0.995
        for _ in range(12):
            control.took(0.9)
        assert found == [1.0]

    def test_what_was_steered_before_the_state_is_on_a_device_counts(self):
        bound = Machine(1.0).layers[0].bound
        bound.steer(0.25)
        bound.place(torch.device("cpu"))
        assert bound.state[4] == 0.25

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
    def test_a_copy_steers_its_own_layers(self, copied):
        machine = Machine(20.0)
        machine.run(5, traffic("apart", 20))
        other = copied(machine)
        before = machine.control.position, machine.layers[0].bound.state.clone()
        other.run(50, traffic("apart", 20, 1))
        assert other.layers[0].bound.state[4] == other.control.position == 0.0
        assert machine.control.position == before[0] > 0
        assert_same(machine.layers[0].bound.state, before[1])


class TestWhatIsSteered:
    def test_targets_inside_wrappers(self):
        held = {"name": "target-active", "share": 0.5}
        sizes = {"name": "by-batch-size", "sizes": {2: held, 8: "exact", 16: held}}
        strategy = lynx.make_strategy({"name": "phase-aware", "decode": sizes, "prefill": held})
        # those of both sizes of decode; what a step of it takes says nothing of prefill
        assert len(steered(strategy.bind(layer_of(make_routing(experts=32, top_k=4))))) == 2

    def test_each_layer_goes_from_its_own_target(self):
        layers = {"name": "per-layer", "default": {"name": "target-active", "share": 0.4}, "strategies": {}}
        layers["strategies"] = {1: {"name": "target-active", "share": 0.8}}
        routing = make_routing(experts=32, top_k=4)
        shares = []
        for index in (0, 1):
            layer = LayerSelection(layer_of(routing, index), lynx.make_strategy(layers))
            (bound,) = steered(layer.bound)
            bound.steer(0.5)
            for step in traffic("apart", 40):
                layer(step)
            layer.counters.reset()
            for step in traffic("apart", 40, 1):
                layer(step)
            counts = layer.counters.read()[Phase.DECODE]
            shares.append(counts.active_after / counts.active_before)
        assert shares == pytest.approx([0.7, 0.9], rel=0.05)

    @pytest.mark.parametrize("value", [0, -1, "soon"])
    def test_what_is_no_time_is_refused(self, value):
        with pytest.raises(lynx.ConfigError, match="tpot_ms"):
            lynx.Config.build({"strategy": {"name": "target-active", "share": 0.5}, "tpot_ms": value})


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_target_that_is_no_time_is_refused(seconds):
    control = TpotControl(0.02, [])
    with pytest.raises(lynx.ConfigError, match="above 0"):
        control.target = seconds
    assert control.target == 0.02
    with pytest.raises(lynx.ConfigError):
        lynx.Config(strategy="target-active", tpot_ms=1e3 * seconds)


def test_nothing_is_steered_where_only_prefill_has_targets():
    model = lynx.load_reference_model().model
    strategy = {"name": "phase-aware", "prefill": {"name": "target-active", **LEAST}, "decode": "exact"}
    with pytest.raises(lynx.ConfigError, match="has none"):
        lynx.attach(model, strategy, tpot_ms=20)
