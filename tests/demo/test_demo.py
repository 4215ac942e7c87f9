"""The demo, on a plan small enough to test: its figures are real and come out the same twice."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lynx
from lynx.demo import speed, table
from lynx.demo.batches import forced_batches, prompt_batches
from lynx.demo.plot import plot
from lynx.demo.quality import Answers
from lynx.demo.run import FULL_PLAN, QUICK_PLAN, Plan, Results, best_first, on_frontier, run, steps
from lynx.demo.settings import config_of, label
from lynx.reference_model.model import EOS_ID, PAD_ID

PLAN = Plan(
    settings=(
        {"name": "batch-union", "top": 1},
        {"name": "importance-threshold", "ratio": 0.3},
        {"name": "importance-threshold", "ratio": 0.3, "standins": True},
        {"name": "static-top", "top": 1},
    ),
    batch=8,
    forced=1,
    columns=24,
    generated=1,
    max_new_tokens=24,
    rounds=2,
    layers=1,
)


@pytest.fixture(scope="module", autouse=True)
def small_layers():
    """Shrink the timing model: what is tested is the measuring, not the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "HIDDEN", 64)
        patch.setattr(speed, "INTERMEDIATE", 32)
        patch.setattr(speed, "LAYER_BYTES", 64 * 3 * 64 * 32 * 4)
        yield


@pytest.fixture(scope="module")
def results() -> Results:
    calls: list[str] = []
    measured = run(PLAN, calls.append)
    assert len(calls) == steps(PLAN)
    return measured


@pytest.fixture(scope="module")
def reference() -> lynx.ReferenceModel:
    return lynx.load_reference_model()


def test_exact_changes_nothing(results: Results) -> None:
    for forced in results.exact.forced.values():
        assert forced.kl == pytest.approx(0.0, abs=1e-7)
        assert forced.bits_per_byte_rise == pytest.approx(0.0, abs=1e-6)
        assert forced.top1_agreement == 1.0
        assert forced.active_before == forced.active_after > 4
        assert forced.kept_mass_mean == forced.kept_mass_worst == 1.0


def test_settings_save_and_cost(results: Results) -> None:
    for outcome in results.outcomes:
        for kind, forced in outcome.forced.items():
            assert forced.active_after < forced.active_before
            # later layers see hidden states that the policy has changed
            assert forced.active_before == pytest.approx(results.exact.forced[kind].active_before, rel=0.1)
            assert forced.kl > 0
            assert 0 < forced.kept_mass_worst < forced.kept_mass_mean < 1
            assert forced.expert_bytes < results.exact.forced[kind].expert_bytes
            assert forced.bytes_scored > 8 * 10
        assert outcome.answers.asked == 8 + 4


def test_sharing_beats_no_sharing(results: Results) -> None:
    by_name = {outcome.setting["name"]: outcome.forced["mixed"] for outcome in results.outcomes}
    assert by_name["batch-union"].active_after == pytest.approx(by_name["static-top"].active_after, abs=1.0)
    assert by_name["batch-union"].kl < by_name["static-top"].kl


def test_stand_ins_lose_less_than_re_picking(results: Results) -> None:
    by_label = {outcome.label: outcome.forced["mixed"] for outcome in results.outcomes}
    plain = by_label["importance-threshold ratio=0.3"]
    answered = by_label["importance-threshold ratio=0.3 + stand-ins"]
    assert answered.active_after == pytest.approx(plain.active_after, abs=0.5)
    assert answered.kl < 0.8 * plain.kl


def test_best_trade_comes_first(results: Results) -> None:
    assert list(results.outcomes) == best_first(results.outcomes)
    frontier = [on_frontier(outcome, results.outcomes) for outcome in results.outcomes]
    assert frontier[0]
    assert frontier == sorted(frontier, reverse=True)


def test_same_figures_on_a_second_run(results: Results) -> None:
    def without_times(data: dict) -> dict:
        return {**data, "outcomes": [{**row, "decode_time": None} for row in data["outcomes"]]}

    again = run(replace(PLAN, rounds=0)).to_dict()["outcomes"]
    first = without_times(results.to_dict())["outcomes"]
    assert again == first


def test_times_are_against_exact_routing(results: Results) -> None:
    assert results.exact.timing is not None
    assert results.exact.timing.ratio == 1.0
    for outcome in results.outcomes:
        assert outcome.timing is not None
        assert outcome.timing.low <= outcome.timing.ratio <= outcome.timing.high
        assert outcome.timing.active < results.exact.timing.active
        assert outcome.timing.milliseconds > 0


def test_written_files_hold_every_figure(results: Results, tmp_path: Path) -> None:
    as_json, as_csv = table.write(results, tmp_path / "out")
    data = json.loads(as_json.read_text())
    assert data["outcomes"][0]["label"] == "exact"
    assert len(data["outcomes"]) == 5
    with as_csv.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 3
    first = next(row for row in rows if row["setting"] == "batch-union top=1" and row["batches"] == "mixed")
    outcome = next(o for o in results.outcomes if o.label == "batch-union top=1")
    assert float(first["kl"]) == outcome.forced["mixed"].kl
    assert int(first["exact_match_n"]) == 12


def test_table_and_legend_show_conditions(results: Results) -> None:
    from rich.console import Console

    console = Console(width=160, record=True)
    with console.capture() as captured:
        console.print(table.rich_table(results))
    text = captured.get()
    assert all(label(setting) in text for setting in PLAN.settings)
    legend = table.legend(results)
    assert "Another model: random float32 weights" in legend
    assert f"exact match over {results.exact.answers.asked} problems" in legend


def test_plot(results: Results, tmp_path: Path) -> None:
    png, svg = plot(results, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "batch-union" in svg.read_text() or svg.stat().st_size > 10_000


def test_plans_are_as_large_as_they_say() -> None:
    assert len(FULL_PLAN.settings) >= 12
    assert len(QUICK_PLAN.settings) < len(FULL_PLAN.settings)
    names = {setting["name"] for setting in FULL_PLAN.settings}
    assert {
        "batch-union",
        "importance-threshold",
        "top-budget",
        "popularity",
        "affinity-binning",
        "static-top",
    } <= names
    for setting in (*FULL_PLAN.settings, *QUICK_PLAN.settings):
        assert config_of(setting).strategy.name == setting["name"]


def test_no_memory_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "free_memory", lambda: 1000)
    assert speed.layers_that_fit() == 0
    plan = replace(PLAN, settings=PLAN.settings[:1], columns=8, max_new_tokens=2)
    measured = run(plan)
    assert measured.exact.timing is None
    assert "not timed" in measured.conditions["timing_model"]
    assert "not timed" in table.legend(measured)


def test_forced_batches_align_continuations(reference: lynx.ReferenceModel) -> None:
    (batch,) = forced_batches(reference, "mixed", 1, 4, 16)
    assert batch.ids.shape == batch.mask.shape
    assert batch.scored.shape == (4, batch.ids.shape[1] - 1)
    start = batch.prompt_columns
    for row, item in enumerate(reference.code[:2]):
        assert bytes(batch.ids[row, start : start + 16].tolist()).decode() == item.continuation[:16]
    for row, problem in enumerate(reference.problems[:2], 2):
        prompt = problem.prompt.encode()
        assert bytes(batch.ids[row, start - len(prompt) : start].tolist()) == prompt
        assert (batch.ids[row, : start - len(prompt)] == PAD_ID).all()
        assert batch.mask[row].sum() == len(prompt) + min(len(problem.solution) + 1, 16)
    # a scored place is a decode column whose next token exists
    assert not batch.scored[:, :start].any()
    assert batch.scored[0].sum() == 15


def test_prompt_batches_know_their_problems(reference: lynx.ReferenceModel) -> None:
    (mixed,) = prompt_batches(reference, "mixed", 1, 6)
    assert sorted(mixed.problems) == [3, 4, 5]
    assert mixed.texts[3] == mixed.problems[3].prompt
    (alike,) = prompt_batches(reference, "problems", 1, 6)
    assert sorted(alike.problems) == list(range(6))


def test_interval_is_wilsons() -> None:
    low, high = Answers(90, 100).interval
    assert low == pytest.approx(0.8256, abs=1e-4)
    assert high == pytest.approx(0.9448, abs=1e-4)
    assert Answers(0, 10).interval[0] == 0.0
    assert math.isclose(Answers(3, 4).share, 0.75)


def test_reference_model_round_trips_text(reference: lynx.ReferenceModel) -> None:
    inputs = reference.encode(["ab", "abcd"])
    assert inputs["input_ids"].tolist() == [[PAD_ID, PAD_ID, 97, 98], [97, 98, 99, 100]]
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert reference.decode(torch.tensor([[97, EOS_ID, 98], [99, PAD_ID, PAD_ID]])) == ["a", "c"]
    assert len(reference.problems) == 500
    assert not reference.model.training
    assert reference.model.dtype == torch.float32


def test_problem_is_solved_by_its_solution(reference: lynx.ReferenceModel) -> None:
    problem = reference.problems[0]
    assert problem.solved_by(problem.solution)
    assert not problem.solved_by(problem.solution.replace(f"Answer: {problem.answer}", "Answer: -1"))
    assert not problem.solved_by("")


def test_reference_model_is_small_and_spread() -> None:
    from importlib.resources import files

    size = len((files("lynx.reference_model") / "model.safetensors").read_bytes())
    assert size <= 12_000_000
