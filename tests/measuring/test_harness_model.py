"""How requests of lm-evaluation-harness are read; needs the extra `lm-eval`."""

from dataclasses import replace

import pytest
import torch
from harness_files import write_tasks
from lm_eval.api.instance import Instance

from lynx.config import resolve_config
from lynx.measuring import harness_model
from lynx.measuring.generation import generate
from lynx.measuring.harness import TaskProtocol, evaluate_tasks
from lynx.measuring.harness_model import HarnessModel
from lynx.measuring.harness_tasks import load_tasks
from lynx.measuring.subject import load_subject

EXACT = resolve_config("exact", {})


@pytest.fixture(scope="module")
def subject():
    return load_subject("reference")


@pytest.fixture
def asked(monkeypatch):
    """What is given to `generate`, which is not run: prompts, longest answer, stop strings, options."""
    calls = []

    def recorded(subject, prompts, longest, until, **options):
        calls.append((["".join(map(chr, prompt)) for prompt in prompts], longest, until, options))
        return [f"{len(prompt)}" for prompt in prompts]

    monkeypatch.setattr(harness_model, "generate", recorded)
    return calls


def requests(kind, arguments, task="one"):
    return [Instance(kind, {}, each, 0, (task, place, 1)) for place, each in enumerate(arguments)]


def test_options_of_generation(subject, asked):
    model = HarnessModel(subject, EXACT)
    given = [
        {},
        {"until": "\n", "max_gen_toks": 7, "temperature": 0.0, "do_sample": False},
        {"until": ["a", "b"], "max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": False, "temperature": 0.7},
    ]
    model.generate_until(requests("generate_until", [("abc", options) for options in given]))
    assert sorted(asked, key=lambda call: call[1]) == [
        (["abc"], 7, ["\n"], {}),
        (["abc"], 8, ["a", "b"], {"top_p": 0.9, "do_sample": True, "temperature": 0.7}),
        (["abc", "abc"], 256, [], {}),
    ]
    HarnessModel(subject, EXACT, max_new_tokens=5).generate_until(requests("generate_until", [("abc", given[1])]))
    assert asked[-1][1] == 5


def test_batches_are_of_one_task_and_answers_come_back_in_order(subject, asked):
    texts = ["a" * length for length in (3, 9, 1, 7)]
    both = requests("generate_until", [(text, {}) for text in texts], "one")
    both[1:1] = requests("generate_until", [(text, {}) for text in texts[:2]], "other")
    calls = []
    model = HarnessModel(subject, EXACT, batch=3, advance=calls.append)
    assert model.generate_until(both) == ["3", "3", "9", "9", "1", "7"]
    assert [call[0] for call in asked] == [["a" * 9, "a" * 7, "a" * 3], ["a"], ["a" * 9, "a" * 3]]
    assert calls == ["one"] * 4 + ["other"] * 2
    assert list(model.decode) == ["one", "other"]


def test_repeats_of_a_request_are_not_side_by_side(subject, asked):
    twice = [each for each in requests("generate_until", [("a", {}), ("bb", {})]) for _ in range(2)]
    HarnessModel(subject, EXACT, batch=2).generate_until(twice)
    assert [call[0] for call in asked] == [["bb", "a"], ["bb", "a"]]


def test_sampling_is_the_same_in_every_run(subject):
    sampled = [
        ("One and one is ", {"temperature": 2.0, "max_gen_toks": 6}),
        ("Two ", {"temperature": 2.0, "max_gen_toks": 6}),
    ]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(HarnessModel(subject, EXACT).generate_until(requests("generate_until", sampled)))
    assert found[0] == found[1]
    assert found[0] != generate(subject, [subject.encode(text) for text, _ in sampled], 6)


def test_texts_begin_as_the_model_begins_them(subject, asked):
    beginning = replace(subject, begin=(60,))  # "<"
    model = HarnessModel(beginning, EXACT)
    model.generate_until(requests("generate_until", [("abc", {}), ("<x", {})]))  # a template has put it there already
    assert asked[0][0] == ["<abc", "<x"]
    assert model._pair("ab ", "cd") == ([60, 97, 98], [32, 99, 100])
    assert model._pair("", "cd") == ([60], [99, 100])
    assert HarnessModel(subject, EXACT)._pair("", "cd") == ([257], [99, 100])


def test_conversations(subject):
    chatty = replace(subject, template=lambda messages: "".join(f"[{each['content']}]" for each in messages) + ">")
    model, said = HarnessModel(chatty, EXACT), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert model.apply_chat_template(said[:1]) == "[a]>"
    assert model.apply_chat_template(said, add_generation_prompt=False) == "[a]>b"


def test_solved_examples_and_templates_reach_the_prompts(subject, asked, tmp_path):
    tasks = load_tasks([str(write_tasks(tmp_path, 6)["made_of_problems"])])
    chatty = replace(subject, template=lambda messages: "".join(f"[{each['content']}]" for each in messages))
    few = TaskProtocol(limit=3, fewshot=2, all_controls=False, chat=True)
    settings = [EXACT, resolve_config("batch-union", {"top": 1})]  # examples are drawn anew, and the same, for each
    conditions = evaluate_tasks(chatty, tasks, settings, few).conditions
    assert conditions["tasks"]["made_of_problems"]["fewshot"] == 2
    assert [prompt.count("[Problem: ") for prompt in asked[0][0]] == [3, 3, 3]
    assert asked[0][0] == asked[1][0]
    bare = evaluate_tasks(
        subject, load_tasks([str(tmp_path / "made_of_problems.yaml")]), [EXACT], TaskProtocol(limit=3)
    )
    assert [prompt.count("Problem: ") for prompt in asked[2][0]] == [1, 1, 1]
    assert bare.conditions["data"] != conditions["data"]
