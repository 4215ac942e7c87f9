"""Attached with a strategy that keeps everything, a model is the model, bit for bit."""

import families
import pytest
import torch

import lynx

pytestmark = pytest.mark.smoke

FULL = ["exact", "batch-union"]


def _attach(model, name):
    """Every layer of a family has the same k, so one `top` is full for all."""
    k = families.routers(model)[0].top_k
    return lynx.attach(model, name, **({"top": k} if name == "batch-union" else {}))


@pytest.mark.parametrize("strategy", FULL)
def test_forward_and_cached_decode(model, strategy):
    batch, tokens = families.prompts(), families.new_tokens()
    before = families.stepwise(model, batch, tokens)
    with _attach(model, strategy) as handle:
        attached = families.stepwise(model, batch, tokens)
    report = handle.report()
    assert torch.equal(attached.prefill, before.prefill)
    assert torch.equal(attached.decode, before.decode)
    # the hooks were at work: every token was seen, and decode rows were open
    prefill, decode = report.total["prefill"], report.total["decode"]
    assert (prefill.steps, prefill.exact_rows) == (1, int(batch["attention_mask"].sum()))
    assert (decode.steps, decode.open_rows, decode.exact_rows) == (3, 12, 0)
    assert decode.rows_changed == 0
    assert decode.active_after == decode.active_before > 0


@pytest.mark.parametrize("strategy", FULL)
def test_left_padded_generate(model, strategy):
    batch = families.prompts()
    before = families.generate(model, batch)
    with _attach(model, strategy) as handle:
        attached = families.generate(model, batch)
    assert torch.equal(attached.sequences, before.sequences)
    assert torch.equal(torch.stack(attached.logits), torch.stack(before.logits))
    assert handle.report().total["decode"].steps == len(before.logits) - 1


def test_bfloat16(family):
    model = families.build(family).to(torch.bfloat16)
    batch, tokens = families.prompts(), families.new_tokens()
    before = families.stepwise(model, batch, tokens)
    with lynx.attach(model, "exact"):
        attached = families.stepwise(model, batch, tokens)
    assert torch.equal(attached.prefill, before.prefill)
    assert torch.equal(attached.decode, before.decode)
    with lynx.attach(model, "batch-union", top=1) as handle, families.counted(model) as counter:
        pruned = families.stepwise(model, batch, tokens)
    assert torch.isfinite(pruned.decode).all()
    assert {weights.dtype for _, weights in counter.calls} <= {torch.bfloat16, torch.float32}
    decode = handle.report().total["decode"]
    assert decode.active_after < decode.active_before
    assert decode.unsound_rows == 0


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"cache_implementation": "static"},
    ],
    ids=["beams", "beams-returned", "static-cache"],
)
def test_ways_to_generate(model, options):
    batch = families.prompts()
    settings = {"output_logits": False, "return_dict_in_generate": False, **options}
    before = families.generate(model, batch, **settings)
    with lynx.attach(model, "exact") as handle:
        attached = families.generate(model, batch, **settings)
    assert torch.equal(attached, before)
    seen = handle.report().total
    assert seen["decode"].steps > 0
    assert seen["prefill"].steps > 0


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_sampling_uses_no_randomness_of_ours(model):
    batch = families.prompts()
    settings = {"do_sample": True, "output_logits": False, "return_dict_in_generate": False}
    torch.manual_seed(5)
    before = families.generate(model, batch, **settings)
    torch.manual_seed(5)
    with lynx.attach(model, "exact"):
        assert torch.equal(families.generate(model, batch, **settings), before)


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_from_embeddings(model):
    batch = families.prompts()
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
    }
    before = families.generate(model, embedded)
    with lynx.attach(model, "exact") as handle:
        attached = families.generate(model, embedded)
    assert torch.equal(attached.sequences, before.sequences)
    assert handle.report().total["decode"].steps == len(before.logits) - 1


@pytest.mark.parametrize("family", ["qwen3_moe", "minimax"])
def test_backbone_on_its_own(family):
    backbone = families.build(family).model
    batch = families.prompts()
    with torch.no_grad():
        before = backbone(**batch).last_hidden_state
        with lynx.attach(backbone, "exact") as handle:
            attached = backbone(**batch).last_hidden_state
    assert torch.equal(attached, before)
    assert handle.report().total["prefill"].steps == 1
