"""Continuations scored under a setting: what serving would have run, had it generated them."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import lynx
from lynx.demo.cache import as_argument
from lynx.errors import MeasureError
from lynx.measuring.batches import align
from lynx.measuring.examples import reference_examples
from lynx.measuring.scoring import score
from lynx.measuring.subject import load_subject

SETTING = {"strategy": {"name": "batch-union", "top": 1}}


@pytest.fixture(scope="module")
def subject():
    return load_subject("reference")


@pytest.fixture(scope="module")
def texts():
    """Four prompts of 9 to 24 tokens and continuations of 5, 7, 9 and 11."""
    examples = [each for each in reference_examples() if len(each.continuation) >= 12][:4]
    prompts = [each.prompt[: 9 + 5 * place] for place, each in enumerate(examples)]
    return prompts, [each.continuation[: 5 + 2 * place] for place, each in enumerate(examples)]


def run(subject, texts, setting="exact", **options):
    with torch.inference_mode(), lynx.attach(subject.model, setting) as handle:
        found = score(subject, *texts, handle, **options)
        return [each.log_likelihood for each in found], [each.greedy for each in found], handle.report().total["decode"]


@torch.inference_mode()
def step_by_step(subject, prompts, continuations, setting):
    """The plain definition: prefill, then one forward for each token; a row that is through is masked."""
    model, batch = subject.model, align(prompts, continuations, subject.pad_id)
    cache = DynamicCache(config=model.config)
    sums, greedy = torch.zeros(len(prompts), dtype=torch.float64), [True] * len(prompts)
    with lynx.attach(model, setting) as handle:
        mask = batch.mask.clone()
        for row, continuation in enumerate(continuations):
            mask[row, batch.prompt_columns + len(continuation) - 1 :] = 0
        begin = 0
        for end in range(batch.prompt_columns, batch.ids.shape[1]):
            logits = model(
                input_ids=batch.ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=batch.positions[:, begin:end],
                **as_argument(cache, model),
                use_cache=True,
            ).logits[:, -1]
            for row, continuation in enumerate(continuations):
                if end - batch.prompt_columns < len(continuation):
                    token = batch.ids[row, end]
                    sums[row] += logits[row].double().log_softmax(-1)[token]
                    greedy[row] = greedy[row] and bool(logits[row].argmax() == token)
            begin = end
        return sums.tolist(), greedy, handle.report().total["decode"]


@pytest.mark.parametrize("setting", ["exact", SETTING], ids=["exact", "union"])
def test_it_is_what_decoding_finds(subject, texts, setting):
    sums, greedy, decode = run(subject, texts, setting)
    expected, likeliest, steps = step_by_step(subject, *texts, setting)
    assert sums == pytest.approx(expected, rel=1e-4)
    assert greedy == likeliest
    # columns of continuation without the last: 4 + 6 + 8 + 10 rows in 10 steps
    assert (decode.steps, decode.tokens) == (steps.steps, steps.tokens) == (10, 28)
    assert decode.active_after == pytest.approx(steps.active_after)


def test_a_setting_changes_it(subject, texts):
    exact, _, before = run(subject, texts)
    pruned, _, after = run(subject, texts, SETTING)
    assert all(one != other for one, other in zip(exact, pruned, strict=True))
    assert after.active_after < 0.8 * before.active_after


def test_one_token_comes_from_the_prompt(subject, texts):
    prompts, continuations = texts
    ones = prompts, [continuation[:1] for continuation in continuations]
    exact, _, _ = run(subject, ones)
    pruned, _, decode = run(subject, ones, SETTING)
    assert exact == pruned
    assert decode.steps == 0


def test_stress_puts_prompts_under_the_setting(subject, texts):
    gentle, _, _ = run(subject, texts, SETTING)
    stressed, _, decode = run(subject, texts, SETTING, stress=True)
    assert decode.tokens == sum(map(len, texts[0])) + sum(map(len, texts[1])) - 4
    assert gentle != stressed
    assert run(subject, texts, stress=True)[0] == pytest.approx(run(subject, texts)[0], rel=1e-4)


@pytest.mark.parametrize("stress", [False, True])
def test_columns_may_be_run_in_parts(subject, texts, stress):
    whole, greedy, decode = run(subject, texts, SETTING, stress=stress)
    parts, same, counted = run(subject, texts, SETTING, stress=stress, most_scores=3 * 4 * 258)
    assert parts == pytest.approx(whole, rel=1e-4)
    assert (greedy, decode.tokens, decode.steps) == (same, counted.tokens, counted.steps)


def test_texts_without_a_prompt_worth_a_pass(subject, texts):
    """A prompt of one token is read in the same pass as what follows."""
    _, continuations = texts
    short = [continuation[:1] for continuation in continuations], [c[1:] for c in continuations]
    assert run(subject, short, SETTING)[0] == pytest.approx(step_by_step(subject, *short, SETTING)[0], rel=1e-4)


def test_greedy_is_told(subject, texts):
    prompts, _ = texts
    batch = align(prompts, [()] * 4, subject.pad_id)
    tokens = subject.model.generate(
        input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=6, min_new_tokens=6, do_sample=False
    )[:, batch.prompt_columns :].tolist()
    tokens[2][4] = (tokens[2][4] + 1) % 256
    assert run(subject, (prompts, tokens))[1] == [True, True, False, True]


def test_scores_that_are_not_finite_are_told(subject, texts):
    broken = copy.deepcopy(subject.model)
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(MeasureError, match="not finite"):
        run(replace(subject, model=broken), texts)
