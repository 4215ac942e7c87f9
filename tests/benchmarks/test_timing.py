"""How the benchmarks time and judge, in their own process: the parts that only a GPU reaches, with the GPU played."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

GPU = torch.device("cuda")


def test_times_come_from_graphs_of_many_calls(benchmarks: Any, clock: Any) -> None:
    timing, seen = benchmarks.timing, []

    def fast(copy: int) -> None:
        seen.append(copy)
        clock.work(0.01)

    def waits(copy: int) -> None:
        clock.work(0.1)
        if clock.graph is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    def broken(copy: int) -> None:
        raise ValueError("no such layout")

    def slow(copy: int) -> None:
        clock.work(1.0)

    ours = timing.Contender("ours", fast)
    others = [timing.Contender(name, call, peer=True) for name, call in (("waits", waits), ("broken", broken))]
    late = timing.Contender("slow", slow, peer=True)
    timing.measure([ours, *others, late], copies=2, rounds=5, device=GPU)
    assert ours.how == "graph"
    assert ours.rounds == pytest.approx([1e-5] * 5)
    assert set(seen) == {0, 1}
    assert ours._calls * 1e-5 >= timing.GRAPH_SECONDS
    assert others[0].how == "launches; capturing failed: RuntimeError: operation not permitted when stream is capturing"
    assert "left out" in others[0].refused
    assert others[1].figures() == {"refused": "ValueError: no such layout"}
    assert late.rounds == []
    assert late.figures()["refused"] == "left out for being slow (100 times, after 0 rounds)"


def test_what_is_launched_does_not_hide_behind_what_was_replayed(benchmarks: Any, clock: Any) -> None:
    timing, order = benchmarks.timing, []
    contenders = []
    for name, how in (("one", "graph"), ("two", "launches; it waits"), ("three", "graph")):
        made = timing.Contender(name, print, how=how)
        made._replay = lambda name=name: order.append((name, clock.waits))
        contenders.append(made)
    timing._round(contenders, 0, GPU)
    assert order == [("one", 0), ("two", 1), ("three", 1)]
    assert clock.waits == 2


def test_ratio_is_taken_round_by_round(benchmarks: Any) -> None:
    one = benchmarks.timing.Contender("one", print, rounds=[1.0, 20.0, 3.0])
    other = benchmarks.timing.Contender("other", print, rounds=[2.0, 40.0, 6.0])
    assert benchmarks.timing.ratio(one, other) == {"median": 0.5, "q1": 0.5, "q3": 0.5}
    assert benchmarks.timing.ratio(one, benchmarks.timing.Contender("none", print)) is None


def test_copies_of_a_layer(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = benchmarks.timing
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 20_000))
    assert timing.copies_needed(GPU, 1000, 100) == 2
    assert timing.copies_needed(GPU, 1000, 50) == 4
    assert timing.copies_needed(GPU, 1000, 1) == 6  # what six tenths of the free memory hold
    assert timing.copies_needed(torch.device("cpu"), 1000, 1) == 8
    with pytest.raises(MemoryError, match="two copies"):
        timing.copies_needed(GPU, 4000, 1)


def test_gathering_counts_both_projections(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = benchmarks.peers
    monkeypatch.setattr(peers, "_room", lambda device: 1200)
    layer = SimpleNamespace(weights=SimpleNamespace(gate_up=torch.empty(1, 5), down=torch.empty(1, 5).half()))
    assert peers.refused("batched_mm", layer, slots=40) == ""
    assert "too many weights" in peers.refused("batched_mm", layer, slots=41)


def row(T: int, fraction: float, layer: float, route: float, shape: str = "Qwen3-30B-A3B") -> dict[str, Any]:
    return {
        "shape": shape,
        "routing": "skewed",
        "E": 128,
        "T": T,
        "fraction": fraction,
        "layer_by_floor": {"median": layer},
        "layer_by_full": {"median": fraction + 0.1},
        "layer_by_best_peer": {"median": layer - 0.3},
        "best_peer": "grouped_mm",
        "standins_by_layer": {"median": fraction / 12},
        "contenders": {
            "layer": {"how": "graph"},
            "route": {"us": {"median": route}, "how": "graph"},
            "standins": {"how": "graph"},
        },
    }


def test_targets(benchmarks: Any) -> None:
    rows = [row(16, 1.0, 1.2, 5.0), row(32, 1.0, 1.1, 9.0), row(16, 0.5, 9.0, 7.0), row(256, 1.0, 9.0, 9.0)]
    rows += [row(16, 1.0, 1.0, 1.0, "DeepSeek-V3")]
    floor, route, peer, half, standins = benchmarks.targets.reached(rows)
    assert (floor["rows"], floor["reached"], floor["worst"]["value"]) == (2, 1, 1.2)
    assert (route["rows"], route["reached"], route["worst"]["value"]) == (3, 2, 7.0)
    assert (peer["rows"], peer["reached"], peer["worst"]["T"]) == (4, 3, 256)
    assert (half["rows"], half["reached"]) == (1, 0)
    assert (standins["rows"], standins["reached"], standins["worst"]["value"]) == (1, 1, 0.5 / 12)
    assert benchmarks.targets.reached([])[0]["worst"] is None


def test_a_row_without_a_replayed_time_has_not_reached_its_target(benchmarks: Any) -> None:
    launched, failed, alone = row(16, 1.0, 1.0, 1.0), row(32, 1.0, 1.0, 1.0), row(64, 1.0, 1.0, 1.0)
    launched["contenders"]["layer"]["how"] = "launches; capturing failed: it waits"
    failed["contenders"] = {name: {"refused": "out of memory"} for name in failed["contenders"]}
    failed |= {"layer_by_floor": None, "layer_by_full": None, "layer_by_best_peer": None}
    alone |= {"best_peer": "", "layer_by_best_peer": None}
    floor, route, peer, *_ = benchmarks.targets.reached([launched, failed, alone])
    assert (floor["rows"], floor["reached"], floor["not_replayed"]) == (3, 1, 2)
    assert (route["rows"], route["reached"]) == (1, 1)  # the selection of T = 16 was replayed
    assert (peer["rows"], peer["reached"], peer["not_replayed"]) == (2, 0, 2)  # one has no peer to be held to
