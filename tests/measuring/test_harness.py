"""Tasks of lm-evaluation-harness, local ones, on the reference model; needs the extra `lm-eval`."""

import json

import pytest
from harness_files import short_problems, write_tasks
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lynx.cli import main
from lynx.config import resolve_config
from lynx.errors import ConfigError, MeasureError
from lynx.measuring import harness_model
from lynx.measuring.answers import answer
from lynx.measuring.examples import reference_examples
from lynx.measuring.harness import TaskProtocol, evaluate_tasks, rounds
from lynx.measuring.harness_model import HarnessModel
from lynx.measuring.harness_tasks import load_tasks
from lynx.measuring.intervals import wilson
from lynx.measuring.scoring import score
from lynx.measuring.settings import parse_setting
from lynx.measuring.subject import load_subject

HERE = ["made_of_problems", "made_of_choices", "made_of_texts"]
SETTINGS = [parse_setting("batch-union top=1"), parse_setting("importance-threshold ratio=0.5")]
AGGREGATE = "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
PROTOCOL = TaskProtocol(batch=5, all_controls=False)


@pytest.fixture(scope="module")
def subject():
    return load_subject("reference")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tasks(paths):
    return load_tasks([str(paths[name]) for name in HERE])


@pytest.fixture(scope="module")
def result(subject, tasks):
    calls = []
    found = evaluate_tasks(subject, tasks, SETTINGS, PROTOCOL, calls.append)
    assert len(calls) == rounds(subject, tasks, SETTINGS, PROTOCOL) == 3 * 3 * 12
    return found


def row_of(result, task, label):
    (row,) = (row for row in result.rows if (row.task, row.label) == (task, label))
    return row


def test_rows_are_settings_and_exact_routing_on_every_task(result):
    assert [(row.label, row.task, row.metric, row.control) for row in result.rows] == [
        (label, task, metric, label == "exact")
        for label in ("batch-union top=1", "importance-threshold ratio=0.5", "exact")
        for task, metric in zip(HERE, ("exact_match,answer", "acc,none", "bits_per_byte,none"), strict=True)
    ]


def test_exact_routing_answers_what_eval_answers(subject, result):
    """The same problems, asked in other batches by code that knows no harness."""
    prompts = {tuple(problem.prompt.encode()) for problem in short_problems(12)}
    asked = [each for each in reference_examples() if each.prompt in prompts]
    exact = row_of(result, "made_of_problems", "exact")
    share = answer(subject, asked, "exact", 4, 48)
    assert exact.documents == len(asked) == 12
    assert (exact.score, exact.interval) == (share.value, (share.low, share.high))
    assert exact.score > 0.5


def test_pruned_runs_really_prune(result):
    for task in HERE:
        union, threshold, exact = (row_of(result, task, row.label) for row in result.rows[::3])
        assert exact.active_after == exact.active_before
        assert (exact.kept_mass_mean, exact.kept_mass_worst, exact.change) == (1.0, 1.0, 0.0)
        assert union.active_after < threshold.active_after < 0.8 * exact.active_after, task
        assert union.kept_mass_worst < union.kept_mass_mean < 1
    texts = row_of(result, "made_of_texts", "batch-union top=1")
    assert texts.change > 0
    assert texts.higher_is_better is False
    assert texts.change == texts.score - row_of(result, "made_of_texts", "exact").score


def test_decode_batches_are_real(result):
    """As large as they are said to be, but where texts have ended."""
    assert all(2 < row.rows <= 5 for row in result.rows)
    longest = max(len(problem.solution) for problem in short_problems(12))
    generated = row_of(result, "made_of_problems", "exact")
    assert longest <= generated.steps <= 3 * longest
    # what is scored counts where it is run: all tokens but each text's first, from prefill, and last
    scored = row_of(result, "made_of_texts", "exact")
    assert scored.rows * scored.steps == sum(len(problem.prompt.encode()) - 1 for problem in short_problems(12))


def test_answers_to_one_question_do_not_share_a_batch(subject, paths, monkeypatch):
    batches = []

    def recorded(subject, prompts, continuations, *rest):
        batches.append(list(prompts))
        return score(subject, prompts, continuations, *rest)

    monkeypatch.setattr(harness_model, "score", recorded)
    evaluate_tasks(subject, load_tasks([str(paths["made_of_choices"])]), [resolve_config("exact", {})], PROTOCOL)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 4]
    assert all(len(set(map(tuple, batch))) == len(batch) for batch in batches)


def test_changes_come_with_intervals(result):
    chosen = row_of(result, "made_of_choices", "batch-union top=1")
    low, high = chosen.change_interval
    assert low <= chosen.change <= high
    right = round(12 * chosen.score)
    assert chosen.interval == pytest.approx((wilson(right, 12).low, wilson(right, 12).high))
    # bits per byte of a corpus are no mean over its documents
    texts = row_of(result, "made_of_texts", "batch-union top=1")
    assert texts.interval is texts.change_interval is None


def test_conditions_name_what_was_run(result):
    conditions = json.loads(json.dumps(result.to_dict()))["conditions"]
    assert conditions["tasks"]["made_of_choices"] == {"version": 2.0, "fewshot": 0, "documents": 12}
    assert {"lynx", "torch", "transformers", "lm_eval", "threads", "time", "dtype"} <= set(conditions)
    assert (conditions["model"], conditions["batch"], conditions["truncated"]) == ("reference", 5, 0)
    assert len(conditions["data"]) == 16


def bytes_tokenizer():
    """A tokenizer of transformers whose tokens are the reference model's: bytes."""
    vocabulary = {sign: byte for byte, sign in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<pad>": 256, "<end>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def test_exact_routing_is_what_the_harness_finds_by_itself(subject, tasks):
    """Answers and likelihoods of every request, against the harness's own model of transformers."""
    theirs = HFLM(pretrained=subject.model, tokenizer=bytes_tokenizer(), batch_size=4, max_length=1024)
    ours = HarnessModel(subject, resolve_config("exact", {}), batch=5)
    assert (ours.tokenizer_name, ours.max_length) == ("reference", 1024)
    samples = []
    for model in (theirs, ours):
        tasks.prepare(None)
        samples.append(evaluate(model, {"tasks": tasks.tasks}, bootstrap_iters=0)["samples"])
    for task in HERE:
        for expected, found in zip(*(each[task] for each in samples), strict=True):
            if task == "made_of_problems":
                assert found["resps"] == expected["resps"]
                continue
            for [value], [same] in zip(expected["resps"], found["resps"], strict=True):
                if task == "made_of_texts":
                    assert same == pytest.approx(value, rel=1e-3)
                else:
                    assert same == (pytest.approx(value[0], rel=1e-3), value[1])


def test_one_token_behind_the_prompt_is_refused_unless_stressed(subject, paths):
    tasks = load_tasks([str(paths["made_of_digits"])])
    with pytest.raises(ConfigError, match=r"'made_of_digits' scores the one token behind each prompt.*--stress"):
        evaluate_tasks(subject, tasks, SETTINGS[:1], PROTOCOL)
    generated = load_tasks([str(paths["made_of_problems"])])
    with pytest.raises(ConfigError, match="--stress is for texts that are scored"):
        evaluate_tasks(subject, generated, SETTINGS[:1], TaskProtocol(stress=True))
    stressed = TaskProtocol(batch=5, limit=5, stress=True, all_controls=False)
    union, exact = (
        row for row in evaluate_tasks(subject, tasks, SETTINGS[:1], stressed).rows if row.metric == "acc,none"
    )
    assert union.active_after < exact.active_after


def test_texts_that_are_too_long_lose_their_front_or_are_refused(subject, paths, monkeypatch):
    generated = load_tasks([str(paths["made_of_problems"])])
    chosen = load_tasks([str(paths["made_of_choices"])])
    with pytest.raises(MeasureError, match=r"asks for answers of 1024 tokens, and the model reads 1024"):
        evaluate_tasks(subject, generated, SETTINGS[:1], TaskProtocol(max_new_tokens=1024))
    cut = TaskProtocol(batch=4, limit=4, max_new_tokens=3, all_controls=False)
    monkeypatch.setattr(HarnessModel, "max_length", 64)
    assert evaluate_tasks(subject, generated, SETTINGS[:1], cut).conditions["truncated"] == 4
    assert evaluate_tasks(subject, chosen, SETTINGS[:1], cut).conditions["truncated"] == 8
    monkeypatch.setattr(HarnessModel, "max_length", 16)
    with pytest.raises(MeasureError, match=r"a text of \d+ tokens is scored, and the model reads 16"):
        evaluate_tasks(subject, chosen, SETTINGS[:1], cut)


def test_tasks_are_found(subject, paths, tmp_path):
    folder = paths["made_of_texts"].parent
    assert list(load_tasks(["made_of_te*"], [folder]).tasks) == ["made_of_texts"]
    assert set(load_tasks(["of_the_reference_model"], [folder]).tasks) == set(paths)
    group = tmp_path / "group.yaml"
    group.write_text("group: both\ntask: [made_of_digits, made_of_choices]\n" + AGGREGATE)
    tasks = load_tasks([str(group)], [folder])
    assert set(tasks.tasks) == {"made_of_digits", "made_of_choices"}
    protocol = TaskProtocol(batch=4, limit=4, stress=True, all_controls=False)
    found = evaluate_tasks(subject, tasks, SETTINGS[:1], protocol)
    digits, choices, both = (row_of(found, task, "exact") for task in ("made_of_digits", "made_of_choices", "both"))
    assert both.score == (digits.score + choices.score) / 2
    assert (both.steps, both.documents) == (digits.steps + choices.steps, 8)


@pytest.mark.parametrize(
    ("names", "include", "words"),
    [
        (
            ["made_of_problem"],
            True,
            r"Did you mean 'made_of_problems'\? --include-path has .*made_of_texts.*which `lm_eval ls tasks` lists",
        ),
        (["none.yaml"], False, "names 'none.yaml', which cannot be read"),
    ],
)
def test_names_that_name_nothing(paths, names, include, words):
    with pytest.raises(ConfigError, match=words):
        load_tasks(names, [paths["made_of_texts"].parent] if include else [])


def test_files_that_are_no_task(paths, tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        load_tasks(["made_of_texts"], [tmp_path / "nowhere"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: none.jsonl}\n")
    with pytest.raises(ConfigError, match=r"cannot load .*broken.yaml"):
        load_tasks([str(broken)])


def test_an_old_harness_is_told(monkeypatch):
    monkeypatch.delattr(TaskManager, "load")
    with pytest.raises(ConfigError, match=r"0.4.12 or later; this one is older: pip install 'lynx-moe\[lm-eval\]'"):
        load_tasks(["gsm8k"])


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "reference", *arguments])
    assert stopped.value.code == code


def test_the_command(capsys, paths):
    small = ["--batch", "4", "--limit", "4", "--max-new-tokens", "3", "--strategy", "static-top top=1"]
    tasks = f"{paths['made_of_problems']},made_of_choices"
    run("--tasks", tasks, "--include-path", str(paths["made_of_choices"].parent), *small, "--json")
    found = json.loads(capsys.readouterr().out)
    assert {row["label"] for row in found["rows"]} == {"static-top top=1", "exact", "static-top", "static-top top=3"}
    assert [row["score"] for row in found["rows"] if row["task"] == "made_of_problems"] == [0.0] * 4
    assert {row["documents"] for row in found["rows"]} == {4}
    run("--tasks", str(paths["made_of_problems"]), *small, "--controls", "exact")
    table = capsys.readouterr().out
    assert "made_of_problems: exact_match,answer ↑" in table
    assert "static-top top=1" in table
    run("--tasks", str(paths["made_of_problems"]), *small, "--chat-template", code=2)
    assert "reference has no chat template" in capsys.readouterr().err
