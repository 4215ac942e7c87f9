"""What a routing tells a strategy, against the oracle and by hand."""

from dataclasses import FrozenInstanceError, replace
from fractions import Fraction

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_same, at, members, routing_of, with_host_slots

from lynx.routing import Phase, Role, WeightRule
from lynx.testing import make_routing
from lynx.testing.routings import ROUTERS, specs

HOST_SLOTS = st.sampled_from([(), (-1,), (-1, 99), (99, 99)])
UTILITIES = ["count", "own-mass", "normalised-own-mass"]


@given(specs(), HOST_SLOTS, st.integers(0, 3))
def test_masks_match_the_oracle(spec, host, protect):
    routing = with_host_slots(spec.build(), host)
    batch = reference.Batch.of(routing)
    opened = batch.rows(reference.OPEN)
    for t in range(spec.tokens):
        own = batch.own(t) if t in opened else []
        assert members(routing.own[t]) == set(own)
        assert members(routing.protected(protect)[t]) == set(own[:protect])
        ranks = [own.index(e) if e in own else routing.top_k for e in range(spec.experts)]
        assert routing.rank[t].tolist() == ranks
        mass = torch.tensor([batch.mass(t, e) if e in own else 0.0 for e in range(spec.experts)])
        torch.testing.assert_close(routing.mass[t], mass, rtol=1e-5, atol=1e-8)
        slots = [batch.own(t).index(e) for e in routing.ids[t].tolist() if 0 <= e < spec.experts]
        assert routing.slot_rank[t][routing.routed[t]].tolist() == slots
    assert members(routing.wanted) == batch.wanted()
    assert members(routing.woken) == batch.woken()
    assert routing.open_rows.tolist() == [t in opened for t in range(spec.tokens)]
    assert routing.open_count.item() == len(opened)


@given(specs(), HOST_SLOTS, st.sampled_from(UTILITIES))
def test_demand_matches_the_oracle(spec, host, utility):
    routing = with_host_slots(spec.build(), host)
    expected = torch.tensor(reference.demand(reference.Batch.of(routing), utility), dtype=torch.float32)
    torch.testing.assert_close(routing.demand(utility), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("utility", UTILITIES)
def test_demand_does_not_depend_on_the_order_of_tokens_in_any_bit(utility):
    routing = make_routing(tokens=64, experts=16, top_k=4, priority=True, seed=3)
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    float_sums = set()
    for order in orders:
        shuffled = at(routing, order)
        assert_same(shuffled.demand(utility), routing.demand(utility))
        float_sums.add(tuple((shuffled.mass * shuffled.priority.unsqueeze(-1)).sum(0).tolist()))
    assert len(float_sums) > 1  # a sum in float32 would have depended on it


def test_demand_is_exact():
    """The sum of the float32 votes, rounded once."""
    routing = make_routing(tokens=64, experts=16, top_k=4, seed=5)
    mass = routing.mass.double().tolist()
    for e, got in enumerate(routing.demand().tolist()):
        exact = sum(Fraction(row[e]) for row in mass)
        assert abs(Fraction(got) - exact) <= exact * Fraction(1, 2**23)


def test_demand_by_hand():
    routing = routing_of(
        [[4.0, 3.0, 0.0], [0.0, 2.0, 4.0], [9.0, 8.0, 0.0], [9.0, 8.0, 0.0]],
        [[0, 1], [1, 2], [0, 1], [0, 1]],
        [[1.5, 0.5], [0.5, 0.5], [1.0, 1.0], [1.0, 1.0]],
        role=[Role.OPEN, Role.OPEN, Role.EXACT, Role.PADDING],
    )
    assert routing.demand("count").tolist() == [1.0, 2.0, 1.0]
    assert routing.demand("own-mass").tolist() == [1.5, 1.0, 0.5]
    assert routing.demand("normalised-own-mass").tolist() == [0.75, 0.75, 0.5]
    weighted = replace(routing, priority=torch.tensor([2.0, 0.5, 7.0, 7.0]))
    assert weighted.demand("count").tolist() == [2.0, 2.5, 0.5]
    assert weighted.demand().tolist() == [1.5, 0.75, 0.25]


def test_ranks_follow_choice_and_not_weights():
    """A bias turns the order of the scores around."""
    choice, ids, weights = [[0.1, 0.9, 0.5]], [[0, 1]], [[0.8, 0.2]]
    routing = routing_of(choice, ids, weights, WeightRule("sigmoid"))
    assert routing.slot_rank.tolist() == [[1, 0]]
    assert routing.rank.tolist() == [[1, 0, 2]]
    assert routing.protected(1).tolist() == [[False, True, False]]


def test_ties_rank_by_lowest_id():
    routing = routing_of([[1.0, 1.0, 1.0, 0.0]], [[2, 0, 1]], [[0.4, 0.3, 0.3]])
    assert routing.slot_rank.tolist() == [[2, 0, 1]]
    assert routing.protected(2).tolist() == [[True, True, False, False]]


def test_host_slots_do_not_disturb_the_rank_of_expert_0():
    routing = routing_of([[5.0, 4.0, 3.0]], [[-1, 0, 1, 7]], [[0.5, 0.7, 0.3, 0.5]])
    assert routing.rank.tolist() == [[0, 1, 4]]
    assert routing.mass[0].tolist() == pytest.approx([0.7, 0.3, 0.0])
    assert routing.own.tolist() == [[True, True, False]]


def test_a_forbidden_own_expert_still_ranks_before_host_slots():
    routing = routing_of([[5.0, 1.0, -torch.inf]], [[-1, 2, 0]], [[0.5, 0.3, 0.7]], WeightRule("sigmoid"))
    assert routing.slot_rank[0, 1:].tolist() == [1, 0]
    assert routing.rank.tolist() == [[0, 3, 1]]


def test_nan_in_padding_reaches_nobody():
    routing = make_routing(tokens=3, experts=8, top_k=2, roles=[Role.OPEN, Role.PADDING, Role.OPEN])
    for name in ("choice", "logits", "weights"):
        getattr(routing, name)[1] = float("nan")
    routing.ids[1] = -1
    clean = at(routing, torch.tensor([0, 2]))
    for utility in UTILITIES:
        assert_same(routing.demand(utility), clean.demand(utility))
    assert_same(routing.mass, torch.stack([clean.mass[0], torch.zeros(8), clean.mass[1]]))
    assert torch.equal(routing.wanted, clean.wanted)
    assert not routing.woken.any()


def test_leading_dimensions():
    whole = make_routing(tokens=4, experts=8, top_k=3, roles=[2, 1, 0, 2], batch=(3,), priority=True)
    for i in range(3):
        one = at(whole, i)
        for name in ("own", "rank", "mass", "wanted", "woken", "slot_rank", "slot_mass", "open_count"):
            assert_same(getattr(whole, name)[i], getattr(one, name))
        assert_same(whole.demand()[i], one.demand())
        assert_same(whole.protected(1)[i], one.protected(1))


def test_a_routing_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        make_routing().role = None


def test_phases_and_roles_have_the_published_values():
    assert [(role.name, int(role)) for role in Role] == [("PADDING", 0), ("EXACT", 1), ("OPEN", 2)]
    assert [(phase.name, int(phase)) for phase in Phase] == [("PREFILL", 0), ("DECODE", 1)]


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_made_up_routings_are_what_such_a_router_returns(router, renormalise):
    """Own experts are the best by choice; weights follow the rule, computed here in float64."""
    routing = make_routing(router, tokens=6, experts=16, top_k=4, renormalise=renormalise, scale=2.5, seed=1)
    batch = reference.Batch.of(routing)
    for t in range(6):
        best = sorted(range(16), key=lambda e: (-batch.choice[t][e], e))[:4]
        assert set(batch.ids[t]) == set(best)
        chosen = batch.ids[t]
        assert batch.weights[t] == pytest.approx([reference._weight(batch, t, e, chosen) for e in chosen], rel=1e-5)
    forbidden = (routing.choice == -torch.inf).sum(-1)
    assert forbidden.tolist() == [8 if router == "grouped" else 0] * 6
    assert (routing.slot_rank.diff() < 0).any()  # slots are not in order of rank
    assert (make_routing(router, shuffle=False).slot_rank == torch.arange(4)).all()


def test_made_up_ties_go_to_the_lowest_id():
    routing = make_routing(tokens=32, experts=8, top_k=3, ties=True)
    assert len(routing.choice.unique()) < 16
    batch = reference.Batch.of(routing)
    for t in range(32):
        assert set(batch.ids[t]) == set(sorted(range(8), key=lambda e: (-batch.choice[t][e], e))[:3])


def test_made_up_routings_repeat():
    one, two = make_routing(seed=7, priority=True), make_routing(seed=7, priority=True)
    for name in ("choice", "logits", "ids", "weights", "role", "phase", "priority"):
        assert_same(getattr(one, name), getattr(two, name))
    assert not torch.equal(one.logits, make_routing(seed=8).logits)
