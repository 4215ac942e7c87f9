"""A setting for each batch size: each verified for itself, and joined."""

import json
from dataclasses import replace

import pytest
import yaml

import lynx
from lynx.cli import main
from lynx.errors import ConfigError, MeasureError
from lynx.measuring.evaluate import Protocol
from lynx.measuring.examples import reference_examples, split
from lynx.measuring.quality import measure
from lynx.measuring.subject import load_subject
from lynx.tuning import sizes as sizes_room
from lynx.tuning.candidates import EXACT
from lynx.tuning.goal import Goal
from lynx.tuning.report import write_report
from lynx.tuning.sizes import ordered, rounds, tune_sizes
from lynx.tuning.tune import Effort, tune

SIZES = (6, 3)
SMALL = Protocol(columns=6, most_batches=1)
EFFORT = Effort(candidates=3, rounds=3)
GOAL = Goal("target-active", 0.8)


@pytest.fixture(scope="module")
def subject():
    return load_subject("reference")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    return {size: folder / f"{size}.json" for size in SIZES}


@pytest.fixture(scope="module")
def tuned(subject, kept):
    calls = []
    found = tune_sizes(subject, reference_examples(), GOAL, SIZES, SMALL, EFFORT, keep=kept, advance=calls.append)
    assert 0 < len(calls) <= rounds(subject, reference_examples(), SIZES, SMALL, EFFORT)
    assert {call.partition(":")[0] for call in calls} == {"3", "6"}
    return found


def test_each_size_is_tuned_for_itself(subject, kept, tuned):
    """A part is what tuning that size alone chooses."""
    assert list(tuned.parts) == [3, 6]
    alone = tune(subject, reference_examples(), GOAL, replace(SMALL, batch=6), EFFORT, keep=kept[6])
    assert tuned.parts[6].config.strategy == alone.config.strategy
    assert tuned.parts[3].config.strategy != alone.config.strategy


def test_the_joined_setting_is_verified_as_it_is_attached(subject, tuned, tmp_path):
    """From the file, in batches of each size: what its part does there, to the last bit."""
    path = tmp_path / "lynx.yaml"
    tuned.config.save(path)
    config = lynx.load_config(path)
    assert config == tuned.config
    assert config.strategy.name == "by-batch-size"
    _, verifying = split(reference_examples(), 0.5)
    for size, trial in tuned.joined.items():
        batches = replace(SMALL, batch=size).batches(verifying, subject.pad_id)
        (found,) = measure(subject.model, batches, [config])
        part = tuned.parts[size].chosen
        assert found.kl == trial.quality.kl == part.quality.kl
        assert found.active() == trial.quality.active() == part.quality.active()
        assert trial.passed


def test_between_sizes_the_smaller_one_holds_and_below_routing_is_exact(subject, tuned):
    _, verifying = split(reference_examples(), 0.5)
    for size, setting in ((2, EXACT), (5, tuned.parts[3].config), (8, tuned.parts[6].config)):
        batches = replace(SMALL, batch=size).batches(verifying, subject.pad_id)
        joined, expected = measure(subject.model, batches, [tuned.config, setting])
        assert joined.kl == expected.kl
        assert joined.active() == expected.active()


def test_every_size_has_its_evidence(tuned):
    evidence = tuned.config.evidence
    assert list(evidence["sizes"]) == ["3", "6"]
    for size, found in evidence["sizes"].items():
        assert found["batch"] == int(size)
        assert found["kl"]["low"] <= found["kl"]["value"] <= found["kl"]["high"]
        assert found["active_experts"] <= 0.8 * found["active_experts_before"]
    assert (evidence["goal"], evidence["lynx"]) == ("at most 80% of the active experts", lynx.__version__)
    assert "batch" not in evidence


def test_an_interrupted_run_measures_no_layer_twice(subject, kept, tuned, monkeypatch):
    whole = kept[6].read_text()
    cut = json.loads(whole)
    del cut["layers"]["3"]
    kept[6].write_text(json.dumps(cut))
    before = kept[3].stat().st_mtime_ns
    again = tune_sizes(subject, reference_examples(), GOAL, SIZES, SMALL, EFFORT, keep=kept)
    assert kept[3].stat().st_mtime_ns == before
    assert kept[6].read_text() == whole
    assert again.config.strategy == tuned.config.strategy


def test_a_size_that_misses_the_goal_is_named(subject, kept, tuned, tmp_path):
    """At one size it can be met, at the other it cannot."""
    times = {size: (lambda active, size=size: 10**size * sum(active), [1.0] * 4) for size in SIZES}
    goal = Goal("target-tpot", 1000 * 0.8 * sum(tuned.parts[3].path[0].by_layer))
    found = tune_sizes(subject, reference_examples(), goal, SIZES, SMALL, EFFORT, times, kept)
    assert (found.parts[3].chosen is None, found.parts[6].chosen is None) == (False, True)
    assert not found.joined
    with pytest.raises(ConfigError, match=r"batches of 6: no setting was verified .* leave this size out of --batch"):
        _ = found.config
    report, *_ = write_report(found, tmp_path / "report.md")
    assert "No setting was verified to give that in batches of 6" in report.read_text()


def test_joined_it_may_miss_what_its_part_met(tuned):
    """Questions are answered by batches that run empty, and then by the smaller sizes' settings."""
    worse = replace(tuned, joined={**tuned.joined, 6: replace(tuned.joined[6], passed=False)})
    with pytest.raises(ConfigError, match="batches of 6: their setting met the goal alone, and joined"):
        _ = worse.config


def test_a_joined_setting_that_does_something_else_is_not_written(subject, kept, tuned, monkeypatch):
    monkeypatch.setattr(sizes_room, "_join", lambda parts, standins: lynx.Config.build({"strategy": "exact"}))
    with pytest.raises(MeasureError, match="in batches of 3 the joined setting leaves"):
        tune_sizes(subject, reference_examples(), GOAL, SIZES, SMALL, EFFORT, keep=kept)


def test_the_report_shows_every_size(tuned, tmp_path):
    report, *plots = write_report(tuned, tmp_path / "report.md")
    text = report.read_text()
    assert [plot.name for plot in plots] == ["report.batch-3.svg", "report.batch-6.svg"]
    for size, trial in tuned.joined.items():
        assert f"| {size} | {trial.quality.share:.1%} |" in text
        section = text.partition(f"## Batches of {size}\n")[2].partition("\n## ")[0]
        assert f"![KL by active experts](report.batch-{size}.svg)" in section
        assert section.count("| yes |") + section.count("| no |") == len(tuned.parts[size].trials)
    assert "With fewer than 3 of them it is exact" in text


def test_sizes_are_sorted_and_each_is_given_once():
    assert ordered((16, 4, 8)) == [4, 8, 16]
    for wrong, words in (((4, 1), "2 or more"), ((), "2 or more"), ((4, 16, 4), "names 4 twice")):
        with pytest.raises(ConfigError, match=words):
            ordered(wrong)


def test_a_size_that_the_text_cannot_fill_is_told_before_anything_runs(subject, monkeypatch):
    monkeypatch.setattr(sizes_room, "tune", None)
    with pytest.raises(ConfigError, match="makes no batch of 1000"):
        tune_sizes(subject, reference_examples(), GOAL, (4, 1000), SMALL, EFFORT)


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as stopped:
        main(["tune", *arguments])
    assert stopped.value.code == code


SMALLEST = ["--columns", "4", "--seeds", "1", "--batches", "1", "--candidates", "1"]


def test_the_command_takes_several_sizes(tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    run("reference", "--max-kl", "5", "--batch", "4,2", *SMALLEST, "--out", str(out))
    printed = capsys.readouterr().out
    assert printed.index("batches of 2: ") < printed.index("batches of 4: ")
    for name in ("mine.md", "mine.batch-2.svg", "mine.batch-4.svg", "mine.batch-4.measured.json"):
        assert (tmp_path / name).exists()
        assert name.endswith("json") or str(tmp_path / name) in printed
    assert list(yaml.safe_load(out.read_text())["strategy"]["sizes"]) == ["2", "4"]


def test_times_are_predicted_for_each_size(tmp_path, capsys):
    def at(batch, per_expert):
        slope = {"value": per_expert, "low": 0, "high": 0}
        line = {"constant": {"value": 0, "low": 0, "high": 0}, "r_squared": 1.0, "fewest": 1, "most": 32}
        return {"batch": batch, "rest": 0, "layers": [line | {"layer": "x", "per_expert": slope}] * 4}

    latency, out = tmp_path / "latency.json", tmp_path / "mine.yaml"
    model = {"model": "reference", "experts": "lynx", "batches": [at(2, 1e-3), at(4, 2e-3)]}
    latency.write_text(json.dumps(model))
    goal = ["--target-tpot", "1000", "--latency", str(latency)]
    run("reference", *goal, "--batch", "2,4", *SMALLEST, "--out", str(out), "--json")
    found = json.loads(capsys.readouterr().out)["config"]["evidence"]["sizes"]
    for size, per_expert in (("2", 1e-3), ("4", 2e-3)):
        expected = pytest.approx(4 * per_expert * found[size]["active_experts"], rel=1e-3)
        assert found[size]["predicted_seconds_per_token"] == expected
    run("reference", *goal, "--batch", "2,8", *SMALLEST, "--out", str(out), code=2)
    assert "batches of 8 were not timed; there are 2, 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ("1", "2 or more"),
        ("4,1", "2 or more"),
        ("4,4", "names 4 twice"),
        ("4;8", "whole numbers above 0"),
        ("", "whole numbers above 0"),
    ],
)
def test_senseless_sizes_are_told(batch, words, capsys):
    run("reference", "--max-kl", "0.1", "--batch", batch, code=2)
    assert words in " ".join(capsys.readouterr().err.split())
