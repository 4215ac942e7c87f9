"""What settings cost, measured on the reference model."""

import copy
import json
import math

import pytest
import torch

import lynx
from lynx.cli import main
from lynx.errors import ConfigError
from lynx.measuring.answers import answer, questions
from lynx.measuring.batches import forced_batches
from lynx.measuring.evaluate import Protocol, evaluate, rounds
from lynx.measuring.examples import Example, reference_examples
from lynx.measuring.intervals import bootstrap, wilson
from lynx.measuring.quality import measure
from lynx.measuring.settings import controls, describe, parse_setting, sweep
from lynx.measuring.subject import load_subject

SETTINGS = [parse_setting("batch-union top=1"), parse_setting("importance-threshold mass=0.8")]
SMALL = Protocol(batch=4, columns=8, seeds=(0, 1), most_batches=1, questions=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def subject():
    return load_subject("reference")


@pytest.fixture(scope="module")
def result(subject):
    calls = []
    found = evaluate(subject, reference_examples(), SETTINGS, SMALL, calls.append)
    assert len(calls) == rounds(subject, reference_examples(), SETTINGS, SMALL)
    return found


def test_rows_are_those_asked_for_and_the_controls(result):
    assert [(row.label, row.control) for row in result.rows] == [
        ("batch-union top=1", False),
        ("importance-threshold mass=0.8", False),
        ("exact", True),
        ("static-top top=1", True),
        ("static-top", True),
        ("static-top top=3", True),
        ("batch-union refill=none top=1", True),
        ("importance-threshold refill=none mass=0.8", True),
    ]


def test_exact_routing_costs_nothing(result):
    exact = next(row for row in result.rows if row.label == "exact")
    assert (exact.kl.value, exact.rise.value, exact.agreement.value) == (0.0, 0.0, 1.0)
    assert exact.share == exact.kept_mass_worst == 1.0


def test_figures_hang_together(result):
    union, mass, *_ = result.rows
    assert union.share < mass.share < 1
    assert union.kl.value > mass.kl.value > 0
    assert union.kl.low <= union.kl.value <= union.kl.high
    assert mass.kept_mass_worst >= 0.8
    assert union.kept_mass_worst < union.kept_mass_mean < 1
    assert union.active_after == pytest.approx(sum(union.layers) / 4)
    alone = next(row for row in result.rows if row.label == "static-top top=1")
    assert alone.kl.value > union.kl.value  # nothing is shared there
    assert mass.answers.value == 0  # four tokens are no answer


def test_conditions_name_what_was_run(result):
    data = json.loads(json.dumps(result.to_dict()))
    conditions = data["conditions"]
    assert (conditions["model"], conditions["batches"], conditions["questions"]) == ("reference", 2, 2)
    assert (conditions["lynx"], conditions["torch"]) == (lynx.__version__, torch.__version__)
    assert len(conditions["data"]) == 16


def test_kl_is_what_the_two_models_say(subject):
    """Against the plain definition: both continuations run whole, and compared place by place."""
    (batch, *_) = forced_batches(reference_examples(), 4, 12, subject.pad_id)
    (quality,) = measure(subject.model, [batch], [SETTINGS[0]], stress=True)
    forward = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "position_ids": batch.positions,
    }
    with torch.no_grad():
        exact = subject.model(**forward, use_cache=False).logits.double().log_softmax(-1)
        with lynx.attach(subject.model, SETTINGS[0]) as handle, handle.teacher_forced(0):
            policy = subject.model(**forward, use_cache=False).logits.double().log_softmax(-1)
    kl = (exact.exp() * (exact - policy)).sum(-1)[:, :-1]
    assert quality.kl == pytest.approx((kl * batch.scored).sum(-1).tolist(), rel=0.01)
    assert quality.places == batch.scored.sum(-1).tolist() == [11.0] * 4
    same = (exact.argmax(-1) == policy.argmax(-1))[:, :-1]
    assert quality.agree == (same & batch.scored).sum(-1).tolist()
    chosen = policy[:, :-1].gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    assert quality.loss == pytest.approx((-chosen * batch.scored).sum(-1).tolist(), rel=1e-3, abs=1e-3)


def test_prompts_are_exact_unless_stressed(subject):
    (batch, *_) = forced_batches(reference_examples(), 4, 12, subject.pad_id)
    gentle, stressed = (measure(subject.model, [batch], [SETTINGS[0]], stress=stress)[0] for stress in (False, True))
    assert gentle.layers[0][0].tokens == 4 * 12
    assert stressed.layers[0][0].tokens == int(batch.mask.sum())
    assert gentle.kl_value != stressed.kl_value


def test_a_strategy_that_learns_sees_all_batches(subject):
    """It begins where the batch before left it, and the model is free afterwards."""
    batches = [*forced_batches(reference_examples(), 4, 24, subject.pad_id)][:3]
    setting = parse_setting("target-active share=0.6")
    (together, plain) = measure(subject.model, batches, [setting, SETTINGS[0]])
    (alone,) = measure(subject.model, batches[2:], [setting])
    assert len(together.layers) == len(plain.layers) == 3
    assert together.layers[2][0].active_after != alone.layers[0][0].active_after
    (again,) = measure(subject.model, batches, [SETTINGS[0]])
    assert plain.kl == again.kl


def test_answers_are_counted(subject):
    asked = [each for each in questions(reference_examples(), 500) if len(each.continuation) <= 44][:6]
    calls = []
    share = answer(subject, asked, "exact", 4, 44, lambda: calls.append(1))
    assert len(calls) == 2
    assert 0.5 < share.value <= 1
    never = [Example(each.prompt, each.continuation, "no such word") for each in asked[:2]]
    assert answer(subject, never, "exact", 4, 44).value == 0
    with pytest.raises(ConfigError, match="no example has an `answer`"):
        questions([Example((1,), (2,))], 4)


def test_bootstrap_covers_the_mean():
    """Of 200 estimates from samples of a known mean about 95 in 100 hold it."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(200):
        sums = torch.randn(60, generator=generator) + 3
        estimate = bootstrap(sums, torch.ones(60), seed)
        held += estimate.low <= 3 <= estimate.high
    assert 180 <= held <= 198


def test_bootstrap_weighs_sequences_by_their_places():
    assert bootstrap(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 3.0])).value == 2.5


def test_wilson():
    estimate = wilson(9, 10)
    assert (estimate.value, round(estimate.low, 4), round(estimate.high, 4)) == (0.9, 0.5958, 0.9821)
    assert wilson(0, 10).low == 0.0


def test_settings_as_they_are_written(tmp_path):
    assert (
        describe(parse_setting("importance-threshold ratio=0.4 protect=2"))
        == "importance-threshold protect=2 ratio=0.4"
    )
    path = tmp_path / "lynx.yaml"
    SETTINGS[0].save(path)
    assert parse_setting(str(path)) == SETTINGS[0]
    for wrong, words in (("", "is empty"), ("batch-union top=[", "is not understood")):
        with pytest.raises(ConfigError, match=words):
            parse_setting(wrong)
    with pytest.raises(ConfigError, match="'top' is no option"):
        parse_setting("batch-union top")
    with pytest.raises(ConfigError, match="batch-union"):
        parse_setting("batch-onion")


def test_sweeps():
    assert [config.strategy.top for config in sweep("batch-union", ["top=1:3"])] == [1, 2, 3]
    assert [config.strategy.ratio for config in sweep("importance-threshold", ["ratio=0.2:0.8:4"])] == [
        0.2,
        0.4,
        0.6,
        0.8,
    ]
    both = [config.strategy for config in sweep("importance-threshold", ["ratio=0.2:0.4:2", "protect=1:2"])]
    assert [(each.ratio, each.protect) for each in both] == [
        (0.2, 1),
        (0.2, 2),
        (0.4, 1),
        (0.4, 2),
    ]
    for wrong in ("top", "top=1", "top=a:b"):
        with pytest.raises(ConfigError, match="is no range"):
            sweep("batch-union", [wrong])


def test_controls_drop_where_a_setting_re_picks():
    beside = controls([parse_setting("static-top top=2"), parse_setting("top-budget budget=9")], top_k=2)
    assert [describe(each) for each in beside] == ["exact", "static-top top=1", "top-budget refill=none budget=9"]


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *arguments])
    assert stopped.value.code == code


def test_the_command(capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    some = [each for each in reference_examples() if len(each.continuation) >= 8][:16]
    rows = [{"prompt": bytes(each.prompt).decode(), "domain": each.domain} for each in some]
    for row, each in zip(rows, some, strict=True):
        row["continuation"] = bytes(token for token in each.continuation if token < 256).decode(errors="ignore")
    data.write_text("\n".join(map(json.dumps, rows)))
    small = ["--batch", "4", "--columns", "6", "--seeds", "1", "--batches", "1"]
    run("reference", "--data", str(data), "--strategy", "batch-union", "--sweep", "top=1:2", *small, "--json")
    result = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in result["rows"]][:2] == ["batch-union top=1", "batch-union"]
    assert all(math.isfinite(row["kl"]["value"]) for row in result["rows"])
    run("reference", "--strategy", "batch-union top=1", *small)
    table = capsys.readouterr().out
    assert "batch-union top=1" in table
    assert "exact" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reference"], "at least one --strategy"),
        (["nowhere", "--strategy", "exact"], "cannot load a model"),
        (["reference", "--strategy", "exact", "--strategy", "batch-union", "--sweep", "top=1:2"], "2 are given"),
    ],
)
def test_misuse_is_told(arguments, words, capsys):
    run(*arguments, code=2)
    assert words in capsys.readouterr().err


def test_a_text_that_was_measured_twice_counts_once(subject):
    once = [*forced_batches(reference_examples(), 4, 8, subject.pad_id)][:2]
    (single,) = measure(subject.model, once, [SETTINGS[0]])
    (double,) = measure(subject.model, [*once, *once], [SETTINGS[0]])
    assert double.mean("kl") == single.mean("kl")
    assert double.rise == single.rise


def test_layers_that_are_left_out_count_as_exact(subject):
    """Else a setting in one layer would look like one in all."""
    config = lynx.Config.build({**SETTINGS[0].dump(), "layers": {"include": [1]}})
    (batch, *_) = forced_batches(reference_examples(), 4, 8, subject.pad_id)
    (quality,) = measure(subject.model, [batch], [config])
    before, after = quality.active("before"), quality.active()
    assert len(after) == 4
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True, True]
    assert describe(config) == "batch-union top=1 layers={'include': [1]}"


def test_scores_that_are_not_finite_are_told(subject):
    broken = copy.deepcopy(subject.model)
    broken.lm_head.weight.data[3] = float("nan")
    (batch, *_) = forced_batches(reference_examples(), 4, 8, subject.pad_id)
    with pytest.raises(lynx.LynxError, match="not finite"):
        measure(broken, [batch], [SETTINGS[0]])
