"""Re-routing and keep rules against the plain-Python oracle."""

from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import assert_same, at, members, routing_of, with_host_slots

from lynx.keep import AnyOf, ByDemand, ByMass, ByRank, ByRatio
from lynx.rerouting import leave_exact, reroute, unsound_rows
from lynx.routing import Role, WeightRule
from lynx.strategy import Keep
from lynx.testing import make_routing
from lynx.testing.routings import specs

HOST_SLOTS = st.sampled_from([(), (-1,), (-1, 99), (99, 99)])


def check(routing, result, expected):
    """Compare a re-routing with the oracle's rows."""
    # own weights enter in the host's rounding where those of other experts cannot be derived
    coarse = routing.weights.dtype == torch.bfloat16
    assert result.ids.dtype == result.lost_ids.dtype == routing.ids.dtype
    assert result.weights.dtype == result.lost_weights.dtype == routing.weights.dtype
    assert result.ids.tolist() == [row.ids for row in expected]
    wanted = torch.tensor([row.weights for row in expected], dtype=torch.float32)
    torch.testing.assert_close(result.weights.float(), wanted, rtol=2**-6 if coarse else 2e-5, atol=1e-9)
    assert torch.equal(result.weights == 0, wanted == 0)  # empty is exactly 0, and nothing else is
    assert result.lost.tolist() == [row.lost for row in expected]
    assert result.lost_ids.tolist() == [row.lost_ids for row in expected]
    assert result.lost_weights.tolist() == [row.lost_weights for row in expected]
    for t, row in enumerate(expected):
        if not row.changed:
            assert_same(result.ids[t], routing.ids[t])
            assert_same(result.weights[t], routing.weights[t])


@given(specs(), HOST_SLOTS, st.booleans(), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.2, 0.5, 0.9]))
@settings(max_examples=400)
def test_shared_keep_matches_the_oracle(spec, host, refill, random, share):
    routing = with_host_slots(spec.build(), host)
    active = {e for e in range(spec.experts) if random.random() < share}
    mask = torch.tensor([[e in active for e in range(spec.experts)]])
    batch = reference.Batch.of(routing)
    check(routing, reroute(routing, Keep(mask, refill)), reference.reroute(batch, active, refill, protect=0))


@given(specs(), HOST_SLOTS, st.booleans(), st.randoms(use_true_random=False), st.sampled_from([0.2, 0.5, 0.9]))
@settings(max_examples=200)
def test_keep_of_each_token_matches_the_oracle(spec, host, refill, random, share):
    routing = with_host_slots(spec.build(), host)
    active = {t: {e for e in range(spec.experts) if random.random() < share} for t in range(spec.tokens)}
    mask = torch.tensor([[e in active[t] for e in range(spec.experts)] for t in range(spec.tokens)])
    batch = reference.Batch.of(routing)
    check(routing, reroute(routing, Keep(mask, refill)), reference.reroute(batch, active, refill, protect=0))


@given(specs(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_refill_may_differ_by_row(spec, random):
    routing = spec.build()
    active = {e for e in range(spec.experts) if random.random() < 0.4}
    refill = [random.random() < 0.5 for _ in range(spec.tokens)]
    mask = torch.tensor([[e in active for e in range(spec.experts)]])
    batch = reference.Batch.of(routing)
    rows = [reference.reroute(batch, active, refill[t], protect=0)[t] for t in range(spec.tokens)]
    check(routing, reroute(routing, Keep(mask, torch.tensor(refill).unsqueeze(-1))), rows)


def rule_and_oracle(draw, routing):
    """Draw a keep rule and what the oracle says it keeps."""
    batch = reference.Batch.of(routing)
    kind = draw(st.sampled_from(["rank", "ratio", "mass", "demand", "drop"]))
    if kind == "rank":
        top = draw(st.integers(1, routing.top_k))
        return ByRank(top), ByRank(top, share=False), reference.wants_by_rank(batch, top)
    if kind == "ratio":
        ratio = draw(st.sampled_from([0.0, 0.17, 0.43, 0.77, 1.0]))
        return ByRatio(ratio), ByRatio(ratio, share=False), reference.wants_by_ratio(batch, ratio)
    if kind == "mass":
        mass = draw(st.sampled_from([0.01, 0.33, 0.61, 0.87, 1.0]))
        return ByMass(mass), ByMass(mass, share=False), reference.wants_by_mass(batch, mass)
    utility = draw(st.sampled_from(["count", "own-mass", "normalised-own-mass"]))
    protect = draw(st.integers(0, 2))
    score = reference.demand(batch, utility)
    if kind == "demand":
        budget = draw(st.integers(1, routing.num_experts))
        rule = ByDemand(budget=budget, utility=utility, protect=protect)
        return rule, None, reference.most_wanted(batch, score, budget=budget, protect=protect)
    drop = draw(st.integers(0, routing.num_experts))
    rule = ByDemand(drop=drop, utility=utility, protect=protect)
    return rule, None, reference.most_wanted(batch, score, drop=drop, protect=protect)


@given(st.data(), specs(), HOST_SLOTS)
@settings(max_examples=500)
def test_keep_rules_match_the_oracle(data, spec, host):
    routing = with_host_slots(spec.build(), host)
    try:
        rule, unshared, expected = rule_and_oracle(data.draw, routing)
    except reference.Ambiguous:
        assume(False)
    shared = expected if isinstance(expected, set) else reference.union(expected)
    kept = rule.keep(routing)
    assert kept.shape == (spec.experts,)
    assert kept.dtype == torch.bool
    if isinstance(rule, ByDemand):  # the rule ranks protected experts first, the strategy keeps them past the budget
        assert kept.sum() <= max(spec.experts - rule.drop if rule.budget is None else rule.budget, 0)
        kept = kept | (routing.protected(rule.protect).any(-2) & ~routing.woken)
    assert members(kept) == shared
    if unshared is not None:
        kept = unshared.keep(routing)
        assert kept.shape == (spec.tokens, spec.experts)
        for t, row in enumerate(kept):
            assert members(row) == expected.get(t, set())


def test_union_of_rules():
    routing = make_routing(tokens=3, experts=8, top_k=3)
    shared, own = ByDemand(budget=2), ByRank(1, share=False)
    assert torch.equal(AnyOf((shared, ByRank(1))).keep(routing), shared.keep(routing) | ByRank(1).keep(routing))
    wide = AnyOf((shared, own)).keep(routing)
    assert torch.equal(wide, shared.keep(routing).expand(3, 8) | own.keep(routing))


SHARED = [ByRank(1), ByRatio(0.5), ByMass(0.5), ByDemand(budget=3), ByDemand(drop=2)]
UNSHARED = [ByRank(1, share=False), ByRatio(0.5, share=False), ByMass(0.5, share=False)]


@pytest.mark.parametrize("rule", [*SHARED, *UNSHARED], ids=repr)
def test_leading_dimensions_are_independent_batches(rule):
    shared = rule in SHARED
    roles = [Role.OPEN, Role.OPEN, Role.EXACT, Role.OPEN, Role.PADDING]
    whole = make_routing(tokens=5, experts=8, top_k=3, roles=roles, batch=(2, 3), priority=True)

    def keep(routing):
        active = rule.keep(routing)
        return Keep(active.unsqueeze(-2) if shared else active, True)

    result = reroute(whole, keep(whole))
    for i in range(2):
        for j in range(3):
            one = at(whole, (i, j))
            alone = reroute(one, keep(one))
            for name in ("ids", "weights", "lost", "lost_ids", "lost_weights"):
                assert_same(getattr(result, name)[i, j], getattr(alone, name))


def keep_only(*experts, of=4, refill=True):
    return Keep(torch.tensor([[e in experts for e in range(of)]]), refill)


def test_by_hand():
    """One row, softmax with renormalisation: logits 3, 2, 1, 0, own experts 1 and 0 in that order; 1 is lost."""
    routing = routing_of([[3.0, 2.0, 1.0, 0.0]], [[1, 0]], [[0.26894143, 0.73105857]], WeightRule())
    result = reroute(routing, keep_only(0, 3))
    assert result.ids.tolist() == [[3, 0]]
    torch.testing.assert_close(result.weights, torch.tensor([[0.04742587, 0.95257413]]))
    assert result.lost.tolist() == [[True, False]]
    assert result.lost_ids.tolist() == [[1, 0]]
    torch.testing.assert_close(result.lost_weights, torch.tensor([[0.26894143, 0.0]]))


def test_an_empty_slot_repeats_the_best_kept_expert():
    rule = WeightRule("softmax", renormalise=False)
    routing = routing_of([[3.0, 2.0, 1.0, 0.0]], [[2, 1, 0]], [[0.1, 0.2, 0.6]], rule)
    result = reroute(routing, keep_only(1, refill=False))
    assert result.ids.tolist() == [[1, 1, 1]]
    torch.testing.assert_close(result.weights, torch.tensor([[0.0, 0.2, 0.0]]))


def test_a_row_that_would_lose_everything_keeps_its_best():
    routing = routing_of([[3.0, 2.0, 1.0, 0.0]], [[1, 0]], [[0.27, 0.73]], WeightRule())
    result = reroute(routing, keep_only(refill=False))
    assert result.ids.tolist() == [[0, 0]]
    assert result.weights.tolist() == [[0.0, 1.0]]


def test_a_row_may_live_on_re_picked_experts_alone():
    routing = routing_of([[3.0, 2.0, 1.0, 0.0]], [[1, 0]], [[0.27, 0.73]], WeightRule())
    result = reroute(routing, keep_only(3))
    assert result.ids.tolist() == [[3, 3]]
    assert result.weights.tolist() == [[1.0, 0.0]]


def test_ties_go_to_the_lowest_id():
    routing = routing_of([[3.0, 1.0, 1.0, 1.0]], [[0, 1]], [[0.9, 0.1]], WeightRule())
    assert reroute(routing, keep_only(0, 2, 3)).ids.tolist() == [[0, 2]]


def test_forbidden_experts_are_never_picked():
    rule = WeightRule("sigmoid")
    routing = routing_of([[3.0, 2.0, -torch.inf, -torch.inf]], [[0, 1]], [[0.6, 0.4]], rule)
    result = reroute(routing, keep_only(0, 2, 3))
    assert result.ids.tolist() == [[0, 0]]
    assert result.weights.tolist() == [[1.0, 0.0]]


def test_weights_are_renormalised_in_logit_space():
    """The kept experts' probabilities underflow in float32, their ratio does not."""
    routing = routing_of([[200.0, 1.0, 0.0]], [[0, 1]], [[1.0, 0.0]], WeightRule())
    result = reroute(routing, keep_only(1, 2, of=3))
    assert result.ids.tolist() == [[2, 1]]
    torch.testing.assert_close(result.weights, torch.tensor([[0.26894143, 0.73105857]]))


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
def test_weights_of_far_logits_stay_finite(score):
    routing = routing_of([[-100.0, -101.0, -102.0]], [[0, 1]], [[0.7, 0.3]], WeightRule(score))
    result = reroute(routing, keep_only(0, 2, of=3))
    power = 1.0 if score == "sigmoid" else 0.5
    first = 1.0 / (1.0 + 2.718281828 ** (-2.0 * power))
    torch.testing.assert_close(result.weights, torch.tensor([[first, 1.0 - first]]))


def test_a_row_whose_new_weights_would_not_be_finite_is_left_as_it_was():
    """All that is active has a logit of -inf, whose share of the weight is 0 / 0."""
    routing = routing_of([[3.0, 2.0, 1.0]], [[0, 1]], [[1.0, 0.0]])
    routing = replace(routing, logits=torch.tensor([[0.0, -torch.inf, -torch.inf]]))
    result = reroute(routing, keep_only(1, 2, of=3))
    assert result.ids.tolist() == [[0, 1]]
    assert result.weights.tolist() == [[1.0, 0.0]]
    assert not result.lost.any()
    assert result.lost_weights.tolist() == [[0.0, 0.0]]


def test_own_weights_are_renormalised_where_others_cannot_be_derived():
    routing = routing_of([[3.0, 2.0, 1.0]], [[0, 1]], [[1.5, 0.5]], WeightRule("softmax", True, 2.0, repick=False))
    assert reroute(routing, keep_only(0, 2, of=3)).weights.tolist() == [[2.0, 0.0]]
    raw = replace(routing, rule=WeightRule("softmax", False, 2.0, repick=False))
    assert reroute(raw, keep_only(0, 2, of=3)).weights.tolist() == [[1.5, 0.0]]


def test_exact_rows_wake_experts_for_others():
    role = [Role.EXACT, Role.OPEN, Role.PADDING]
    choice = [[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0]]
    routing = routing_of(choice, [[3, 2], [1, 0], [1, 2]], [[0.7, 0.3]] * 3, WeightRule(), role)
    result = reroute(routing, keep_only(0))
    assert result.ids.tolist() == [[3, 2], [2, 0], [1, 2]]


def test_padding_rows_come_back_bit_for_bit():
    role = [Role.OPEN, Role.PADDING]
    choice = [[3.0, 2.0, 1.0, 0.0], [float("nan")] * 4]
    routing = routing_of(choice, [[0, 1], [-1, -1]], [[0.7, 0.3], [float("nan"), -0.0]], WeightRule(), role)
    result = reroute(routing, keep_only(0, 3))
    assert result.ids.tolist() == [[0, 3], [-1, -1]]
    assert_same(result.weights[1], routing.weights[1])
    assert result.lost[1].tolist() == [False, False]
    assert result.lost_weights[1].tolist() == [0.0, 0.0]


def test_rows_that_are_not_sound():
    nan, inf = float("nan"), float("inf")
    choice = [[1.0, 0.0], [nan, 0.0], [inf, 0.0], [0.0, -inf], [1.0, 0.0]]
    routing = routing_of(choice, [[0]] * 5, [[1.0]] * 4 + [[nan]], WeightRule())
    assert unsound_rows(routing).tolist() == [False, True, True, False, True]
    assert unsound_rows(replace(routing, logits=torch.zeros(5, 2))).tolist() == [False, True, True, False, True]
    assert unsound_rows(replace(routing, choice=torch.zeros(5, 2))).tolist() == [False, True, True, False, True]
    role = leave_exact(routing, unsound_rows(routing))
    assert role.tolist() == [Role.OPEN, Role.EXACT, Role.EXACT, Role.OPEN, Role.EXACT]
    assert role.dtype == torch.int8
