"""Looking at a model changes nothing, and needs no weights."""

from types import SimpleNamespace

import families
import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import lynx
import lynx.attachment
from lynx.adapters.transformers.fingerprint import fingerprint


@pytest.mark.smoke
def test_meta_model(family):
    """`lynx inspect` looks at models that were built without memory."""
    real_model = families.shared(family)
    with torch.device("meta"):
        empty = families.FAMILIES[family].model(real_model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    found = lynx.attachment.discover(empty)
    real = lynx.attachment.discover(real_model)
    assert [layer.info for layer in found.layers] == [layer.info for layer in real.layers]
    assert len(found.layers) == len(families.routers(empty)) > 0
    assert found.experts == "the model's own, or Lynx's"
    layer = found.layers[0]
    experts = next(module for name, module in empty.named_modules() if name.endswith(".experts"))
    size = sum(tensor.numel() * tensor.element_size() for tensor in experts.parameters())
    assert layer.info.expert_bytes == size // layer.info.num_experts
    assert not layer.refused


@pytest.mark.smoke
def test_changes_nothing(family):
    model = families.build(family).train()
    router = families.routers(model)[0]
    calls = []
    router.register_forward_pre_hook(lambda *_: calls.append("before"))
    router.register_forward_hook(lambda *_: calls.append("after"))
    before = families.footprint(model)
    values = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    random = torch.random.get_rng_state()
    lynx.attachment.discover(model)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert families.footprint(model) == before
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == values[name][0]
        assert torch.equal(tensor, values[name][1])
    assert calls == []


def test_does_not_depend_on_surroundings():
    router = families.routers(families.shared("deepseek_v3"))[0]
    expected = fingerprint(router)
    with torch.device("meta"):
        assert fingerprint(router) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert fingerprint(router) == expected
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert fingerprint(router) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_half_precision_and_one_sided_weights():
    """Rules are those of the code, not of the weights: neither type nor degenerate values hide them."""
    model = families.build("deepseek_v3").to(torch.bfloat16)
    router = families.routers(model)[0]
    expected = fingerprint(families.routers(families.shared("deepseek_v3"))[0])
    assert fingerprint(router) == expected
    nn.init.zeros_(router.weight)
    router.e_score_correction_bias.fill_(100.0)
    assert fingerprint(router) == expected


class OddRouter(nn.Module):
    """Says ids first, takes a bias as argument, and wants its hidden states as (B, q, H)."""

    def __init__(self, experts=6, hidden=16):
        super().__init__()
        self.inner = nn.Linear(hidden, experts, bias=False)

    def forward(self, hidden, bias):
        batch, columns, size = hidden.shape
        logits = self.inner(hidden.view(batch * columns, size))
        scores = logits.sigmoid()
        ids = (scores + bias).topk(2, dim=-1).indices
        weights = scores.gather(-1, ids)
        return ids, weights / weights.sum(-1, keepdim=True) * 3.0, logits, {"extra": 1}


def test_odd_contracts():
    found = fingerprint(OddRouter())
    assert (found.output.ids, found.output.weights, found.output.logits) == (0, 1, 2)
    assert (found.weights.score, found.weights.renormalise, found.weights.scale) == ("sigmoid", True, 3.0)
    assert (found.choice.score, found.choice.bias) == ("sigmoid", "argument")
    assert (found.num_experts, found.top_k) == (6, 2)


def test_hooks_inside_a_router_are_not_called():
    router, calls = OddRouter(), []
    router.inner.register_forward_pre_hook(lambda *_: calls.append("before"))
    router.inner.register_forward_hook(lambda *_: calls.append("after"))
    fingerprint(router)
    assert calls == []
    router(torch.zeros(1, 2, 16), torch.zeros(6))
    assert calls == ["before", "after"]


class ScaledRouter(nn.Module):
    """Multiplies its weights by a factor that it has learned, or by one that is written down."""

    def __init__(self, factor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 16))
        self.factor = nn.Parameter(torch.ones(())) if factor is None else factor

    def forward(self, hidden):
        logits = hidden @ self.weight.T
        weights, ids = logits.softmax(-1).topk(2, dim=-1)
        return logits, weights * self.factor, ids


@pytest.mark.parametrize("factor", [1 / 3, 2.5, 2**0.5, 1e-3])
def test_factors_are_measured(factor):
    rule = fingerprint(ScaledRouter(factor)).weights
    assert (rule.score, rule.renormalise, rule.repick) == ("softmax", False, True)
    assert rule.scale == pytest.approx(factor, rel=1e-6)


def test_learned_factors_are_not_known():
    found = fingerprint(ScaledRouter(None))
    assert not found.weights.repick
    assert found.notes


class OddBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = OddRouter()
        self.bias = nn.Buffer(torch.linspace(-0.3, 0.3, 6))
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, hidden, keyword=False):
        ids, weights, _, _ = self.gate(hidden, bias=self.bias) if keyword else self.gate(hidden, self.bias)
        flat = hidden.flatten(0, 1)
        dense = torch.zeros(len(flat), 6).scatter_add(-1, ids, weights)
        out = sum(dense[:, e : e + 1] * expert(flat) for e, expert in enumerate(self.experts))
        return hidden + out.view_as(hidden)


class OddModel(PreTrainedModel):
    """A model without `_can_record_outputs`, found by its gate beside experts."""

    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.embed = nn.Embedding(20, 16)
        self.block = OddBlock()

    def forward(self, input_ids, past_key_values=None, attention_mask=None, keyword=False):
        return self.block(self.embed(input_ids), keyword)


@pytest.mark.parametrize("keyword", [False, True])
def test_router_beside_experts(keyword):
    torch.manual_seed(0)
    model = OddModel().eval()
    filled = SimpleNamespace(get_seq_length=lambda: 5)
    ids = torch.arange(6).unsqueeze(1)
    with torch.no_grad():
        before = model(ids, filled, keyword=keyword)
        with lynx.attach(model, "exact"):
            assert torch.equal(model(ids, filled, keyword=keyword), before)
        with lynx.attach(model, "batch-union", top=1) as handle:
            pruned = model(ids, filled, keyword=keyword)
    total = handle.report().total["decode"]
    assert total.active_after < total.active_before
    assert not torch.equal(pruned, before)
    assert lynx.attachment.discover(model).experts.startswith("the model's own (ModuleList does not go through")
