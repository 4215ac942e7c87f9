"""The route kernel, held to the core in torch: the same ids, weights to rounding, the same counts, a sound plan."""

import dataclasses

import pytest
import torch
from cases import DEVICE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from route_cases import (
    Alone,
    Joined,
    Steep,
    assert_equal_counts,
    assert_equal_results,
    assert_plan,
    batches,
    both,
    check,
    info_of,
    make,
    to_device,
)

from lynx.routing import Phase, Role, WeightRule
from lynx.selection import LayerSelection
from lynx.strategies.batch_union import BatchUnion
from lynx.strategies.coverage import Coverage
from lynx.strategies.importance_threshold import ImportanceThreshold
from lynx.strategies.phase_aware import PhaseAware
from lynx.strategies.static_top import StaticTop
from lynx.strategies.top_budget import TopBudget
from lynx.testing.routings import make_routing

pytestmark = [
    pytest.mark.kernel,
    # Triton's interpreter computes in NumPy, which warns where a GPU gives inf or NaN
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    monkeypatch.setenv("LYNX_KERNELS", "triton")


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=batches(),
    min_tokens=st.sampled_from([1, 2, 2, 4]),
    block_t=st.sampled_from([4, 8, 32]),
    part=st.sampled_from([4, 8, 64]),
    warps=st.sampled_from([4, 8] if DEVICE == "cuda" else [1, 4, 8]),  # few threads take long to compile for
)
def test_equals_the_core(batch, min_tokens, block_t, part, warps):
    routing, strategy = batch
    routing = to_device(routing)
    expected, result, wanted, found = both(
        strategy, routing, min_tokens, {"BT": min(block_t, part), "PART": part, "num_warps": warps}
    )
    assert_equal_results(routing, expected, result)
    assert_equal_counts(wanted, found)
    assert_plan(result, routing.num_experts)


WAYS = pytest.mark.parametrize(
    "launches",
    [{}, {"BT": 4}, {"BT": 4, "PART": 4}, {"BT": 4, "PART": 8}],
    ids=["one tile", "tiles", "parts", "parts of tiles"],
)


@WAYS
def test_all_equal_scores_go_by_the_lowest_id(launches):
    routing = make()
    flat = torch.zeros_like(routing.choice)
    ids = torch.arange(4, device=DEVICE).expand(12, 4).contiguous()
    weights = torch.full((12, 4), 0.25, device=DEVICE)
    routing = dataclasses.replace(routing, choice=flat, logits=flat.clone(), ids=ids, weights=weights)
    _, result, _ = check(TopBudget(budget=2), routing, launches)
    assert set(result.ids.unique().tolist()) == {0, 1}


@WAYS
def test_one_hot_expert(launches):
    routing = make()
    logits = routing.logits.clone()
    logits[:, 5] += 100.0
    ids, weights = routing.ids.clone(), torch.zeros_like(routing.weights)
    ids[:, 0] = 5
    ids[:, 1:] = torch.tensor([1, 2, 3], device=DEVICE)
    weights[:, 0] = 1.0
    routing = dataclasses.replace(routing, choice=logits.clone(), logits=logits, ids=ids, weights=weights)
    _, _, counts = check(ImportanceThreshold(ratio=0.5), routing, launches)
    assert counts[Phase.DECODE].active_after == 1


@pytest.mark.sanitize
@WAYS
def test_forbidden_experts_are_never_picked(launches):
    routing = to_device(make_routing("grouped", tokens=6, experts=64, top_k=8, seed=3))
    assert torch.isinf(routing.choice).any()
    expected, result, _ = check(TopBudget(budget=3), routing, launches)
    used = result.weights != 0
    assert not torch.isinf(routing.choice.gather(-1, result.ids))[used].any()
    assert expected.lost.any()


@WAYS
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus", "softmax_over_chosen"])
@pytest.mark.parametrize("magnitude", [1e4, 3e38])
def test_huge_logits(score, magnitude, launches):
    rule = WeightRule(score=score, renormalise=score != "softmax")
    routing = make()
    logits = (routing.logits / routing.logits.abs().max() * magnitude).clone()
    routing = dataclasses.replace(routing, choice=logits.clone(), logits=logits, rule=rule)
    check(BatchUnion(top=1), routing, launches)


@WAYS
@pytest.mark.parametrize("strategy", [BatchUnion(top=1, protect=3), TopBudget(budget=1, protect=2)])
def test_protected_experts_stay(strategy, launches):
    routing = make(experts=64)
    _, result, _ = check(strategy, routing, launches)
    best = routing.slot_rank < strategy.protect
    assert not result.lost[best].any()
    assert result.lost[~best].any()


@pytest.mark.sanitize
@WAYS
@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
def test_a_share_of_the_demand_is_covered(share, launches):
    """Of four experts that all want alike a half is two of them: reached is enough. Of equals the lowest ids stay."""
    routing = make(experts=64, roles=[Role.OPEN] * 10 + [Role.EXACT, Role.PADDING])
    ids = torch.tensor([7, 40, 21, 3], device=DEVICE).expand(12, 4).contiguous()
    ids[10:] = torch.tensor([50, 51, 52, 53], device=DEVICE)
    weights, flat = torch.full((12, 4), 0.25, device=DEVICE), torch.zeros_like(routing.choice)
    routing = dataclasses.replace(routing, choice=flat, logits=flat.clone(), ids=ids, weights=weights)
    _, result, _ = check(Coverage(share=share, protect=0, refill="none"), routing, launches)
    kept = ids[:10][~result.lost[:10]].unique().tolist()
    assert kept == [3, 7, 21, 40][: max(1, round(4 * share))]  # a row keeps its best in any case


@WAYS
def test_what_exact_rows_have_woken_covers_its_own(launches):
    routing = make(experts=64, roles=[Role.OPEN] * 8 + [Role.EXACT] * 4, skew=2.0)
    for share in (0.3, 0.6, 0.9):
        check(Coverage(share=share), routing, launches)
    with_votes = dataclasses.replace(routing, priority=torch.linspace(0.1, 3, 12).to(DEVICE))
    _, result, _ = check(Coverage(share=0.4, protect=0), with_votes, launches)
    assert result.lost.any()


@WAYS
@pytest.mark.parametrize("strategy", [BatchUnion(top=1), TopBudget(budget=1), StaticTop(top=1), Alone(mass=0.1)])
def test_a_floor_is_kept(strategy, launches):
    routing = make(experts=64, skew=0.0)
    _, without, _ = check(strategy, routing, launches)
    _, result, counts = check(strategy.model_copy(update={"floor": 0.7}), routing, launches)
    share = 1.0 - routing.slot_mass.masked_fill(~result.lost, 0.0).sum(-1)
    assert share.min() >= 0.7 - 1e-6
    assert counts[Phase.DECODE].kept_mass_worst >= 0.7 - 1e-6
    assert result.lost.any()
    assert (1.0 - routing.slot_mass.masked_fill(~without.lost, 0.0).sum(-1)).min() < 0.7


@WAYS
def test_lost_slots_get_the_next_best_in_order(launches):
    routing = make(experts=40, roles=[Role.EXACT] * 6 + [Role.OPEN] * 6)
    _, result, _ = check(Alone(mass=0.2), routing, launches)
    refilled = result.lost & (result.weights != 0)
    assert (refilled.sum(-1) > 1).any()


@WAYS
def test_padding_wakes_nothing(launches):
    """What only padding names is neither kept nor there to pick from."""
    routing = make(roles=[Role.PADDING] * 6 + [Role.OPEN] * 6, experts=64)
    _, result, _ = check(TopBudget(budget=3, protect=0), routing, launches)
    used = result.ids[6:][result.weights[6:] != 0].unique()
    assert used.numel() <= 3


@WAYS
def test_few_open_rows_stay_exact(launches):
    routing = make(roles=[Role.OPEN, Role.EXACT, Role.PADDING, Role.OPEN] + [Role.PADDING] * 8, experts=64)
    _, result, _ = check(TopBudget(budget=1, protect=0), routing, launches, min_tokens=3)
    assert not result.lost.any()
    _, result, _ = check(TopBudget(budget=1, protect=0), routing, launches, min_tokens=2)
    assert result.lost[[0, 3]].any(-1).all()


@WAYS
def test_a_row_is_never_left_without_an_expert(launches):
    _, result, _ = check(TopBudget(budget=1, protect=0, refill="none"), make(experts=64), launches)
    assert (result.weights != 0).any(-1).all()
    assert ((result.weights != 0).sum(-1) == 1).any()


@WAYS
@pytest.mark.parametrize("role", [Role.PADDING, Role.EXACT])
def test_batches_without_an_open_row_go_out_as_they_came(role, launches):
    routing = make(roles=[role] * 12)
    _, result, counts = check(TopBudget(budget=1), routing, launches)
    assert torch.equal(result.ids, routing.ids)
    assert torch.equal(result.weights, routing.weights)
    assert counts[Phase.DECODE].steps == int(role == Role.EXACT)


@WAYS
def test_scores_that_are_not_finite_leave_their_row_alone(launches):
    routing = make(roles=[Role.OPEN] * 10 + [Role.EXACT, Role.PADDING], experts=64)
    choice, logits, weights = routing.choice.clone(), routing.logits.clone(), routing.weights.clone()
    choice[0, 3], choice[1, 0], logits[2, 7], logits[3, 1] = torch.nan, torch.inf, torch.nan, torch.inf
    weights[4, 1], weights[5, 0], choice[10, 0], choice[11, 0] = torch.nan, torch.inf, torch.nan, torch.nan
    routing = dataclasses.replace(routing, choice=choice, logits=logits, weights=weights)
    _, result, counts = check(StaticTop(top=1), routing, launches)
    assert counts[Phase.DECODE].unsound_rows == 7
    assert not result.lost[:6].any()
    assert result.lost[6:10].any()


@pytest.mark.sanitize
@WAYS
def test_slots_of_the_host_stay(launches):
    routing = make(roles=[Role.OPEN] * 9 + [Role.EXACT, Role.PADDING, Role.OPEN])
    ids, weights = routing.ids.clone(), routing.weights.clone()
    ids[:, 0], ids[11] = 17, torch.tensor([-1, 16, 99, -7], device=DEVICE)
    ids[10] = -1
    routing = dataclasses.replace(routing, ids=ids, weights=weights)
    _, result, _ = check(TopBudget(budget=2), routing, launches)
    assert torch.equal(result.ids[:, 0], ids[:, 0])
    assert torch.equal(result.ids[11], ids[11])


@pytest.mark.sanitize
@WAYS
def test_an_expert_named_twice_in_a_row(launches):
    routing = make(roles=[Role.EXACT] * 6 + [Role.OPEN] * 6)
    ids = routing.ids.clone()
    ids[:6, 1] = ids[:6, 0]
    check(BatchUnion(top=1), dataclasses.replace(routing, ids=ids), launches)


@WAYS
def test_large_logits_cost_no_bits_of_raw_softmax_weights(launches):
    rule = WeightRule("softmax", renormalise=False)
    routing = make(rule, experts=64, skew=1.0)
    logits = routing.logits + 2.0**15
    weights = torch.softmax(logits, -1).gather(-1, routing.ids)
    routing = dataclasses.replace(routing, choice=logits.clone(), logits=logits, weights=weights)
    expected, _, _ = check(BatchUnion(top=1), routing, launches)
    assert expected.lost.any()


@WAYS
def test_votes_may_lie_apart_and_count_against(launches):
    routing = make(experts=64)
    for votes in (torch.linspace(0.1, 3, 24)[::2], torch.linspace(0.1, 3, 12).neg(), torch.tensor([2.0]).expand(12)):
        assert not votes.is_contiguous() or (votes < 0).any()
        check(TopBudget(budget=5, protect=0), dataclasses.replace(routing, priority=votes.to(DEVICE)), launches)


@WAYS
def test_an_expert_named_twice_is_kept_or_lost_as_one(launches):
    routing = make(experts=16)
    ids, weights = routing.ids.clone(), routing.weights.clone()
    ids[:, 1] = ids[:, 0]
    weights[:] = torch.tensor([0.5, 0.3, 0.1, 0.1], device=DEVICE)
    _, result, _ = check(Steep(ratio=0.9), dataclasses.replace(routing, ids=ids, weights=weights), launches)
    assert not result.lost[:, :2].any()
    assert result.lost[:, 2:].any()


@pytest.mark.sanitize
def test_the_largest_layer():
    routing = make_routing("softmax", tokens=9, experts=512, top_k=16, seed=1)
    check(TopBudget(budget=60), to_device(routing))


@pytest.mark.sanitize
@pytest.mark.parametrize("T", [65, 130])
def test_larger_batches_take_two_launches(T):
    roles = [Role.PADDING if t % 5 == 0 else Role.EXACT if t == 31 else Role.OPEN for t in range(T)]
    phases = [Phase(t % 40 != 1) for t in range(T)]
    routing = make_routing("sigmoid", tokens=T, experts=64, top_k=4, seed=2, roles=roles, phases=phases)
    _, result, _ = check(TopBudget(budget=7, protect=0), to_device(routing))
    assert result.lost.any()


@WAYS
@pytest.mark.parametrize("prefill", [None, BatchUnion(top=1)])
def test_phases(launches, prefill):
    routing = make(phases=[Phase.PREFILL, Phase.DECODE] * 6, experts=64)
    decode = TopBudget(budget=3)
    if prefill is None:
        _, result, _ = check(PhaseAware(decode=decode), routing, launches)
        assert not result.lost[::2].any()
        assert result.lost[1::2].any()
    else:
        selection = LayerSelection(info_of(routing), PhaseAware(prefill=prefill, decode=decode))
        assert "no single strategy" in selection.why_not_fused


@pytest.mark.parametrize("E", [8, 24])
def test_bits_depend_on_no_launch_parameter(E):
    routing = to_device(make_routing("softmax", tokens=21, experts=E, top_k=4, seed=5, priority=True))
    strategy = Joined(budget=2)
    runs = [
        both(strategy, routing, 2, {"BT": BT, "PART": PART, "num_warps": warps})[1]
        for BT, PART, warps in [(4, 4, 1), (4, 12, 4), (8, 8, 4), (8, 64, 8), (32, 64, 4), (32, 64, 4)]
    ]
    for run in runs[1:]:
        for name in ("ids", "weights", "lost"):
            assert torch.equal(getattr(run, name), getattr(runs[0], name))
        assert torch.equal(run.plan.buffer, runs[0].plan.buffer)
