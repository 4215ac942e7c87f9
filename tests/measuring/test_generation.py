"""Batched generation up to stop tokens and stop strings."""

from dataclasses import replace

import pytest
import torch

import lynx
from lynx.measuring.batches import align
from lynx.measuring.examples import reference_examples
from lynx.measuring.generation import StopStrings, generate
from lynx.measuring.subject import load_subject


@pytest.fixture(scope="module")
def subject():
    return load_subject("reference")


@pytest.fixture(scope="module")
def prompts():
    return [each.prompt for each in reference_examples() if each.answer is not None and len(each.continuation) < 44][:4]


@pytest.fixture(scope="module")
def plain(subject, prompts):
    """What the model says, whole."""
    batch = align(prompts, [()] * 4, subject.pad_id)
    tokens = subject.model.generate(
        input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=40, do_sample=False, pad_token_id=256
    )
    return [subject.decode(row) for row in tokens[:, batch.prompt_columns :].tolist()]


def test_texts_end_where_the_model_ends_them(subject, prompts, plain):
    assert generate(subject, prompts, 40) == plain
    assert all(text.splitlines()[-1].startswith("Answer: ") for text in plain)


def test_texts_end_before_a_stop_string(subject, prompts, plain):
    assert generate(subject, prompts, 40, until=["\nAns", ""]) == [text.partition("\nAns")[0] for text in plain]
    first = plain[0][5:8]
    several = generate(subject, prompts, 40, until=["\nAns", first])
    assert several == [text.partition("\nAns")[0].partition(first)[0] for text in plain]


def test_generation_stops_once_all_rows_have(subject, prompts, plain):
    """It neither goes on for nothing nor lets rows that are through vote."""
    until = [" = "]
    longest = max(text.index(" = ") + 3 for text in plain)
    with lynx.attach(subject.model, "exact") as handle:
        generate(subject, prompts, 40, until=until)
        decode = handle.report().total["decode"]
    # the first token comes from prefill, and a row's last one is still run while others go on
    assert decode.steps == longest - 1
    assert decode.tokens == sum(min(text.index(" = ") + 3, longest - 1) for text in plain)
    assert decode.tokens < 4 * decode.steps


def test_special_tokens_stop_too(subject, prompts, plain):
    """A string that is one token and does not show, as the end of a turn of a conversation is."""
    special = ord("=")
    turns = replace(
        subject,
        encode=lambda text: [special] if text == "<end>" else subject.encode(text),
        decode=lambda ids: subject.decode([token for token in ids if token != special]),
    )
    assert generate(turns, prompts, 40, until=["<end>"]) == [text.partition("=")[0] for text in plain]


def test_stop_strings_are_found_in_what_is_generated_alone(subject):
    stop = StopStrings(subject.decode, ["b c"], begin=3)
    rows = torch.tensor([list(b"b cxb c"), list(b"b cxxb "), list(b"b cxxxx")])
    assert [stop(rows[:, :end], None).tolist() for end in (4, 6, 7)] == [[False] * 3, [False] * 3, [True, False, False]]
    rows[0, 6], rows[1, 4:] = ord("x"), torch.tensor(list(b"b c"))
    assert stop(rows, None).tolist() == [True, True, False]  # what has ended stays ended


def test_ended_rows_do_not_vote_where_the_model_names_no_stop_token():
    subject = load_subject("reference")
    settings, configs = subject.model.generation_config, [subject.model.config]
    problems = lynx.load_reference_model().problems[:6]
    prompts = [subject.encode(problem.prompt) for problem in problems]
    rows = []
    before = settings.eos_token_id, settings.pad_token_id
    of_configs = [(config.eos_token_id, config.pad_token_id) for config in configs]
    for named in (True, False):
        if not named:
            settings.eos_token_id = settings.pad_token_id = None
            for config in configs:
                config.eos_token_id = config.pad_token_id = None
        try:
            with lynx.attach(subject.model, "batch-union", top=2) as handle:
                generate(subject, prompts, 24, until=[" ="])
            decode = handle.report().total["decode"]
            rows.append(decode.open_rows / max(decode.steps, 1))
            assert named or settings.pad_token_id is None
        finally:
            settings.eos_token_id, settings.pad_token_id = before
            for config, (eos, pad) in zip(configs, of_configs, strict=True):
                config.eos_token_id, config.pad_token_id = eos, pad
    assert rows[0] == rows[1] < 6
