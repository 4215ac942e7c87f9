"""One pass over whole sequences, read column by column, is step-by-step decoding on a cache."""

import families
import pytest
import torch

import lynx

STRATEGIES = [
    {"name": "batch-union", "top": 1},
    {"name": "top-budget", "budget": 3},
    {"name": "importance-threshold", "ratio": 0.6},
    {"name": "static-top", "top": 1},
    {"name": "phase-aware", "decode": {"name": "popularity", "drop": 2}},
]
COUNTS = ("steps", "exact_steps", "tokens", "open_rows", "rows_changed", "active_before", "active_after")
OPEN_COUNTS = ("open_active_before", "open_active_after")


def _whole(model, batch, tokens, prompt_columns, handle):
    ids = torch.cat([batch["input_ids"], tokens], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tokens)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), handle.teacher_forced(prompt_columns):
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


@pytest.mark.parametrize("strategy", STRATEGIES, ids=[strategy["name"] for strategy in STRATEGIES])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_equals_decoding_step_by_step(model, strategy):
    batch, tokens = families.prompts(rows=6), families.new_tokens(rows=6, columns=5)
    prompt = batch["input_ids"].shape[1]
    plain = families.stepwise(model, batch, tokens)
    with lynx.attach(model, strategy) as handle:
        stepped = families.stepwise(model, batch, tokens)
        first = handle.report()
        handle.reset()
        whole = _whole(model, batch, tokens, prompt, handle)
        second = handle.report()
    torch.testing.assert_close(whole[:, prompt:], stepped.decode, rtol=1e-4, atol=1e-5)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(whole[:, :prompt][real], stepped.prefill[real], rtol=1e-4, atol=1e-5)
    # selection did something, or the above says nothing
    assert not torch.allclose(stepped.decode, plain.decode, atol=1e-3)
    for mine, its in zip(second.layers, first.layers, strict=True):
        decode, stepped_decode = mine.phases["decode"], its.phases["decode"]
        for count in (*COUNTS, *OPEN_COUNTS):
            assert getattr(decode, count) == getattr(stepped_decode, count), count
        assert decode.kept_mass_mean == pytest.approx(stepped_decode.kept_mass_mean, abs=1e-6)
        assert decode.steps == 5
        assert decode.rows_changed > 0
        # prompt columns are prefill, as is the prompt in true decoding, in other steps
        assert mine.phases["prefill"].exact_rows == its.phases["prefill"].exact_rows == int(real.sum())


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_no_prompt_and_right_padding(model):
    """Every position under the policy; padding behind short sequences does not count."""
    ids = families.new_tokens(rows=4, columns=7)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    other = torch.where(mask.bool(), ids, 77)
    with lynx.attach(model, "batch-union", top=1) as handle, handle.teacher_forced(0), torch.no_grad():
        first, second = (model(input_ids=tokens, attention_mask=mask).logits for tokens in (ids, other))
    total = handle.report().total
    assert families.same(first[mask.bool()], second[mask.bool()])
    assert total["prefill"].steps == 0
    assert (total["decode"].steps, total["decode"].open_rows, total["decode"].padding_rows) == (14, 50, 6)
    assert total["decode"].active_after < total["decode"].active_before


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_ends_with_its_block(model):
    batch = families.prompts()
    with lynx.attach(model, "batch-union", top=1) as handle, torch.no_grad():
        before = model(**batch).logits
        with handle.teacher_forced(0):
            assert not torch.equal(model(**batch).logits, before)
        assert torch.equal(model(**batch).logits, before)
        with pytest.raises(ValueError, match="exactly one"), handle.teacher_forced(0):
            model(unknown=1)
        assert torch.equal(model(**batch).logits, before)
        with pytest.raises(lynx.AttachError, match="0 or more"):
            handle.teacher_forced(-1)
    with pytest.raises(lynx.AttachError, match="needs an attached model"):
        handle.teacher_forced(0)
