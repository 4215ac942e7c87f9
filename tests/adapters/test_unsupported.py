"""What cannot be taken is refused with what was looked for and what was found; the model is left alone."""

import families
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lynx

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def _refused(model):
    before = [(name, sorted(vars(module)), list(module._forward_hooks)) for name, module in model.named_modules()]
    with pytest.raises(lynx.UnsupportedModelError) as caught:
        lynx.attach(model, "exact")
    assert isinstance(caught.value, TypeError)
    after = [(name, sorted(vars(module)), list(module._forward_hooks)) for name, module in model.named_modules()]
    assert after == before
    return str(caught.value)


def test_dense_model():
    message = _refused(LlamaForCausalLM(LlamaConfig(**SIZES)).eval())
    assert "LlamaForCausalLM has no MoE layer" in message
    assert "_can_record_outputs['router_logits']" in message
    assert "LlamaMLP" in message


def test_plain_module():
    message = _refused(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert "no adapter takes a torch.nn.modules.container.Sequential" in message
    assert "transformers" in message
    assert "Linear, ReLU" in message


def test_not_a_module():
    with pytest.raises(lynx.UnsupportedModelError, match=r"no adapter takes a builtins\.str.*not a torch module"):
        lynx.attach("mixtral", "exact")


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (
            lambda self, hidden: hidden @ self.weight.T,
            "it returns Tensor where logits, weights and ids are expected",
        ),
        (lambda self, hidden: hidden @ self.weight.T, "MixtralSparseMoeBlock around it does not give its experts ids"),
        (lambda self, hidden: (hidden @ self.weight.T, None), "(torch.float32 (64, 8), NoneType) is not logits (T, E)"),
        (lambda self, a, b, c: (a, b, c), "it could not be called with hidden states (64, 32)"),
        (lambda self, hidden: 1 / 0, "it could not be called with hidden states (64, 32): division by zero"),
    ],
    ids=["tensor", "block", "pair", "arguments", "raises"],
)
def test_router_that_is_not_understood(forward, found, monkeypatch):
    model = families.build("mixtral")
    monkeypatch.setattr(type(families.routers(model)[0]), "forward", forward)
    message = _refused(model)
    assert "'model.layers.0.mlp.gate' cannot be taken: MixtralTopKRouter: " in message
    assert found in message


def test_one_layer_is_not_understood():
    """All layers or none; leaving the layer out is the user's to say."""
    model = families.build("mixtral")
    model.model.layers[1].mlp.gate.weight = None
    message = _refused(model)
    assert "'model.layers.1.mlp.gate' cannot be taken: MixtralTopKRouter: it has no weight matrix (E, H)" in message
    with lynx.attach(model, "exact", layers={"exclude": [1]}) as handle:
        assert handle.layers == 1


def test_unknown_rules_degrade_and_say_so(monkeypatch):
    """Outputs that are understood, by rules that are not: tokens keep or lose their own experts."""

    def forward(self, hidden):
        logits = hidden @ self.weight.T
        weights, ids = (logits.softmax(-1) + 0.1 * logits.sin()).topk(self.top_k, dim=-1)
        return logits, weights.square(), ids

    model = families.build("mixtral")
    monkeypatch.setattr(type(families.routers(model)[0]), "forward", forward)
    (layer, _) = lynx.attachment.discover(model).layers
    assert not layer.info.rule.repick
    assert len(layer.notes) == 2
    batch, tokens = families.prompts(), families.new_tokens()
    before = families.stepwise(model, batch, tokens)
    with lynx.attach(model, "exact"):
        assert torch.equal(families.stepwise(model, batch, tokens).decode, before.decode)
    with families.counted(model) as plain:
        families.stepwise(model, batch, tokens[:, :1])
    with lynx.attach(model, "batch-union", top=1), families.counted(model) as counter:
        families.stepwise(model, batch, tokens[:, :1])
    (ids, weights), (own_ids, own_weights) = counter.calls[2], plain.calls[2]
    for row in range(4):
        kept = weights[row] != 0
        assert kept.any()
        assert set(ids[row][kept].tolist()) <= set(own_ids[row].tolist())
        assert set(weights[row][kept].tolist()) <= set(own_weights[row].tolist())
