"""Who answers for lost slots: the core's part of stand-ins, against loops over slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same, with_host_slots

import lynx
from lynx.rerouting import reroute
from lynx.routing import Phase, WeightRule
from lynx.selection import LayerSelection
from lynx.standins import LayerStandIns
from lynx.standins_file import StandInLayer
from lynx.strategies.importance_threshold import ImportanceThreshold
from lynx.strategy import Keep, LayerInfo
from lynx.testing import make_routing
from lynx.testing.routings import specs

H = 4
HOST_SLOTS = st.sampled_from([(), (-1,), (-1, 99)])
MODES = st.sampled_from(["blend", "stand-in"])


def layer(experts: int, known=None) -> StandInLayer:
    generator = torch.Generator().manual_seed(experts)
    maps = (torch.randn(shape, generator=generator) for shape in ((experts, 2, H), (experts, 2, H)))
    means = (torch.randn(experts, H, generator=generator) for _ in range(2))
    return StandInLayer("layer", 0, "", *maps, *means, torch.ones(experts).bool() if known is None else known)


@given(specs(), HOST_SLOTS, MODES, st.booleans(), st.randoms(use_true_random=False), st.sampled_from([0.2, 0.5, 0.8]))
@settings(max_examples=300)
def test_every_slot_is_answered_for_once(spec, host, mode, refill, random, share):
    routing = with_host_slots(spec.build(), host)
    keep = Keep(torch.tensor([[random.random() < share for _ in range(spec.experts)]]), refill)
    known = torch.tensor([random.random() < 0.8 for _ in range(spec.experts)])
    plain = reroute(routing, keep)
    result = LayerStandIns(layer(spec.experts, known), mode).answer(routing, plain)
    re_picked = {"blend": 0.2, "stand-in": 0.0}[mode]
    assert result.ids.dtype == routing.ids.dtype
    assert result.weights.dtype == routing.weights.dtype
    assert result.answered.shape == routing.ids.shape
    coarse = {"rtol": 2**-6, "atol": 2**-9} if routing.weights.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    for t in range(spec.tokens):
        ids = routing.ids[t].tolist()
        lost, routed = plain.lost[t].tolist(), [0 <= e < spec.experts for e in ids]
        has_all = all(known[e] for e, gone in zip(ids, lost, strict=True) if gone)
        stays = any(there and not gone for there, gone in zip(routed, lost, strict=True))
        if not (any(lost) and has_all and stays):
            assert_same(result.ids[t], plain.ids[t])
            assert_same(result.weights[t], plain.weights[t])
            assert not result.answered[t].any()
            continue
        for slot, gone in enumerate(lost):
            own, given_now = routing.weights[t, slot].float(), plain.weights[t, slot].float()
            expected = own if not routed[slot] else re_picked * given_now + (0 if gone else (1 - re_picked) * own)
            torch.testing.assert_close(result.weights[t, slot].float(), expected, **coarse)
            answered = (1 - re_picked) * own if gone else torch.tensor(0.0)
            torch.testing.assert_close(result.answered[t, slot].float(), answered, **coarse)
        if mode == "stand-in":
            kept = [slot for slot, gone in enumerate(lost) if routed[slot] and not gone]
            best = max(kept, key=lambda slot: (routing.choice[t, ids[slot]].item(), -ids[slot]))
            assert result.ids[t].tolist() == [ids[best] if gone else e for e, gone in zip(ids, lost, strict=True)]
            assert not result.weights[t][plain.lost[t]].any()
        else:
            assert_same(result.ids[t], plain.ids[t])


@given(specs(), MODES)
@settings(max_examples=60)
def test_the_bias_of_a_lower_rank_is_its_own(spec, mode):
    made = layer(spec.experts)
    for rank in range(3):
        weights = made.weights(rank)
        x = torch.randn(H)
        for e in range(spec.experts):
            answer = x @ weights.inner[e].T @ weights.outer[e] + weights.bias[e]
            direct = made.mean_out[e] + (x - made.mean_in[e]) @ made.inner[e, :rank].T @ made.outer[e, :rank]
            torch.testing.assert_close(answer, direct, rtol=1e-4, atol=1e-4)


def selection(standins, experts: int = 16, top_k: int = 4, **options) -> LayerSelection:
    info = LayerInfo("layer", 0, experts, top_k, WeightRule())
    return LayerSelection(info, ImportanceThreshold(ratio=0.6, **options), standins=standins)


def test_what_they_answered_for_is_counted():
    routing = make_routing(tokens=9, seed=3)
    chosen = selection(LayerStandIns(layer(16), "blend"))
    first = chosen(routing)
    chosen(make_routing(tokens=9, seed=4))
    second = chosen(routing)
    counts = chosen.counters.read()[Phase.DECODE]
    shares = []
    for result in (first, second):
        own = routing.weights / routing.weights.sum(-1, keepdim=True)
        shares.append(torch.where(result.answered > 0, own, 0.0).sum(-1))
    assert counts.answered_mass == pytest.approx(counts.open_rows - counts.kept_mass)  # all that was lost
    assert counts.answered_mass > float(shares[0].sum() + shares[1].sum()) > 0
    assert counts.answered_mass_most >= float(shares[0].max())
    chosen.counters.reset()
    assert chosen.counters.read()[Phase.DECODE].answered_mass == 0


def test_steps_of_one_call_are_answered_one_by_one():
    standins = LayerStandIns(layer(16), "stand-in")
    steps = make_routing(tokens=6, seed=5, batch=(3,))
    together = selection(standins)(steps)
    for step, each in enumerate(steps.steps()):
        alone = selection(standins)(each)
        for name in ("ids", "weights", "answered"):
            assert_same(getattr(together, name)[step], getattr(alone, name))


@pytest.mark.parametrize("mode", ["blend", "stand-in"])
@pytest.mark.parametrize("roles", ["mixed", "padding"])
def test_the_fused_selection_is_answered_for_in_the_same_way(monkeypatch, mode, roles):
    role = lynx.Role
    kinds = {"mixed": (role.OPEN, role.EXACT, role.OPEN), "padding": (role.OPEN, role.PADDING, role.OPEN)}[roles]
    routing = make_routing(tokens=9, seed=6, roles=kinds * 3)
    in_torch = selection(LayerStandIns(layer(16), mode))
    expected = in_torch(routing)
    monkeypatch.setenv("LYNX_KERNELS", "triton")
    fused = selection(LayerStandIns(layer(16), mode))
    fused.place(torch.device("cpu"))
    result = fused(routing)
    assert not fused.why_not_fused
    for name in ("ids", "lost"):
        assert_same(getattr(result, name), getattr(expected, name))
    for name in ("weights", "answered"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name))
    read = (each.counters.read()[Phase.DECODE] for each in (in_torch, fused))
    first, second = read
    assert first.answered_mass == pytest.approx(second.answered_mass)
    assert first.active_after == second.active_after


def test_they_follow_a_model_that_is_moved(monkeypatch):
    standins = LayerStandIns(layer(16))
    chosen, places = selection(standins), []
    standins.known = standins.known.to("meta")

    def place(device):
        places.append(device)
        standins.known = torch.ones(16, dtype=torch.bool, device=device)

    monkeypatch.setattr(standins, "place", place)
    result = chosen(make_routing(tokens=9, seed=3))
    chosen(make_routing(tokens=9, seed=3))
    assert places == [torch.device("cpu")]
    assert (result.answered > 0).any()
