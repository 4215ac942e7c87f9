"""What takes turns, and what becomes of the rounds."""

from dataclasses import replace

import pytest
import torch

import lynx
from lynx.measuring.clock import StepTime
from lynx.measuring.contenders import Contender, Measured, contenders, implementation_of, interleave, running, stock
from lynx.measuring.settings import parse_setting
from lynx.measuring.times import fastest_alone, latency_of, observe, timed_rows
from lynx.routing import WeightRule
from lynx.strategy import LayerInfo


def test_every_round_begins_with_another():
    order, turns = [], []

    def measure(item):
        order.append(item)
        return len(order)

    kept = interleave("abc", 3, measure, lambda: turns.append(len(order)))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert turns == [3, 6, 9, 12]
    assert kept == [[6, 8, 10], [4, 9, 11], [5, 7, 12]]  # the first round is not kept


def test_contenders():
    listed = contenders([parse_setting("batch-union top=1")], "auto", [None], full=8, active=5.0)
    assert [each.label for each in listed] == [
        "alone",
        "exact",
        "batch-union top=1",
        "budget of 1",
        "budget of 2",
        "budget of 3",
        "budget of 4",
        "budget of all experts",
    ]
    both = contenders([lynx.Config(strategy="exact", experts="lynx")], "auto", ["grouped_mm", "batched_mm"], 8, 5.0)
    assert [each.label for each in both][:4] == [
        "alone (grouped_mm)",
        "alone (batched_mm)",
        "exact",
        "exact (experts: lynx)",
    ]
    forced = contenders([parse_setting("batch-union top=1")], "lynx", [None], 8, 5.0)
    assert {each.setting.experts for each in forced if each.setting} == {"lynx"}
    few = contenders([], "auto", [None], full=2, active=2.0)
    assert [each.label for each in few][2:] == ["budget of 1", "budget of all experts"]


def test_implementations_are_put_back(tiny):
    before = implementation_of(tiny)
    assert before == "grouped_mm"
    assert stock(tiny, 10) == [None]  # on a CPU, generate changes nothing
    with running(tiny, "batched_mm") as name:
        assert (name, implementation_of(tiny)) == ("batched_mm", "batched_mm")
    assert implementation_of(tiny) == before
    with running(tiny, None) as name:
        assert name == before


@pytest.mark.parametrize(("room", "names"), [(100, ["grouped_mm", "batched_mm"]), (15, ["grouped_mm"])])
def test_batched_mm_is_left_out_where_it_does_not_fit(monkeypatch, room, names, tiny):
    class OnGpu:
        config = tiny.config
        device = torch.device("cuda")

    OnGpu.config._experts_implementation = "grouped_mm"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room, 1000))
    assert stock(OnGpu(), gathered=10) == names


LAYERS = [LayerInfo("a", 0, 8, 2, WeightRule(), 100, 2), LayerInfo("b", 1, 8, 2, WeightRule(), 100, 2)]


def made_up():
    """Two rounds of everything; a layer takes 1 s and 0.1 s per active expert, and the rest of a step 2 s."""

    def one(active, factor=1.0, layer_b=None):
        before = {"a": 8.0, "b": 6.0}
        after = {"a": active, "b": min(active, 6.0)} if layer_b is None else {"a": active}
        times = tuple(1 + 0.1 * after.get(name, before[name]) for name in "ab")
        whole = StepTime(factor * (2 + sum(times)), tuple(factor * each for each in times), host=0.5)
        return Measured(whole, before if layer_b is None else {"a": 8.0}, after, "lynx: loop")

    def alone(seconds, name):
        return Measured(StepTime(seconds, (seconds / 4, seconds / 4)), {}, {}, name)

    setting = lynx.Config(strategy={"name": "batch-union", "top": 1}, layers={"include": [0]})
    listed = [
        Contender("alone (grouped_mm)", "alone", None, "grouped_mm"),
        Contender("alone (batched_mm)", "alone", None, "batched_mm"),
        Contender("exact", "exact", parse_setting("exact")),
        Contender("mine", "setting", setting),
        *(Contender(f"budget of {each}", "budget", parse_setting(f"top-budget budget={each}")) for each in (2, 4, 8)),
    ]
    steady = [
        [alone(8.0, "grouped_mm"), alone(16.0, "grouped_mm")],
        [alone(4.0, "batched_mm"), alone(8.0, "batched_mm")],
        *([one(active), one(active, 2.0)] for active in (8.0,)),
        [one(4.0, layer_b="as it is"), one(4.0, 2.0, layer_b="as it is")],
        *([one(active), one(active, 2.0)] for active in (2.0, 4.0, 8.0)),
    ]
    return listed, steady


def test_figures_from_rounds():
    listed, found = made_up()
    assert fastest_alone(listed, found) == 1
    rows = timed_rows(listed, found, LAYERS)
    exact, mine = rows[2], rows[3]
    assert (exact.active_before, exact.active_after) == (7.0, 7.0)
    # the layer that is left alone counts as exact routing has it
    assert (mine.active_before, mine.active_after) == (7.0, 5.0)
    assert exact.step.median == pytest.approx(1.5 * (2 + 1.8 + 1.6))
    # the second round was slow for all, which no ratio shows
    assert mine.to_exact.low == mine.to_exact.high == pytest.approx((2 + 1.4 + 1.6) / (2 + 1.8 + 1.6))
    assert mine.to_alone.median == pytest.approx((2 + 1.4 + 1.6) / 4)
    assert mine.layer_to_exact.median == pytest.approx((1.4 + 1.6) / (1.8 + 1.6))
    assert mine.layers == pytest.approx((1.5 * 1.4, 1.5 * 1.6))


def test_predicted_steps_are_of_median_time():
    listed, found = made_up()
    later = (0.0, 1.0, 5.0)  # seconds that a round adds outside of the layers
    found = [
        [replace(rounds[0], time=replace(rounds[0].time, step=rounds[0].time.step + each)) for each in later]
        for rounds in found
    ]
    latency = latency_of(16, listed, found, LAYERS)
    assert latency.rest == pytest.approx(2.0 + 1.0)
    assert latency.predict([8.0, 6.0]) == pytest.approx(timed_rows(listed, found, LAYERS)[-1].step.median)


def test_a_verdict_is_made_from_them():
    listed, found = made_up()
    # one round, so that no quartile is between rounds
    found = [each[:1] for each in found]
    latency = latency_of(16, listed, found, LAYERS)
    assert [each.per_expert.value for each in latency.layers] == pytest.approx([0.1, 0.1])
    assert [each.constant.value for each in latency.layers] == pytest.approx([1.0, 1.0])
    assert latency.rest == pytest.approx(2.0)
    rows = timed_rows(listed, found, LAYERS)
    seen = observe(16, rows, latency, found, LAYERS, 0, "wall", False)
    assert (seen.batch, seen.num_experts, seen.top_k, seen.active, seen.layers) == (16, 8, 2, 7.0, 2)
    assert seen.alone == 4.0
    assert seen.attached == pytest.approx(5.4)
    assert seen.by_experts == pytest.approx(0.1 * 8 + 0.1 * 6)
    assert (seen.host, seen.own, seen.experts, seen.expert_bytes) == (0.5, None, "lynx: loop", 1600)
