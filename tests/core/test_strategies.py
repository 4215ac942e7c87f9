"""Each built-in strategy against its own words, said again by the oracle; and what it refuses."""

import re

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import layer_of, members, routing_of

import lynx
from lynx.plugins import registry
from lynx.routing import Phase, WeightRule
from lynx.selection import LayerSelection
from lynx.strategy import LayerInfo, SelectionStrategy, Wrapper
from lynx.testing import make_routing
from lynx.testing.routings import specs

PREFILL, DECODE = Phase.PREFILL, Phase.DECODE
LAYER = LayerInfo("model.layers.3.mlp.gate", 3, 8, 4, WeightRule(), num_layers=6)


def run(strategy, routing, index=0):
    return LayerSelection(layer_of(routing, index), strategy, min_tokens=1)(routing)


def expected_rows(draw, name, batch, experts, top_k):
    """Draw options; return the strategy and the oracle's rows. `batch` has prefill rows made exact."""
    protect = draw(st.integers(0, min(2, top_k)))
    refill = draw(st.sampled_from(["re-pick", "none"]))
    floor = draw(st.sampled_from([0.0, 0.0, 0.53, 0.87]))
    common = {"protect": protect, "refill": refill, "floor": floor}
    if name in ("batch-union", "static-top"):
        top = draw(st.integers(1, top_k))
        wants = reference.wants_by_rank(batch, top)
        active = reference.union(wants) if name == "batch-union" else wants
        options = {"top": top}
    elif name == "importance-threshold":
        options = draw(st.sampled_from([{"ratio": 0.27}, {"ratio": 0.61}, {"mass": 0.37}, {"mass": 0.83}]))
        ((key, value),) = options.items()
        wants = {"ratio": reference.wants_by_ratio, "mass": reference.wants_by_mass}[key](batch, value)
        active = reference.union(wants)
    elif name == "top-budget":
        utility = draw(st.sampled_from(["count", "own-mass", "normalised-own-mass"]))
        options = {"budget": draw(st.integers(1, experts)), "utility": utility}
        active = reference.most_wanted(batch, reference.demand(batch, utility), options["budget"], 0, protect)
    elif name == "popularity":
        options = {"drop": draw(st.integers(0, experts))}
        active = reference.most_wanted(batch, reference.demand(batch, "count"), None, options["drop"], protect)
    elif name == "affinity-binning":
        budget, alpha, beta = draw(st.integers(1, experts)), draw(st.sampled_from([0.7, 1.9])), draw(st.integers(1, 5))
        options = {"budget": budget, "alpha": alpha, "beta": beta}
        score = reference.binned_affinity(batch, alpha, beta)
        active = reference.most_wanted(batch, score, budget, 0, protect)
    elif name == "coverage":
        utility = draw(st.sampled_from(["count", "own-mass", "normalised-own-mass"]))
        options = {"share": draw(st.sampled_from([0.0, 0.31, 0.57, 0.83, 1.0])), "utility": utility}
        active = reference.covering(batch, reference.demand(batch, utility), options["share"], protect)
    elif name == "pooled-threshold":
        options = {
            "least": draw(st.sampled_from([0.0, 0.13, 0.29, 0.47, 1.0])),
            "power": draw(st.sampled_from([1, 2, 4])),
            "certainty": draw(st.sampled_from([0.0, 0.6, 1.0, 2.0])),
        }
        active = reference.pooled(batch, **options)
    else:
        options, active = {}, batch.wanted()
    least = reference.wants_by_mass(batch, floor)
    if isinstance(active, dict):
        active = [active[t] | least[t] if t in active else set() for t in range(len(batch.role))]
    else:
        active = active | reference.union(least)
    strategy = lynx.make_strategy(name, **options, **common)
    return strategy, reference.reroute(batch, active, refill == "re-pick", protect)


@pytest.mark.parametrize(
    "name",
    [
        "batch-union",
        "static-top",
        "importance-threshold",
        "top-budget",
        "coverage",
        "pooled-threshold",
        "popularity",
        "affinity-binning",
        "exact",
    ],
)
@settings(max_examples=100)
@given(data=st.data(), spec=specs())
def test_strategies_do_what_they_say(name, data, spec):
    routing = spec.build()
    # a bare strategy acts on decode rows only
    batch = reference.Batch.of(routing).acting_on(DECODE)
    try:
        strategy, expected = expected_rows(data.draw, name, batch, spec.experts, spec.top_k)
    except reference.Ambiguous:
        assume(False)
    result = run(strategy, routing)
    assert result.ids.tolist() == [row.ids for row in expected]
    assert result.lost.tolist() == [row.lost for row in expected]


def test_every_strategy_is_held_to_the_oracle_here():
    simple = {name for name, found in registry().strategies.items() if issubclass(found.cls, SelectionStrategy)}
    wrappers = {name for name, found in registry().strategies.items() if issubclass(found.cls, Wrapper)}
    assert simple == {
        "affinity-binning",
        "batch-union",
        "coverage",
        "exact",
        "importance-threshold",
        "pooled-threshold",
        "popularity",
        "static-top",
        "target-active",  # in test_target_active.py
        "top-budget",
    }
    assert wrappers == {"by-batch-size", "per-layer", "phase-aware"}


class TestBinding:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"name": "batch-union", "top": 5}, "top=5, but layer 'model.layers.3.mlp.gate' has k=4"),
            ({"name": "static-top", "top": 5}, "top=5, but layer 'model.layers.3.mlp.gate' has k=4"),
            ({"name": "top-budget", "budget": 9}, "budget=9, but layer 'model.layers.3.mlp.gate' has E=8"),
            ({"name": "affinity-binning", "budget": 9}, "budget=9, but layer 'model.layers.3.mlp.gate' has E=8"),
        ],
        ids=lambda value: value["name"] if isinstance(value, dict) else "",
    )
    def test_options_beyond_the_layer_are_refused(self, options, message):
        with pytest.raises(lynx.ConfigError, match=re.escape(message)):
            lynx.make_strategy(options).bind(LAYER)
        at_the_limit = {key: value - 1 if isinstance(value, int) else value for key, value in options.items()}
        lynx.make_strategy(at_the_limit).bind(LAYER)

    @pytest.mark.parametrize(
        ("name", "options", "where"),
        [
            ("top-budget", {"budget": 0}, "budget"),
            ("top-budget", {}, "budget"),
            ("top-budget", {"budget": 2, "utility": "votes"}, "utility"),
            ("affinity-binning", {"budget": 0}, "budget"),
            ("affinity-binning", {"budget": 2, "alpha": 0}, "alpha"),
            ("affinity-binning", {"budget": 2, "beta": 0}, "beta"),
            ("batch-union", {"top": 0}, "top"),
            ("static-top", {"top": 0}, "top"),
            ("popularity", {"drop": -1}, "drop"),
            ("batch-union", {"protect": -1}, "protect"),
            ("batch-union", {"refill": "some"}, "refill"),
            ("batch-union", {"floor": 1.1}, "floor"),
            ("coverage", {"share": 1.1}, "share"),
            ("pooled-threshold", {"least": -0.1}, "least"),
            ("pooled-threshold", {"power": 0}, "power"),
            ("importance-threshold", {}, "exactly one of `ratio` and `mass`"),
            ("importance-threshold", {"ratio": 0.5, "mass": 0.5}, "exactly one of `ratio` and `mass`"),
            ("importance-threshold", {"ratio": 1.1}, "ratio"),
            ("importance-threshold", {"mass": 0.0}, "mass"),
            ("phase-aware", {}, "give a strategy for `decode`"),
            ("per-layer", {"default": "exact", "strategies": {}}, "names no layer"),
            ("per-layer", {"default": "exact", "strategies": {-1: "exact"}}, "counted from 0"),
            ("by-batch-size", {"sizes": {}}, "empty"),
            ("by-batch-size", {"sizes": {0: "exact"}}, "at least 1"),
        ],
    )
    def test_senseless_options_are_refused(self, name, options, where):
        with pytest.raises(lynx.ConfigError, match=re.escape(where)):
            lynx.make_strategy(name, **options)

    @pytest.mark.parametrize(
        "wrapper",
        [
            {"name": "per-layer", "default": "exact", "strategies": {0: {"name": "phase-aware", "decode": "exact"}}},
            {"name": "by-batch-size", "sizes": {2: {"name": "phase-aware", "prefill": "exact"}}},
            {"name": "phase-aware", "decode": {"name": "phase-aware", "decode": "exact"}},
        ],
        ids=lambda wrapper: wrapper["name"],
    )
    def test_phases_are_chosen_outermost(self, wrapper):
        with pytest.raises(lynx.ConfigError, match="put 'phase-aware' outside"):
            lynx.make_strategy(wrapper)


THREE_TOKENS = {
    "choice": [[4.0, 3.0, 0.0, -1.0], [0.0, 4.0, 3.5, -1.0], [3.0, 0.0, 4.0, -1.0]],
    "ids": [[0, 1], [2, 1], [2, 0]],
    "weights": [[0.7310586, 0.2689414], [0.3775407, 0.6224593], [0.7310586, 0.2689414]],
}


class TestByHand:
    """Three tokens, four experts: token 0 wants 0 and 1, token 1 wants 1 and 2, token 2 wants 2 and 0."""

    @pytest.mark.parametrize(
        ("options", "kept"),
        [
            ({"name": "batch-union", "top": 1}, {0, 1, 2}),
            ({"name": "importance-threshold", "ratio": 0.5, "protect": 0}, {0, 1, 2}),
            # shares: 0 has .73 + .27, 1 has .27 + .62, 2 has .38 + .73
            ({"name": "top-budget", "budget": 1, "protect": 0}, {2}),
            ({"name": "top-budget", "budget": 2, "protect": 0}, {0, 2}),
            # of 3 votes the best has 1.11, and with the next it is 2.11
            ({"name": "coverage", "share": 0.36, "protect": 0}, {2}),
            ({"name": "coverage", "share": 0.38, "protect": 0}, {0, 2}),
            ({"name": "coverage", "share": 0.75, "protect": 0}, {0, 1, 2}),
            # tokens have .73 on 0, .62 on 1 and .73 on 2; 0 has .27 of another
            ({"name": "batch-union", "top": 1, "floor": 0.7}, {0, 1, 2}),
            ({"name": "top-budget", "budget": 1, "protect": 0, "floor": 0.5}, {0, 1, 2}),
            # two wish for each: the lowest ids stay
            ({"name": "top-budget", "budget": 2, "protect": 0, "utility": "count"}, {0, 1}),
            ({"name": "popularity", "drop": 1, "protect": 0}, {0, 1}),
            ({"name": "popularity", "drop": 1}, {0, 1, 2}),
            # best bins: 0 -> 1 vote of 1; 1 -> 1; 2 -> 1; one bin lower with base 3: 0 and 1 have 1/3, 2 has 1/3
            ({"name": "affinity-binning", "budget": 2, "protect": 0}, {0, 1}),
            # alpha 2 puts gaps of 1 two bins down and the gap of .5 only one: 2 is ahead
            ({"name": "affinity-binning", "budget": 1, "protect": 0, "alpha": 2.0}, {2}),
            ({"name": "exact"}, {0, 1, 2}),
        ],
        ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
    )
    def test_what_is_kept(self, options, kept):
        routing = routing_of(**THREE_TOKENS)
        decision = lynx.make_strategy(options).bind(layer_of(routing)).keep(routing)
        assert members(decision.active[0]) == kept

    def test_mass_is_covered_and_no_more(self):
        routing = routing_of([[4.0, 3.0, 2.0, 1.0]], [[0, 1, 2, 3]], [[0.5, 0.25, 0.15, 0.1]])
        for mass, kept in [
            (0.4, {0}),
            (0.5, {0}),
            (0.51, {0, 1}),
            (0.75, {0, 1}),
            (0.8, {0, 1, 2}),
            (1.0, {0, 1, 2, 3}),
        ]:
            strategy = lynx.make_strategy("importance-threshold", mass=mass)
            assert members(strategy.keep(routing).active[0]) == kept

    def test_the_full_mass_keeps_experts_of_weight_zero(self):
        routing = routing_of([[4.0, 3.0, 2.0]], [[0, 1, 2]], [[1.0, 0.0, 0.0]])
        assert members(lynx.make_strategy("importance-threshold", mass=1.0).keep(routing).active[0]) == {0, 1, 2}

    @pytest.mark.parametrize("protect", [0, 1, 2, 3, 4])
    @pytest.mark.parametrize("name", ["static-top", "batch-union"])
    def test_protected_experts_stay_with_and_without_sharing(self, name, protect):
        routing = make_routing(tokens=5, experts=24, top_k=4, seed=6)
        result = run(lynx.make_strategy(name, top=1, protect=protect, refill="none"), routing)
        lost = result.lost.sum(-1).tolist()
        kept = max(protect, 1)
        if name == "static-top":
            assert lost == [4 - kept] * 5
        else:  # others may keep more for a token
            assert max(lost) <= 4 - kept
        assert (result.lost & (routing.slot_rank < kept)).sum() == 0

    def test_votes_count_by_priority(self):
        routing = make_routing(tokens=6, experts=12, top_k=3, priority=True, seed=2)
        heavy = torch.full((6,), 1e-3)
        heavy[4] = 1.0
        object.__setattr__(routing, "priority", heavy)
        favourite = members(routing.own[4])
        for name, options in [
            ("top-budget", {}),
            ("top-budget", {"utility": "count"}),
            ("coverage", {"share": 0.9}),
            ("affinity-binning", {"beta": 1}),
        ]:
            budget = {} if name == "coverage" else {"budget": 3}
            strategy = lynx.make_strategy(name, protect=0, **budget, **options)
            assert members(strategy.bind(layer_of(routing)).keep(routing).active[0]) == favourite


def test_an_author_must_override_something():
    class Empty(SelectionStrategy):
        name: str = "empty"

    with pytest.raises(lynx.StrategyError, match="overrides neither rule\\(\\) nor select\\(\\)"):
        Empty().select(make_routing())


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (lambda r: r.demand(), "torch.float32 (16,)"),
        (lambda r: r.own.any(-1), "torch.bool (8,)"),
        (lambda r: r.own.unsqueeze(0), "torch.bool (1, 8, 16)"),
        (lambda r: r.wanted.tolist(), "list"),
        (lambda r: None, "NoneType"),
    ],
)
def test_a_wrong_answer_is_told_with_what_was_expected(returned, told):
    class Wrong(SelectionStrategy):
        name: str = "wrong"

        def select(self, routing):
            return returned(routing)

    message = re.escape(f"strategy 'wrong' returned {told}; select() must return a bool tensor of shape (16,)")
    with pytest.raises(lynx.StrategyError, match=message):
        Wrong().keep(make_routing())


def test_examples_and_knobs_are_documented_by_their_fields():
    for name, found in registry().strategies.items():
        cls = found.cls
        assert cls.example().name == name == cls.registered_name()
        assert cls.__doc__
        assert "Source:" in cls.__doc__
        if cls.knob is not None:
            assert cls.knob.option in cls.model_fields
        for option, field in cls.model_fields.items():
            assert option == "name" or field.description, f"{name}: {option} has no description"


def test_knob_steps():
    knob = lynx.Knob("top", fewest=1, full="k")
    assert knob.steps(LAYER, 4) == [1, 2, 3, 4]
    assert knob.steps(LAYER, 9) == [1, 2, 3, 4]
    assert lynx.Knob("ratio", fewest=1.0, full=0.0).steps(LAYER, 3) == [1.0, 0.5, 0.0]
    assert lynx.Knob("drop", fewest="E", full=0).steps(LAYER, 3) == [8, 4, 0]
