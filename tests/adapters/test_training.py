"""Training an attached model: selection is off, gradients are those of the model alone."""

import families
import pytest
import torch

import lynx

PRUNING = {"name": "batch-union", "top": 1}
EVERYWHERE = {"name": "phase-aware", "prefill": PRUNING, "decode": PRUNING}
SOME = ["mixtral", "gpt_oss", "deepseek_v3", "minimax"]


def _train(model):
    """One backward pass; the loss and all gradients."""
    model.zero_grad(set_to_none=True)
    batch = families.prompts()
    loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_are_the_models_own(family, checkpointing):
    model = families.build(family).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    before, own = _train(model)
    with pytest.warns(lynx.LynxWarning, match="training mode"):
        handle = lynx.attach(model, EVERYWHERE)
    with handle:
        loss, gradients = _train(model)
    assert torch.equal(loss, before)
    assert gradients.keys() == own.keys()
    assert any("experts" in name for name in own)
    assert all(torch.equal(gradients[name], own[name]) for name in own)
    assert handle.report().total["prefill"].steps == 0
    after, gradients = _train(model)
    assert torch.equal(after, before)
    assert all(torch.equal(gradients[name], own[name]) for name in own)


@pytest.mark.parametrize("family", SOME)
def test_gradients_through_lynx_experts(family):
    """Run by Lynx's implementation, experts are trained by the same gradients but for rounding."""
    model = families.build(family).train()
    model.gradient_checkpointing_enable()
    _, own = _train(model)
    with pytest.warns(lynx.LynxWarning, match="training mode"):
        handle = lynx.attach(model, EVERYWHERE, experts="lynx")
    with handle:
        _, gradients = _train(model)
    assert gradients.keys() == own.keys()
    for name in own:
        torch.testing.assert_close(gradients[name], own[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral"])
def test_evaluation_between_training_steps(family):
    """Selection comes with eval() and goes with train(); a step in between changes no gradient."""
    model = families.build(family).train()
    _, own = _train(model)
    with pytest.warns(lynx.LynxWarning, match="training mode"):
        handle = lynx.attach(model, PRUNING)
    with handle:
        model.eval()
        families.generate(model, families.prompts())
        assert handle.report().total["decode"].rows_changed > 0
        model.train()
        _, gradients = _train(model)
    assert all(torch.equal(gradients[name], own[name]) for name in own)
