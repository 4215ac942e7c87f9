"""What a model records of its routers is what they decided, whatever Lynx made of it."""

import families
import pytest
import torch

import lynx

PRUNING = {"name": "batch-union", "top": 1}
EVERYWHERE = {"name": "phase-aware", "prefill": PRUNING, "decode": PRUNING}
RECORDING = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "minimax", "phimoe"]


@torch.no_grad()
def _run(model, batch):
    return model(**batch, labels=batch["input_ids"], output_router_logits=True, use_cache=True)


@pytest.mark.parametrize("family", RECORDING)
@pytest.mark.parametrize("recorder", ["before", "after"])
def test_recorded_logits_and_auxiliary_loss(family, recorder):
    """Whether the model's own recording hooks were there before Lynx's or came after them."""
    batch = families.prompts()
    plain = _run(families.build(family), batch)
    assert len(plain.router_logits) > 0
    model = families.build(family)
    if recorder == "before":
        _run(model, batch)
    for strategy in ("exact", PRUNING):  # a prompt is left alone
        with lynx.attach(model, strategy) as handle:
            found = _run(model, batch)
        assert len(found.router_logits) == len(plain.router_logits) == handle.layers
        assert all(torch.equal(*pair) for pair in zip(found.router_logits, plain.router_logits, strict=True))
        assert torch.equal(found.aux_loss, plain.aux_loss)
        assert torch.equal(found.loss, plain.loss)
    with lynx.attach(model, EVERYWHERE) as handle:
        pruned = _run(model, batch)
    assert handle.report().total["prefill"].rows_changed > 0
    # nothing was selected before the first router, and it has recorded what it said and not what was made of it
    assert torch.equal(pruned.router_logits[0], plain.router_logits[0])
    assert not torch.equal(pruned.router_logits[1], plain.router_logits[1])
    assert all(torch.equal(*pair) for pair in zip(_run(model, batch).router_logits, plain.router_logits, strict=True))
