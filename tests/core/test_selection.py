"""One layer's hot path: the gate, the phases, and what happens when something fails."""

import logging
import warnings
from typing import Literal

import pytest
import torch
from support import assert_same, at, layer_of

import lynx
from lynx.routing import Phase, Role
from lynx.selection import LayerSelection
from lynx.strategy import SelectionStrategy
from lynx.testing import make_routing

NAN = float("nan")
FIELDS = ("ids", "weights", "lost", "lost_ids", "lost_weights")


def select(routing, strategy=None, **options):
    strategy = strategy or lynx.make_strategy("batch-union", top=1)
    selection = LayerSelection(layer_of(routing), strategy, **options)
    return selection(routing), selection


def changed(routing, result):
    return (result.ids != routing.ids).any(-1).tolist()


def assert_untouched(routing, result):
    assert_same(result.ids, routing.ids)
    assert_same(result.weights, routing.weights)
    assert not result.lost.any()
    assert not result.lost_ids.any()
    assert not result.lost_weights.any()


class Failing(SelectionStrategy):
    name: str = "failing"

    def select(self, routing):
        raise ZeroDivisionError("no experts to speak of")


class Returns(SelectionStrategy):
    name: str = "returns"
    what: str

    def select(self, routing):
        return {"scores": routing.demand(), "row": routing.own.any(-1), "wide": routing.own[..., :3]}[self.what]


class TestMinTokens:
    @pytest.mark.parametrize(
        ("rows", "min_tokens", "selects"), [(1, 2, False), (2, 2, True), (3, 4, False), (1, 1, True)]
    )
    def test_too_few_open_rows_stay_exact(self, rows, min_tokens, selects):
        routing = make_routing(tokens=rows, experts=24, top_k=4)
        result, _ = select(routing, min_tokens=min_tokens)
        assert any(changed(routing, result)) == selects
        if not selects:
            assert_untouched(routing, result)

    def test_two_is_the_default(self):
        assert LayerSelection(layer_of(make_routing()), lynx.make_strategy("exact")).min_tokens == 2

    @pytest.mark.parametrize("other", [Role.PADDING, Role.EXACT])
    def test_only_open_rows_count(self, other):
        routing = make_routing(tokens=6, experts=24, top_k=4, roles=[Role.OPEN, *[other] * 5])
        assert_untouched(routing, select(routing)[0])

    def test_rows_of_an_exact_phase_do_not_count(self):
        routing = make_routing(tokens=6, experts=24, top_k=4, phases=[Phase.DECODE, *[Phase.PREFILL] * 5])
        assert_untouched(routing, select(routing)[0])

    def test_each_independent_batch_is_counted_by_itself(self):
        routing = make_routing(tokens=3, experts=24, top_k=4, batch=(2,))
        routing.role[0, 1:] = int(Role.PADDING)
        result, _ = select(routing)
        assert_same(result.ids[0], routing.ids[0])
        assert changed(at(routing, 1), at_result(result, 1)) == [True, True, True]


def at_result(result, index):
    return type(result)(*(getattr(result, name)[index] for name in FIELDS))


class TestPhases:
    def test_prefill_rows_are_exact_under_a_bare_strategy(self):
        phases = [Phase.PREFILL, Phase.DECODE, Phase.DECODE, Phase.PREFILL]
        routing = make_routing(tokens=4, experts=24, top_k=4, phases=phases, seed=3)
        result, _ = select(routing)
        assert changed(routing, result) == [False, True, True, False]

    def test_roles_are_not_changed_in_the_hosts_routing(self):
        routing = make_routing(tokens=4, phases=[Phase.PREFILL] * 4)
        before = routing.role.clone()
        select(routing)
        assert_same(routing.role, before)

    def test_an_observed_batch_is_only_counted(self):
        routing = make_routing(tokens=4, phases=[Phase.PREFILL] * 4)
        selection = LayerSelection(layer_of(routing), lynx.make_strategy("batch-union", top=1))
        assert selection.observe(routing) is None
        counts = selection.counters.read()[Phase.PREFILL]
        assert (counts.steps, counts.exact_steps, counts.exact_rows, counts.open_rows) == (1, 1, 4, 0)
        assert counts.active_before == counts.active_after == len(routing.ids.unique())


class TestFailingStrategies:
    def test_the_models_routing_is_used_and_the_failure_counted_and_told_once(self, caplog):
        routing = make_routing(tokens=4, experts=8, top_k=2)
        selection = LayerSelection(layer_of(routing), Failing())
        caplog.set_level(logging.DEBUG, "lynx")
        with pytest.warns(lynx.LynxWarning) as told:
            results = [selection(routing) for _ in range(3)]
        for result in results:
            assert_untouched(routing, result)
        assert selection.counters.failures == 3
        assert len(told) == 1
        message = "the strategy failed in layer 'layer' and the model's own routing is used there"
        assert str(told[0].message) == f"{message}: ZeroDivisionError: no experts to speak of"
        logged = [record.getMessage() for record in caplog.records]
        assert logged == ["lynx.strategy_failed layer=layer error=ZeroDivisionError: no experts to speak of"]

    def test_steps_still_count(self):
        routing = make_routing(tokens=4, experts=8, top_k=2)
        selection = LayerSelection(layer_of(routing), Failing())
        with pytest.warns(lynx.LynxWarning):
            selection(routing)
        counts = selection.counters.read()[Phase.DECODE]
        assert (counts.steps, counts.rows_changed, counts.kept_mass) == (1, 0, 4.0)
        assert counts.active_before == counts.active_after

    @pytest.mark.parametrize(
        ("what", "told"), [("scores", "torch.float32 (8,)"), ("row", "torch.bool (4,)"), ("wide", "torch.bool (4, 3)")]
    )
    def test_a_wrong_shape_or_type_is_a_failure_too(self, what, told):
        routing = make_routing(tokens=4, experts=8, top_k=2)
        with pytest.warns(lynx.LynxWarning, match="StrategyError") as warned:
            result, selection = select(routing, Returns(what=what))
        assert_untouched(routing, result)
        assert told in str(warned[0].message)
        assert selection.counters.failures == 1

    def test_a_process_that_is_stopped_is_not_a_failure(self):
        class Stopped(SelectionStrategy):
            name: str = "stopped"

            def select(self, routing):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            select(make_routing(), Stopped())


class TestScoresThatAreNotFinite:
    @pytest.mark.parametrize("field", ["logits", "choice", "weights"])
    @pytest.mark.parametrize("value", [NAN, float("inf")])
    def test_such_a_row_keeps_the_models_routing(self, field, value):
        routing = make_routing(tokens=4, experts=24, top_k=4)
        getattr(routing, field)[1, 2] = value
        routing = type(routing)(
            *(getattr(routing, n) for n in ("choice", "logits", "ids", "weights", "role", "phase", "rule"))
        )
        result, selection = select(routing)
        assert_same(result.ids[1], routing.ids[1])
        assert_same(result.weights[1], routing.weights[1])
        others = [0, 2, 3]
        assert torch.isfinite(result.weights[others]).all()
        assert any(changed(routing, result))
        assert selection.counters.read()[Phase.DECODE].unsound_rows == 1
        assert selection.counters.failures == 0

    def test_others_see_it_as_an_exact_row(self):
        routing = make_routing(tokens=4, experts=24, top_k=4, seed=5)
        exact = make_routing(tokens=4, experts=24, top_k=4, seed=5, roles=[2, 1, 2, 2])
        routing.logits[1] = routing.choice[1] = NAN
        result, expected = select(routing)[0], select(exact)[0]
        for name in FIELDS:
            assert_same(getattr(result, name), getattr(expected, name))

    def test_a_forbidden_expert_is_sound(self):
        routing = make_routing("grouped", tokens=4, experts=24, top_k=4)
        assert (routing.choice == -torch.inf).any()
        result, selection = select(routing)
        assert any(changed(routing, result))
        assert selection.counters.read()[Phase.DECODE].unsound_rows == 0

    def test_padding_is_not_counted(self):
        routing = make_routing(tokens=3, experts=24, top_k=4, roles=[2, 2, 0])
        routing.logits[2] = NAN
        _, selection = select(routing)
        assert selection.counters.read()[Phase.DECODE].unsound_rows == 0


def test_a_layer_binds_once():
    bound = []

    class Binds(SelectionStrategy):
        name: str = "binds"

        def bind(self, layer):
            bound.append(layer)
            return self

        def select(self, routing):
            return routing.wanted

    routing = make_routing(tokens=3)
    selection = LayerSelection(layer_of(routing), Binds())
    for _ in range(3):
        selection(routing)
    assert bound == [layer_of(routing)]


def test_nothing_is_warned_about_without_a_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(make_routing())


def test_no_rows_at_all():
    routing = make_routing(tokens=0)
    result, selection = select(routing)
    assert result.ids.shape == (0, 4)
    assert selection.counters.read()[Phase.DECODE].steps == 0


class Vandal(SelectionStrategy):
    """Writes over everything it is given, then keeps all."""

    name: Literal["vandal"] = "vandal"

    def select(self, routing):
        for tensor in (routing.choice, routing.logits, routing.weights, routing.ids, routing.role):
            tensor.zero_()
        return torch.ones(routing.num_experts, dtype=torch.bool)


def test_a_strategy_that_writes_into_its_input_changes_nothing():
    routing = make_routing(tokens=6, experts=8, top_k=2)
    before = [tensor.clone() for tensor in (routing.choice, routing.ids, routing.weights, routing.role)]
    info = layer_of(routing)
    result = LayerSelection(info, Vandal())(routing)
    for tensor, same in zip((routing.choice, routing.ids, routing.weights, routing.role), before, strict=True):
        assert torch.equal(tensor, same)
    assert torch.equal(result.ids, before[1])
    assert torch.equal(result.weights, before[2])


def test_generation_goes_on_where_warnings_are_errors():
    class Broken(SelectionStrategy):
        name: Literal["broken"] = "broken"

        def select(self, routing):
            raise ValueError("no")

    routing = make_routing(tokens=6, experts=8, top_k=2)
    selection = LayerSelection(layer_of(routing), Broken())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = selection(routing)
    assert torch.equal(result.ids, routing.ids)
    assert selection.counters.failures == 1


def test_counting_does_not_depend_on_the_default_dtype():
    routing = make_routing(tokens=6, experts=8, top_k=2)
    torch.set_default_dtype(torch.float64)
    try:
        selection = LayerSelection(layer_of(routing), lynx.make_strategy("batch-union", top=1))
        selection(routing)
    finally:
        torch.set_default_dtype(torch.float32)
    assert selection.counters.read()[lynx.Phase.DECODE].steps == 1


def test_protecting_more_than_a_token_has_is_refused():
    routing = make_routing(tokens=6, experts=8, top_k=2)
    info = layer_of(routing)
    nested = {"name": "phase-aware", "decode": {"name": "batch-union", "top": 1, "protect": 3}}
    for strategy in (lynx.make_strategy("batch-union", top=1, protect=3), lynx.make_strategy(nested)):
        with pytest.raises(lynx.ConfigError, match=r"protect=3.*k=2"):
            LayerSelection(info, strategy)
