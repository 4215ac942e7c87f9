"""Other ways of writing an MoE block that are read too, and ways that are refused, each with its reason."""

import pytest
import torch
import torch.nn.functional as F
from hand_written import EXPERTS, DeepSeekGate, MixtralMoe, Model, SwiGLU
from torch import nn

import lynx
from lynx.attachment import discover
from lynx.routing import WeightRule

DIM = 32


class Loop(nn.Module):
    """A base for variants: experts, a linear router, and a loop over what `decide` gives."""

    def __init__(self, dim=DIM, k=2):
        super().__init__()
        self.k = k
        self.router = nn.Linear(dim, EXPERTS, bias=True)
        self.experts = nn.ModuleList([SwiGLU(dim, dim) for _ in range(EXPERTS)])

    def decide(self, logits):
        top, ids = logits.softmax(-1).topk(self.k, dim=-1)
        return top / top.sum(-1, keepdim=True), ids

    def mixed(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = self.decide(self.router(flat))
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += weights[token, slot, None] * expert(flat[token])
        return out.view_as(x)

    def forward(self, x):
        return self.mixed(x)


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


READ = {
    Switch: (1, WeightRule("softmax", False), ""),
    SqrtSoftplus: (2, WeightRule("sqrt_softplus", True, 1.5), ""),
    Residual: (2, WeightRule("softmax", True), "adds its input"),
    ScaledByBlock: (2, WeightRule("sigmoid", True, 2.0), "shared `shared.0`, `shared.1`"),
    GroupedByBest: (2, WeightRule("softmax", False), "from 1 of 4 groups"),
    Bmm: (2, WeightRule("softmax", True), "stacked gate `w1`, up `w3`, down `w2`, gelu"),
    Square: (2, WeightRule("softmax", True), "stacked up `bank.up`, down `bank.down` (transposed), relu2"),
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


class Capacity(Loop):
    """Each expert takes three tokens and drops the others."""

    def decide(self, logits):
        top, ids = super().decide(logits)
        place = F.one_hot(ids, EXPERTS).flatten(0, 1).cumsum(0).view(*ids.shape, EXPERTS)
        return top * (place.gather(-1, ids.unsqueeze(-1)).squeeze(-1) <= 3), ids


class Noisy(Loop):
    def decide(self, logits):
        return super().decide(logits + torch.randn_like(logits))


class Learned(Loop):
    """Weights scaled by a parameter."""

    def __init__(self, dim=DIM):
        super().__init__(dim)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def decide(self, logits):
        top, ids = super().decide(logits)
        return top * self.scale, ids


class Soft(Loop):
    def __init__(self, dim=DIM):
        super().__init__(dim, EXPERTS)


class NormInside(Loop):
    def __init__(self, dim=DIM):
        super().__init__(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return x + self.mixed(self.norm(x))


class NormAfter(Loop):
    def forward(self, x):
        return F.normalize(self.mixed(x), dim=-1)


class Squared(Loop):
    """A weight rule that nobody knows, in a block whose router only gives logits."""

    def decide(self, logits):
        top, ids = logits.topk(self.k, dim=-1)
        return top.square(), ids


class InputScaled(Loop):
    """The weight goes onto the experts' input."""

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = self.decide(self.router(flat))
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += expert(flat[token] * weights[token, slot, None])
        return out.view_as(x)


class TwoInputs(Loop):
    def forward(self, x, mask):
        return self.mixed(x) * mask


class Loss(Loop):
    """Returns a number that depends on the batch."""

    def forward(self, x):
        return self.mixed(x), self.router(x).logsumexp(-1).mean()


class OtherShared(Loop):
    def __init__(self, dim=DIM):
        super().__init__(dim)
        self.shared = SwiGLU(dim, dim)

    def forward(self, x):
        return self.mixed(x) + 0.5 * self.shared(x)


class NeedsThree(nn.Module):
    """An expert that normalises over the tokens it gets: it cannot be told from others by a stand-in."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear(x) * x.shape[0] if x.ndim == 2 else self.linear(x)


class ThreeDimensional(Loop):
    """Calls every expert with all tokens, as (B, q, H)."""

    def __init__(self, dim=DIM):
        super().__init__(dim)
        self.experts = nn.ModuleList([NeedsThree(dim) for _ in range(EXPERTS)])

    def forward(self, x):
        wide = x if x.ndim == 3 else x.unsqueeze(0)
        weights, ids = self.decide(self.router(wide))
        dense = torch.zeros(*wide.shape[:-1], EXPERTS).scatter(-1, ids, weights)
        return sum(dense[..., e : e + 1] * expert(wide) for e, expert in enumerate(self.experts)).view_as(x)


REFUSED = {
    Capacity: "its tokens use from 0 to 2 experts each",
    Noisy: "its output is random, also in eval mode",
    Learned: "scaled by something that it has learned",
    Soft: "every token uses all 8 experts",
    NormInside: "its router sees something else than the hidden states",
    NormAfter: "",
    Squared: "is not known",
    InputScaled: "is not known",
    TwoInputs: "cannot be called with hidden states alone",
    Loss: "item 1 of what it returns is neither its router logits nor a constant",
    OtherShared: "neither shared experts nor those under a sigmoid gate",
    ThreeDimensional: "its output differs in 8 of 8 rows",
}


@pytest.mark.parametrize("block", REFUSED, ids=lambda block: block.__name__)
def test_it_is_refused(block):
    torch.manual_seed(0)
    model = nn.Sequential(block()).eval()
    before = [(name, sorted(vars(module)), list(module._forward_hooks)) for name, module in model.named_modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lynx.UnsupportedModelError) as told:
        lynx.attach(model, "exact")
    assert f"layer '0' cannot be taken: {block.__name__}: " in str(told.value)
    assert REFUSED[block] in str(told.value)
    after = [(name, sorted(vars(module)), list(module._forward_hooks)) for name, module in model.named_modules()]
    assert after == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"score": "sigmoid"}, "the spec says score='sigmoid', but the block does score='softmax'"),
        ({"renormalise": False}, "the spec says renormalise=False, but the block does renormalise=True"),
        ({"top_k": 3}, "the spec says top_k=3, but the block does top_k=2"),
        ({"scale": 2.5}, "the spec says scale=2.5, but the block does scale=1.0"),
        ({"groups": 2}, "is not known"),
        ({"shared": ["experts"]}, "'Stub' object is not iterable"),
        ({"shared_gate": "gate"}, "the spec says shared_gate='gate', but that is not what it does"),
    ],
)
def test_a_spec_that_says_what_is_not_so(fields, reason):
    model = Model(MixtralMoe, layers=1).eval()
    with pytest.raises(lynx.UnsupportedModelError) as told:
        lynx.attach(model, "exact", layers=lynx.MoESpec(**fields))
    assert reason in str(told.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"router": "gat"}, "MixtralMoe has no 'gat'. Did you mean 'gate'? It has: experts, gate."),
        ({"experts": "gate"}, "`experts: gate` is no ModuleList of MixtralMoe"),
        ({"up": "gate.weight", "down": "gate.weight"}, "'gate.weight' is no stacked weight"),
        ({"blocks": "MixtralMeo"}, "no module of Model is called 'MixtralMeo'. Did you mean 'MixtralMoe'?"),
        ({"up": "w"}, "stacked experts need both `up` and `down`"),
        ({"up": "w", "down": "v", "experts": "e"}, "give one of them"),
        ({"bias": "expert_bias"}, "MixtralMoe has no 'expert_bias'"),
        ({"shared": "shared_expert"}, "MixtralMoe has no 'shared_expert'. Did you mean"),
        ({"activation": "swigul"}, "no activation 'swigul'. Did you mean 'swiglu'?"),
        ({"rooter": "gate"}, "no option 'rooter'. Did you mean 'router'?"),
    ],
)
def test_a_spec_that_names_what_is_not_there(fields, reason):
    model = Model(MixtralMoe, layers=1).eval()
    with pytest.raises(lynx.ConfigError) as told:
        lynx.attach(model, "exact", layers={"blocks": "MixtralMoe", **fields})
    assert reason in str(told.value)
