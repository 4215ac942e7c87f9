"""Other ways of writing an MoE block that are read too."""

import pytest
import torch
import torch.nn.functional as F
from hand_written import EXPERTS, HIDDEN, DeepSeekGate, Loop, SwiGLU
from torch import nn

import lynx
from lynx.attachment import discover
from lynx.routing import WeightRule

DIM = HIDDEN


class Switch(Loop):
    """One expert for each token, weighed by its probability."""

    def decide(self, logits):
        top, ids = logits.softmax(-1).max(-1, keepdim=True)
        return top, ids


class SqrtSoftplus(Loop):
    def decide(self, logits):
        scores = F.softplus(logits).sqrt()
        top, ids = scores.topk(self.k, dim=-1)
        return top / top.sum(-1, keepdim=True) * 1.5, ids


class Residual(Loop):
    """Adds its input, and returns a loss that is 0 in eval mode."""

    def forward(self, x):
        return x + self.mixed(x), torch.zeros(())


class ScaledByBlock(Loop):
    """Its gate decides; the block scales, and has two shared experts in a list."""

    def __init__(self, dim=DIM):
        super().__init__(dim)
        self.router = DeepSeekGate(dim, EXPERTS, 2, 2, 1, 1.0)
        self.shared = nn.ModuleList([SwiGLU(dim, 16), SwiGLU(dim, 8)])

    def decide(self, decided):
        return 2.0 * decided[0], decided[1]

    def forward(self, x):
        return self.mixed(x) + sum(expert(x) for expert in self.shared)


class GroupedByBest(Loop):
    """Groups ranked by their best expert; a matrix of the block's own for a router, stored the other way round."""

    kept = 1

    def __init__(self, dim=DIM):
        super().__init__(dim)
        del self.router
        self.w_gate = nn.Parameter(torch.randn(dim, EXPERTS) * dim**-0.5)

    def router(self, x):
        return x @ self.w_gate

    def decide(self, logits):
        scores = logits.softmax(-1)
        best = scores.view(-1, 4, EXPERTS // 4).amax(-1).topk(self.kept, dim=-1).indices
        mask = torch.zeros(len(scores), 4).scatter(1, best, 1.0).repeat_interleave(EXPERTS // 4, 1)
        top, ids = scores.masked_fill(mask == 0, 0.0).topk(self.k, dim=-1)
        return top, ids


class Bmm(nn.Module):
    """Three stacked tensors, output first, gathered for each slot."""

    def __init__(self, dim=DIM, inner=24, k=2):
        super().__init__()
        self.k = k
        self.gate = nn.Linear(dim, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, inner, dim) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, dim, inner) * inner**-0.5)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, inner, dim) * dim**-0.5)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        up = torch.einsum("ti,tkoi->tko", x, self.w3[ids])
        gate = F.gelu(torch.einsum("ti,tkoi->tko", x, self.w1[ids]))
        return (torch.einsum("tko,tkio->tki", gate * up, self.w2[ids]) * weights.unsqueeze(-1)).sum(1)


class Square(nn.Module):
    """Two stacked tensors without a gate, H = I, in a module of their own; squared ReLU."""

    def __init__(self, dim=DIM):
        super().__init__()
        self.gate = nn.Linear(dim, EXPERTS)
        self.bank = nn.Module()
        self.bank.down = nn.Parameter(torch.randn(EXPERTS, dim, dim) * dim**-0.5)
        self.bank.up = nn.Parameter(torch.randn(EXPERTS, dim, dim) * dim**-0.5)

    def forward(self, x):
        top, ids = self.gate(x).topk(2, dim=-1)
        combine = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, ids, top.softmax(-1))
        inner = F.relu(torch.einsum("...h,ehi->...ei", x, self.bank.up)) ** 2
        return torch.einsum("...ei,eih,...e->...h", inner, self.bank.down, combine)


class UpFirst(nn.Module):
    """Up and gate the other way round in one tensor."""

    def __init__(self, dim=DIM, inner=24):
        super().__init__()
        self.gate = nn.Linear(dim, EXPERTS, bias=False)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, 2 * inner, dim) * dim**-0.5)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, dim, inner) * inner**-0.5)

    def forward(self, x):
        top, ids = self.gate(x).sigmoid().topk(2, dim=-1)
        combine = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, ids, top)
        up, gate = torch.einsum("...h,eih->...ei", x, self.w_in).chunk(2, -1)
        return torch.einsum("...ei,ehi,...e->...h", up * torch.tanh(gate), self.w_out, combine)


class Grouped(nn.Module):
    """Grouped products over rows sorted by expert, which want weights in memory of their own."""

    def __init__(self, dim=DIM, inner=24):
        super().__init__()
        self.gate = nn.Linear(dim, EXPERTS, bias=False)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, dim, 2 * inner) * dim**-0.5)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, inner, dim) * inner**-0.5)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.gate(rows).softmax(-1).topk(2, dim=-1)
        order = ids.flatten().argsort(stable=True)
        ends = torch.bincount(ids.flatten(), minlength=EXPERTS).cumsum(0).int()
        gate, up = F.grouped_mm(rows[order // 2], self.w_in, offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, self.w_out, offs=ends) * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(rows).index_add(0, order // 2, out).view_as(x)


READ = {
    Switch: (1, WeightRule("softmax", False), ""),
    SqrtSoftplus: (2, WeightRule("sqrt_softplus", True, 1.5), ""),
    Residual: (2, WeightRule("softmax", True), "adds its input"),
    ScaledByBlock: (2, WeightRule("sigmoid", True, 2.0), "shared `shared.0`, `shared.1`"),
    GroupedByBest: (2, WeightRule("softmax", False), "from 1 of 4 groups"),
    Bmm: (2, WeightRule("softmax", True), "stacked gate `w1`, up `w3`, down `w2`, gelu"),
    Square: (2, WeightRule("softmax", True), "stacked up `bank.up`, down `bank.down` (transposed), relu2"),
    Grouped: (2, WeightRule("softmax", False), "stacked up `w_in`, down `w_out` (transposed), swiglu"),
    UpFirst: (2, WeightRule("sigmoid", False), "stacked up `w_in`, down `w_out`, tanh_up_first"),
}


@pytest.mark.parametrize("block", READ, ids=lambda block: block.__name__)
def test_it_is_read(block):
    torch.manual_seed(0)
    model = nn.Sequential(block()).eval()
    (layer,) = discover(model).layers
    top_k, rule, note = READ[block]
    assert layer.refused == ""
    assert (layer.info.top_k, layer.info.rule) == (top_k, rule)
    assert not note or note in layer.notes
    hidden = torch.randn(6, DIM)
    with torch.no_grad(), lynx.step("decode"):
        alone = model(hidden)
        with lynx.attach(model, "static-top", top=top_k):
            torch.testing.assert_close(model(hidden), alone, rtol=1e-4, atol=1e-5)
        with lynx.attach(model, "batch-union", top=1) as handle:
            model(hidden)
            compiled = torch.compile(model, fullgraph=True, backend="eager") if block in (Bmm, Square) else model
            torch.testing.assert_close(compiled(hidden), model(hidden), rtol=1e-4, atol=1e-5)
            total = handle.report().total["decode"]
            assert total.active_after <= total.active_before


def test_a_model_of_transformers_can_be_read_too():
    """One that its own adapter takes: with a spec it is taken as any other module."""
    reference = lynx.load_reference_model()
    model, tokens = reference.model, torch.randint(100, (8, 1))
    named = {layer.info.name: layer.info for layer in discover(model).layers}
    spec = lynx.MoESpec(blocks="model.layers.*.mlp")
    with torch.no_grad():
        alone = model(tokens).logits
        with lynx.attach(model, "exact", layers=spec) as handle:
            assert handle.adapter == "pytorch"
            assert torch.equal(model(tokens).logits, alone)
        with lynx.attach(model, "batch-union", top=1, layers=spec) as handle:
            model(tokens)
            report = handle.report()
    assert report.total["decode"].active_after < report.total["decode"].active_before
    for layer in discover(model, spec).layers:
        other = named[f"{layer.info.name}.gate"]
        assert (layer.info.num_experts, layer.info.top_k, layer.info.rule, layer.info.expert_bytes) == (
            other.num_experts,
            other.top_k,
            other.rule,
            other.expert_bytes,
        )


def test_groups_that_never_show_are_taken_from_the_spec():
    """Two of four groups hold a token's two best experts in any case; what they forbid shows in re-picks alone."""
    block = GroupedByBest().eval()
    block.kept = 2
    (found,) = discover(block).layers
    assert found.reading.router.choice.groups == 1
    (said,) = discover(block, lynx.MoESpec(groups=4, kept_groups=2)).layers
    assert said.refused == ""
    assert "from 2 of 4 groups" in said.notes
    with pytest.raises(lynx.UnsupportedModelError, match="is not known"):
        lynx.attach(block, "exact", layers=lynx.MoESpec(groups=4, kept_groups=1))
