"""Tuning the reference model, on few tokens: what is written, what goes on, what is refused."""

import copy
import json

import pytest
import yaml

import lynx
from lynx.cli import main
from lynx.errors import ConfigError
from lynx.measuring.evaluate import Protocol
from lynx.measuring.examples import reference_examples, split
from lynx.measuring.subject import load_subject
from lynx.tuning import sensitivity
from lynx.tuning.goal import Goal
from lynx.tuning.report import write_report
from lynx.tuning.tune import Effort, fingerprint, rounds, tune

SMALL = Protocol(batch=4, columns=8, most_batches=1)
EFFORT = Effort(candidates=3, rounds=3)


@pytest.fixture(scope="module")
def subject():
    return load_subject("reference")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("tune") / "kept.json"


def tune_small(subject, goal, keep, protocol=SMALL, **options):
    return tune(subject, reference_examples(), goal, protocol, EFFORT, keep=keep, **options)


@pytest.fixture(scope="module")
def tuned(subject, kept):
    calls = []
    found = tune_small(subject, Goal("target-active", 0.7), kept, advance=calls.append)
    assert 0 < len(calls) <= rounds(subject, reference_examples(), SMALL, EFFORT)
    return found


def test_what_is_chosen_was_verified(tuned):
    assert tuned.chosen is tuned.trials[-1]
    assert tuned.chosen.passed
    assert tuned.chosen.quality.share <= 0.7
    assert all(trial.quality.share > 0.7 for trial in tuned.trials if not trial.passed)


def test_text_that_chooses_does_not_verify(tuned):
    first, second = split(reference_examples(), 0.5)
    assert (tuned.conditions["examples_choosing"], tuned.conditions["examples_verifying"]) == (len(first), len(second))
    assert not {*first} & {*second}


def test_the_configuration_carries_its_evidence_and_attaches(tuned, subject, tmp_path):
    path = tmp_path / "lynx.yaml"
    tuned.config.save(path)
    evidence = yaml.safe_load(path.read_text())["evidence"]
    assert evidence["goal"] == "at most 70% of the active experts"
    assert evidence["kl"]["low"] <= evidence["kl"]["value"] <= evidence["kl"]["high"]
    assert (evidence["lynx"], evidence["model"]) == (lynx.__version__, "reference")
    config = lynx.load_config(path)
    assert config == tuned.config
    with lynx.attach(subject.model, config) as handle:
        assert handle.layers == 4


def test_an_interrupted_run_goes_on_where_it_was(subject, kept, tuned, monkeypatch):
    measured, layers = sensitivity.measure, []

    def counted(model, batches, settings, advance):
        layers.append(settings)
        return measured(model, batches, settings, advance)

    monkeypatch.setattr(sensitivity, "measure", counted)
    progress = sensitivity.Progress.model_validate_json(kept.read_text())
    del progress.layers[3]
    progress.write(kept)
    again = tune_small(subject, Goal("target-active", 0.7), kept)
    assert len(layers) == 1
    assert again.config.strategy == tuned.config.strategy


def test_measurements_of_something_else_are_refused(subject, kept, tuned):
    other = Protocol(batch=4, columns=9, most_batches=1)
    with pytest.raises(ConfigError, match=r"kept\.json' was measured with another batches; delete it"):
        tune_small(subject, Goal("target-active", 0.7), kept, other)


def test_what_no_setting_gives_is_not_written(subject, kept, tuned, tmp_path):
    never = tune_small(subject, Goal("target-active", 0.01), kept)
    assert never.chosen is None
    with pytest.raises(ConfigError, match="no setting was verified to give at most 1% of the active experts; the clo"):
        _ = never.config
    (report, *_) = write_report(never, tmp_path / "report.md")
    assert "No setting was verified" in report.read_text()


def test_goals_need_what_they_are_about(subject):
    with pytest.raises(ConfigError, match="needs questions"):
        tune_small(subject, Goal("max-drop", 0.01), None)
    with pytest.raises(ConfigError, match="needs a latency model"):
        tune_small(subject, Goal("target-tpot", 0.01), None)
    with pytest.raises(ConfigError, match="has 3 layers, reference has 4 MoE layers"):
        tune_small(subject, Goal("target-tpot", 0.01), None, seconds=sum, weights=[1.0] * 3)


def test_a_drop_of_nothing_is_no_limit(subject):
    """Where the model answers nothing, every setting would pass."""
    asking = Protocol(batch=4, columns=8, most_batches=1, questions=4, max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"the model answers 0\.0% of 4 questions"):
        tune_small(subject, Goal("max-drop", 0.01), None, asking)


def test_other_weights_are_another_model(subject):
    other = copy.deepcopy(subject.model)
    assert fingerprint(other) == fingerprint(subject.model)
    other.lm_head.weight.data.neg_()
    assert fingerprint(other) != fingerprint(subject.model)


def test_a_latency_model_turns_experts_into_time(subject, kept, tuned):
    def seconds(active):
        return 1e-3 * sum(active)

    limit = 0.8 * seconds(tuned.path[0].by_layer)
    found = tune_small(subject, Goal("target-tpot", limit), kept, seconds=seconds)
    assert found.chosen.seconds == pytest.approx(seconds(found.chosen.quality.active()))
    assert found.chosen.seconds <= limit


def test_the_report_shows_layers_trials_and_the_frontier(tuned, tmp_path):
    report, plot = write_report(tuned, tmp_path / "report.md")
    text = report.read_text()
    for layer, strategy in enumerate(tuned.chosen.allocation.strategies):
        assert f"| {layer} | {strategy['name']}" in text
    assert f"![KL by active experts]({plot.name})" in text
    assert plot.read_text().startswith("<?xml")
    assert text.count("| no |") + text.count("| yes |") == len(tuned.trials)


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as stopped:
        main(["tune", *arguments])
    assert stopped.value.code == code


def test_the_command(tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    small = ["--batch", "4", "--columns", "6", "--seeds", "1", "--batches", "1", "--candidates", "2"]
    run("reference", "--target-active", "0.9", *small, "--out", str(out), "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["written"] == [str(out.with_suffix(suffix)) for suffix in (".yaml", ".md", ".svg")]
    assert all((tmp_path / name).exists() for name in ("mine.yaml", "mine.md", "mine.svg", "mine.measured.json"))
    assert lynx.load_config(out).dump() == found["config"]


def test_stand_ins_answer_in_every_setting_that_is_tried(tmp_path, capsys):
    small = ["--batch", "4", "--columns", "6", "--seeds", "1", "--batches", "1", "--candidates", "2"]
    out, plain = tmp_path / "mine.yaml", tmp_path / "plain.yaml"
    file = lynx.load_reference_model().standins
    run("reference", "--target-active", "0.9", *small, "--out", str(out), "--standins", str(file), "--json")
    run("reference", "--target-active", "0.9", *small, "--out", str(plain), "--json")
    config = lynx.load_config(out)
    assert config.standins.file == file
    assert config.evidence["answered_mass_mean"] > 0
    assert config.evidence["standins"][0] == "blend"
    other = lynx.load_config(plain)
    assert other.standins is None
    assert other.evidence["answered_mass_mean"] == 0
    assert config.evidence["kl"] != other.evidence["kl"]
    run("reference", "--target-active", "0.9", *small, "--out", str(plain), "--standins", str(file), code=2)
    assert "standins" in capsys.readouterr().err  # what was measured without them is not gone on with
    run("reference", "--target-active", "0.9", *small, "--out", str(out), code=2)
    assert "standins" in capsys.readouterr().err  # nor the other way round


def test_a_time_is_asked_for_by_a_latency_model(tmp_path, capsys):
    line = {"constant": {"value": 1e-3, "low": 0, "high": 0}, "r_squared": 1.0, "fewest": 1, "most": 32}
    slopes = [{"value": value, "low": 0, "high": 0} for value in (1e-4, -1e-9, 2e-4, 1e-4)]
    layers = [line | {"layer": str(index), "per_expert": slope} for index, slope in enumerate(slopes)]
    model = tmp_path / "latency.json"
    batches = [{"batch": 4, "rest": 0.001, "layers": layers}]
    model.write_text(json.dumps({"model": "reference", "experts": "lynx", "batches": batches}))
    small = ["--batch", "4", "--columns", "6", "--seeds", "1", "--batches", "1", "--candidates", "2"]
    out = tmp_path / "mine.yaml"
    run("reference", "--target-tpot", "8.0", "--latency", str(model), *small, "--out", str(out), "--json")
    evidence = json.loads(capsys.readouterr().out)["config"]["evidence"]
    assert evidence["goal"] == "at most 0.008 s per output token"
    assert 0.005 < evidence["predicted_seconds_per_token"] <= 0.008
    other = tmp_path / "other.json"
    other.write_text(model.read_text().replace('"reference"', '"another"'))
    run("reference", "--target-tpot", "8.0", "--latency", str(other), *small, "--out", str(out), code=2)
    assert "the latency model is of 'another', not of 'reference'" in capsys.readouterr().err
    small[1] = "8"
    run("reference", "--target-tpot", "8.0", "--latency", str(model), *small, "--out", str(out), code=2)
    assert "batches of 8 were not timed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one goal"),
        (["--max-kl", "0.1", "--max-drop", "1%"], "give one goal"),
        (["--max-drop", "few"], "a share such as 1%"),
        (["--target-active", "60"], "a share is at most 1"),
        (["--max-kl", "0.1", "--out", "nowhere/lynx.yaml"], "there is no folder 'nowhere'"),
    ],
)
def test_misuse_is_told(arguments, words, capsys):
    run("reference", *arguments, code=2)
    assert words in capsys.readouterr().err
