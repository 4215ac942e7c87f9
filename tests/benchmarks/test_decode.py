"""How decode.py goes through models, batches and modes, in its own process; what a GPU does is played."""

import gc
import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

HEAD = {"benchmark": "decode", "device": "cuda", "rounds": 3, "steps": 2, "prompt": 4}
CARD = {"hardware": {"gpu": {"name": "card", "capability": "9.0", "driver": "1"}}}
MODEL = {"model": "M", "T": 16}
MS = {  # of stock under each implementation, and of Lynx
    "plain": {"eager": 9.0, "grouped_mm": 3.0, "batched_mm": 4.0, "lynx": 3.3},
    "graph": {"grouped_mm": 2.0, "batched_mm": 1.9, "lynx": 1.0},
    "compiled": {"batched_mm": 0.8, "lynx": 0.9},
}


@dataclass
class Counts:
    steps: int


class Handle:
    """Lynx's counters, which count the rounds that were run since they were set to zero."""

    def __init__(self) -> None:
        self.steps = 0

    def reset(self) -> None:
        self.steps = 0

    def report(self) -> Any:
        return SimpleNamespace(total={"decode": Counts(self.steps)})


class Bench:
    """A bench on which a step takes as long as `MS` says, and what it has no time for cannot run."""

    def __init__(self, model: Any, facts: Any, batch: int, prompt: int, steps: int) -> None:
        self.mode, self.ran, self.closed = "", [], False

    def clear(self) -> None:
        self.mode = ""

    def ready(self, setup: Any, mode: str) -> Any:
        self.mode = mode
        self.ran.append((mode, setup.strategy, setup.implementation))
        setup.rounds, setup.refused = [], "" if setup.implementation in MS[mode] else "it cannot be captured"
        return setup

    def seconds(self, setup: Any) -> float:
        if setup.handle is not None:
            setup.handle.steps += 1
        return MS[self.mode][setup.implementation] / 1e3

    def close(self) -> None:
        self.closed = True


class Budget:
    """Time that runs out when it has been asked for so often."""

    def __init__(self, asked: int) -> None:
        self.left = asked

    @property
    def spent(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture
def decode(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    decode, setups = benchmarks.decode, benchmarks.setups

    def make_setups(bench: Any) -> list[Any]:
        stock = [setups.Setup("stock", name, None) for name in setups.IMPLEMENTATIONS]
        return stock + [setups.Setup(name, "lynx", None, Handle()) for name in setups.STRATEGIES[1:]]

    def make_bench(*arguments: Any) -> Bench:
        decode.made = Bench(*arguments)
        return decode.made

    monkeypatch.setattr(decode, "Bench", make_bench)
    monkeypatch.setattr(decode, "make_setups", make_setups)
    return decode


def record(decode: Any, out: Path, *modes: str) -> Any:
    asked = [{"model": ["M"], "T": [16], "mode": list(modes), "strategy": list(decode.STRATEGIES)}]
    return decode.Record(out, HEAD, CARD, asked, True)


def test_modes_are_timed_part_by_part(decode: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    def part(budget: int, *modes: str) -> dict[str, Any]:
        decode.run_batch(record(decode, out, *modes), None, None, MODEL, Budget(budget))
        assert decode.made.closed
        return json.loads(out.read_text())

    result = part(1, "plain", "graph")  # no time for the second
    assert {row["mode"] for row in result["rows"]} == {"plain"}
    assert not result["complete"]
    assert result["cases"] == {"asked": 10, "missing": 5}
    result = part(9, "plain", "graph")
    assert {mode for mode, *_ in decode.made.ran} == {"graph"}
    assert result["complete"]
    ran = [row for row in result["rows"] if row["strategy"] == "exact"]
    assert [row["counts"] for row in ran] == [{"steps": 3}] * 2  # of three rounds, after one that is not counted

    result = part(3, "compiled")  # time for two compilations
    assert decode.made.ran == [("compiled", "stock", "batched_mm"), ("compiled", "exact", "lynx")]
    assert not result["complete"]
    result = part(99, "compiled")
    assert [strategy for _, strategy, _ in decode.made.ran] == [
        "stock",
        "importance-threshold",
        "batch-union",
        "top-budget",
    ]
    assert result["complete"]
    assert len(result["rows"]) == 7 + 7 + 5
    assert [row["experts"] for row in result["rows"] if row["fastest_stock"]] == ["batched_mm"]

    by_mode = {row["mode"]: row for row in result["rows"] if row["strategy"] == "top-budget"}
    assert by_mode["compiled"]["ratio"] == by_mode["compiled"]["ratio_same_mode"]
    assert by_mode["compiled"]["ratio"]["q1"] == pytest.approx(0.9 / 0.8)
    assert by_mode["graph"]["ratio"] == {"median": pytest.approx(1.0 / 0.8)}  # of another mode: not in the same rounds
    assert by_mode["graph"]["ratio_same_mode"]["median"] == pytest.approx(1.0 / 1.9, rel=1e-4)


def test_compiling_needs_another_mode(decode: Any, tmp_path: Path) -> None:
    made = record(decode, tmp_path / "out.json", "compiled")
    decode.run_batch(made, None, None, MODEL, Budget(99))
    assert "no other mode was timed" in made.result["failed"][0]
    assert decode.made.ran == []


def test_what_cannot_run_is_no_success(decode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MS, "graph", {"grouped_mm": 2.0})
    made = record(decode, tmp_path / "out.json", "graph")
    decode.run_batch(made, None, None, MODEL, Budget(99))
    assert len(made.result["failed"]) == 4
    assert made.result["failed"][0] == "M, batch 16, graph, exact: it cannot be captured"
    assert [case[-1] for case in made.missing] == list(decode.STRATEGIES[1:])
    with pytest.raises(typer.Exit):
        made.finish()


def test_a_batch_that_raises_is_noted_and_the_next_goes_on(
    decode: Any, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(decode, "make_model", lambda *_: (None, {"H": 8}))
    tried = []

    def run_batch(record: Any, model: Any, facts: Any, about: dict[str, Any], budget: Any) -> None:
        tried.append(about["T"])
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(decode, "run_batch", run_batch)
    asked = [{"model": ["M, small"], "T": [1, 4], "mode": ["plain"], "strategy": ["stock"]}]
    made = decode.Record(tmp_path / "out.json", HEAD, CARD, asked, False)
    decode.run_model(made, SimpleNamespace(name="M"), 0, 1, Budget(99), torch.device("cpu"))
    assert tried == [1, 4]
    assert made.result["failed"][1] == "M, small, batch 4: RuntimeError: CUDA error: out of memory"


def test_the_first_model_is_gone_when_the_second_is_built(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decode, models, alive = benchmarks.decode, [], []
    build = decode.build

    def watched(*arguments: Any) -> Any:
        gc.collect()
        alive.append(sum(model() is not None for model in models))
        model = build(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(decode, "build", watched)
    monkeypatch.setattr(decode, "pin_one_thread", lambda: None)
    monkeypatch.setattr(decode, "bandwidth", lambda device: {"copy": 1.0, "read": 1.0})
    app = typer.Typer()
    app.command()(decode.main)
    words = ["--device", "cpu", "--divide", "8", "--batches", "2", "--rounds", "1", "--prompt", "4"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert alive == [0, 0]
    assert json.loads((tmp_path / "out.json").read_text())["complete"]
