"""The strategies that choose between others: by phase, by layer, by how many rows are open."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import at, layer_of, routing_of

import lynx
from lynx.routing import Phase, Role, WeightRule
from lynx.selection import LayerSelection
from lynx.strategies import PhaseAware
from lynx.strategy import LayerInfo
from lynx.testing import make_routing
from lynx.testing.routings import specs

PREFILL, DECODE = Phase.PREFILL, Phase.DECODE
LAYER = LayerInfo("model.layers.3.mlp.gate", 3, 8, 4, WeightRule(), num_layers=6)


def run(strategy, routing, index=0):
    return LayerSelection(layer_of(routing, index), strategy, min_tokens=1)(routing)


CHOICE = [[4.0, 3.0, 0.0, -1.0], [0.0, -1.0, 4.0, 3.0]]
IDS = [[0, 1], [2, 3]]
WEIGHTS = [[0.7, 0.3], [0.7, 0.3]]


class TestPhaseAware:
    def routing(self, phases):
        return routing_of(CHOICE, IDS, WEIGHTS, phase=phases)

    def test_a_bare_strategy_leaves_prefill_exact_and_its_experts_are_free(self):
        routing = self.routing([PREFILL, DECODE])
        bare = lynx.make_strategy("batch-union", top=1)
        explicit = lynx.make_strategy({"name": "phase-aware", "decode": {"name": "batch-union", "top": 1}})
        for strategy in (bare, explicit):
            # of expert 3, row 1 moves on to 0, which the prefill row has woken
            assert run(strategy, routing).ids.tolist() == [[0, 1], [2, 0]]

    def test_prefill_alone(self):
        strategy = lynx.make_strategy({"name": "phase-aware", "prefill": {"name": "batch-union", "top": 1}})
        assert run(strategy, self.routing([PREFILL, DECODE])).ids.tolist() == [[0, 2], [2, 3]]
        assert run(strategy, self.routing([DECODE, DECODE])).ids.tolist() == IDS

    def test_each_phase_selects_for_itself_and_the_union_is_active(self):
        strategy = lynx.make_strategy(
            {"name": "phase-aware", "prefill": "exact", "decode": {"name": "batch-union", "top": 1}}
        )
        assert run(strategy, self.routing([PREFILL, DECODE])).ids.tolist() == [[0, 1], [2, 0]]

    def test_the_other_phase_makes_nothing_free(self):
        """Both rows want 0 and 1; neither budget of 1 may count on the other to keep them."""
        routing = routing_of([[4.0, 3.0]] * 2, [[0, 1]] * 2, WEIGHTS, phase=[PREFILL, DECODE])
        budget = {"name": "top-budget", "budget": 1}
        strategy = lynx.make_strategy({"name": "phase-aware", "prefill": budget, "decode": budget})
        result = run(strategy, routing)
        assert result.ids.tolist() == [[0, 0], [0, 0]]
        assert result.lost.tolist() == [[False, True], [False, True]]

    def test_rows_of_a_phase_without_sharing_keep_to_themselves(self):
        strategy = lynx.make_strategy(
            {
                "name": "phase-aware",
                "prefill": {"name": "static-top", "top": 1},
                "decode": {"name": "batch-union", "top": 1},
            }
        )
        result = run(strategy, self.routing([PREFILL, DECODE]))
        # row 0 has no refill; row 1 finds nothing active but its own 2, as what row 0 keeps is not shared
        assert result.ids.tolist() == [[0, 0], [2, 2]]
        assert result.weights[0].tolist() == [1.0, 0.0]
        assert result.weights[1].tolist() == [1.0, 0.0]

    def test_what_one_phase_keeps_for_the_others_rows_does_not_count(self):
        class Everything(lynx.SelectionStrategy):
            name: str = "everything"

            def select(self, routing):
                return torch.ones_like(routing.choice, dtype=torch.bool)

        decode = lynx.make_strategy("batch-union", top=1)
        strategy = PhaseAware(prefill=Everything(), decode=decode)
        result = run(strategy, self.routing([PREFILL, DECODE]))
        assert result.ids.tolist() == [[0, 1], [2, 2]]

    @settings(max_examples=60)
    @given(specs(), st.integers(1, 4), st.integers(1, 4))
    def test_mixed_batches_match_the_oracle(self, spec, prefill, decode):
        budgets = {PREFILL: min(prefill, spec.experts), DECODE: min(decode, spec.experts)}
        routing = spec.build()
        batch = reference.Batch.of(routing)
        active = set()
        for phase, budget in budgets.items():
            part = batch.only(phase)
            active |= reference.most_wanted(part, reference.demand(part, "count"), budget)
        strategy = lynx.make_strategy(
            {
                "name": "phase-aware",
                "prefill": {"name": "top-budget", "budget": budgets[PREFILL], "utility": "count"},
                "decode": {"name": "top-budget", "budget": budgets[DECODE], "utility": "count"},
            }
        )
        result = run(strategy, routing)
        assert result.ids.tolist() == [row.ids for row in reference.reroute(batch, active)]


PER_LAYER = {"name": "per-layer", "default": {"name": "batch-union", "top": 1}, "strategies": {2: "exact"}}


class TestPerLayer:
    def test_each_layer_gets_its_own(self):
        strategy = lynx.make_strategy(PER_LAYER)
        routing = make_routing(tokens=4, experts=16, top_k=4)
        default = run(lynx.make_strategy("batch-union", top=1), routing)
        for index in range(4):
            ids = run(strategy, routing, index).ids
            assert torch.equal(ids, routing.ids if index == 2 else default.ids)
        assert not torch.equal(default.ids, routing.ids)

    def test_nothing_of_the_wrapper_is_left_in_the_hot_path(self):
        strategy = lynx.make_strategy(PER_LAYER)
        assert strategy.bind(layer_of(make_routing(), 2)) is strategy.strategies[2]

    def test_a_layer_that_is_not_there_is_named(self):
        strategy = lynx.make_strategy({**PER_LAYER, "strategies": {6: "exact"}})
        with pytest.raises(lynx.ConfigError, match="no MoE layer 6; the model has 6, counted from 0"):
            strategy.bind(LAYER)

    def test_a_misfit_in_any_layer_is_told(self):
        strategy = lynx.make_strategy({**PER_LAYER, "strategies": {3: {"name": "batch-union", "top": 5}}})
        with pytest.raises(lynx.ConfigError, match="top=5"):
            strategy.bind(LAYER)


BY_BATCH_SIZE = {
    "name": "by-batch-size",
    "sizes": {4: {"name": "batch-union", "top": 1}, 2: {"name": "batch-union", "top": 2}},
}


class TestByBatchSize:
    @pytest.mark.parametrize("padding", [0, 5])
    @pytest.mark.parametrize(("rows", "top"), [(1, None), (2, 2), (3, 2), (4, 1), (6, 1)])
    def test_open_rows_are_counted_and_not_the_padded_shape(self, rows, top, padding):
        roles = [Role.OPEN] * rows + [Role.PADDING] * padding
        routing = make_routing(tokens=rows + padding, experts=24, top_k=3, roles=roles, seed=9)
        expected = routing.ids if top is None else run(lynx.make_strategy("batch-union", top=top), routing).ids
        assert torch.equal(run(lynx.make_strategy(BY_BATCH_SIZE), routing).ids, expected)

    def test_exact_rows_are_not_counted(self):
        roles = [Role.OPEN] * 3 + [Role.EXACT] * 3
        routing = make_routing(tokens=6, experts=24, top_k=3, roles=roles)
        expected = run(lynx.make_strategy("batch-union", top=2), routing)
        assert torch.equal(run(lynx.make_strategy(BY_BATCH_SIZE), routing).ids, expected.ids)

    def test_independent_batches_are_counted_one_by_one(self):
        routing = make_routing(tokens=4, experts=24, top_k=3, batch=(3,))
        for index, rows in enumerate((1, 3, 4)):
            routing.role[index, rows:] = int(Role.PADDING)
        result = run(lynx.make_strategy(BY_BATCH_SIZE), routing)
        for index, top in enumerate((None, 2, 1)):
            one = at(routing, index)
            expected = one.ids if top is None else run(lynx.make_strategy("batch-union", top=top), one).ids
            assert torch.equal(result.ids[index], expected)

    def test_refill_is_that_of_the_strategy_in_use(self):
        strategy = lynx.make_strategy(
            {
                "name": "by-batch-size",
                "sizes": {1: {"name": "static-top", "top": 1}, 3: {"name": "batch-union", "top": 1}},
            }
        )
        for rows, name in ((2, "static-top"), (3, "batch-union")):
            routing = make_routing(tokens=rows, experts=8, top_k=3, seed=4)
            expected = run(lynx.make_strategy(name, top=1), routing)
            result = run(strategy, routing)
            assert torch.equal(result.ids, expected.ids)
            assert torch.equal(result.weights, expected.weights)
