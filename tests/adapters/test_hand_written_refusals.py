"""Blocks that are refused, each with its reason, and specs that say what is not so."""

import pytest
import torch
import torch.nn.functional as F
from hand_written import EXPERTS, HIDDEN, Loop, MixtralMoe, Model, SwiGLU
from torch import nn

import lynx

DIM = HIDDEN


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


class Inside(Loop):
    """Reads its experts' weights instead of calling them."""

    def forward(self, x):
        return self.mixed(x) + self.experts[0].w1.weight.sum() * 0.0


class Uncopied(Loop):
    """Cannot be copied."""

    def __copy__(self):
        raise TypeError("not this one")


class Brittle(Loop):
    """Fails on some values."""

    def forward(self, x):
        out = self.mixed(x)
        if out.abs().max() > 100:
            raise OverflowError("too large")
        return out


class Loss(Loop):
    """Returns a number that depends on the batch."""

    def forward(self, x):
        return self.mixed(x), self.router(x).logsumexp(-1).mean()


class Counts(Loop):
    """Returns how many tokens each expert got: the same for hidden states that are only scaled."""

    def forward(self, x):
        return self.mixed(x), torch.bincount(self.router(x).argmax(-1).flatten(), minlength=EXPERTS)


class OtherInDecode(Loop):
    """A shortcut for one token at a time, which is not the same."""

    def forward(self, x):
        return self.mixed(x) * (0.5 if x.ndim == 3 and x.shape[1] == 1 else 1.0)


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
    TwoInputs: "does not run on hidden states alone",
    Inside: "'Stub' object has no attribute 'w1'",
    Uncopied: "it failed while it was read: TypeError: not this one",
    Brittle: "it failed while it was read: OverflowError: too large",
    Loss: "item 1 of what it returns is neither its router logits nor a constant",
    Counts: "item 1 of what it returns is neither its router logits nor a constant",
    OtherInDecode: "its output differs in 8 of 8 rows",
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
