"""What hand-written layers know of their rows, what becomes of rows that must not change, and authors' own methods."""

import threading

import pytest
import torch
import torch.nn.functional as F
from hand_written import EXPERTS, HIDDEN, MixtralMoe, Model, SwiGLU, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lynx
from lynx.attachment import discover
from lynx.routing import Phase, Role, Routing, WeightRule

ROLES = st.lists(st.sampled_from([Role.PADDING, Role.EXACT, Role.OPEN]), min_size=3, max_size=9)


def mixtral(seed=0):
    torch.manual_seed(seed)
    block = MixtralMoe(HIDDEN).eval()
    nn.init.normal_(block.gate.weight, std=2.0 * HIDDEN**-0.5)
    return block


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@settings(max_examples=50)
@given(roles=ROLES, seed=st.integers(0, 1000))
def test_exact_and_padding_rows_are_untouched(roles, seed):
    torch.manual_seed(seed)
    block, hidden = mixtral(), torch.randn(len(roles), HIDDEN)
    role = torch.tensor([int(r) for r in roles])
    fixed = role != int(Role.OPEN)
    alone = block(hidden)
    with lynx.attach(block, "batch-union", top=1) as handle:
        with lynx.step("decode", valid=role != int(Role.PADDING), exact=role == int(Role.EXACT)):
            found = block(hidden)
            other = hidden.clone()
            other[role == int(Role.PADDING)] = torch.randn(HIDDEN)
            beside = block(other)
        counted = handle.report().total["decode"]
    torch.testing.assert_close(found[fixed], alone[fixed])
    torch.testing.assert_close(beside[role != int(Role.PADDING)], found[role != int(Role.PADDING)])
    if any(r != Role.PADDING for r in roles):
        few = roles.count(Role.OPEN) < 2
        assert counted.padding_rows == 2 * roles.count(Role.PADDING)
        assert counted.open_rows == (0 if few else 2 * roles.count(Role.OPEN))


@settings(max_examples=50)
@given(seed=st.integers(0, 1000), rows=st.integers(2, 9))
def test_whatever_is_kept_the_output_follows_it(seed, rows):
    torch.manual_seed(seed)
    block, hidden = mixtral(seed), torch.randn(rows, HIDDEN)
    with lynx.attach(block, "top-budget", budget=2, refill="none"):
        stands = block.forward.__self__
        with lynx.step("decode"):
            found = block(hidden)
        decided = stands.reading.route(block, hidden)
        result = stands.selection(decided)
    expected = torch.zeros_like(hidden)
    for t in range(rows):
        for e, weight in zip(result.ids[t].tolist(), result.weights[t], strict=True):
            expected[t] += weight * block.experts[e](hidden[t])
    torch.testing.assert_close(found, expected)


def test_flat_rows_without_a_step_raise_and_are_never_guessed():
    block, hidden = mixtral(), torch.randn(6, HIDDEN)
    alone = block(hidden)
    with lynx.attach(block, "batch-union", top=1):
        with pytest.raises(lynx.AttachError, match=r"sees hidden states \(6, 32\) and cannot tell prefill from decode"):
            block(hidden)
        with lynx.step("decode"):
            assert not torch.equal(block(hidden), alone)
        assert torch.equal(block(hidden), alone)  # who tells some steps has left the others exact


def test_the_shape_tells_where_nobody_does():
    block, hidden = mixtral(), torch.randn(4, 3, HIDDEN)
    alone, one = block(hidden), block(hidden[:, :1])
    with lynx.attach(block, "batch-union", top=1) as handle:
        assert torch.equal(block(hidden), alone)
        assert not torch.equal(block(hidden[:, :1]), one)
        with lynx.step(valid=torch.tensor([True, True, True, False])):
            block(hidden[:, :1])
        total = handle.report().total
        assert (total["prefill"].exact_rows, total["decode"].open_rows) == (12, 7)
    with lynx.attach(block, "batch-union", top=1, max_decode_q=3) as handle:
        block(hidden)
        assert handle.report().total["decode"].open_rows == 12


def test_a_batch_may_mix_phases():
    block, hidden = mixtral(), torch.randn(5, HIDDEN)
    alone = block(hidden)
    phase = torch.tensor([Phase.PREFILL, Phase.PREFILL, Phase.DECODE, Phase.DECODE, Phase.DECODE])
    with lynx.attach(block, "batch-union", top=1) as handle, lynx.step(phase):
        torch.testing.assert_close(block(hidden)[:2], alone[:2])
        total = handle.report().total
    assert (total["prefill"].exact_rows, total["decode"].open_rows) == (2, 3)


def test_prefill_is_selected_for_where_that_is_asked():
    block, hidden = mixtral(), torch.randn(2, 6, HIDDEN)
    alone = block(hidden)
    with lynx.attach(block, {"name": "phase-aware", "prefill": {"name": "batch-union", "top": 1}}):
        assert not torch.equal(block(hidden), alone)
        assert torch.equal(block(hidden[:, :1]), block.forward.__self__._own((hidden[:, :1],), {}))


def test_threads_have_steps_of_their_own():
    block, hidden = mixtral(), torch.randn(6, HIDDEN)
    alone = block(hidden)
    inside, done = threading.Event(), threading.Event()
    seen = {}

    def prefills():
        with torch.no_grad(), lynx.step("prefill"):
            inside.set()
            done.wait(10)
            seen["prefill"] = block(hidden)

    with lynx.attach(block, "batch-union", top=1):
        thread = threading.Thread(target=prefills)
        thread.start()
        inside.wait(10)
        with lynx.step("decode"):
            seen["decode"] = block(hidden)
        done.set()
        thread.join()
    assert torch.equal(seen["prefill"], alone)
    assert not torch.equal(seen["decode"], alone)


def test_more_arguments_than_hidden_states_raise():
    class Masked(MixtralMoe):
        def forward(self, inputs, scale=None):
            return super().forward(inputs if scale is None else inputs * scale)

    torch.manual_seed(0)
    block, hidden = Masked(HIDDEN).eval(), torch.randn(4, 1, HIDDEN)
    with lynx.attach(block, "batch-union", top=1):
        block(inputs=hidden)
        with pytest.raises(lynx.AttachError, match="is called with 2 arguments"):
            block(hidden, 2.0)


def test_an_overridden_forward_is_refused():
    block = mixtral()
    block.forward = lambda inputs: inputs
    with pytest.raises(lynx.UnsupportedModelError, match="its forward is overridden in the instance"):
        lynx.attach(block, "exact")


@pytest.mark.parametrize(
    ("name", "experts", "reason"),
    [("mixtral", "lynx", "these experts are modules"), ("stacked", "model", "these weights are stacked")],
)
def test_experts_that_cannot_run_so(name, experts, reason):
    with pytest.raises(lynx.ConfigError, match=reason):
        lynx.attach(build(name), "exact", experts=experts)


def test_who_runs_the_experts():
    with lynx.attach(build("mixtral"), "exact", experts="model") as handle:
        assert (handle.experts, handle.experts_backend) == ("model", "")
    with lynx.attach(build("stacked"), "exact", experts="lynx") as handle:
        assert (handle.experts, handle.experts_backend) == ("lynx", "loop")


def test_layers_can_be_left_out():
    model = build("mixtral", layers=3)
    for layers in (lynx.MoESpec(exclude=[1]), {"include": [0, "layers.2.moe"]}):
        with lynx.attach(model, "exact", layers=layers) as handle:
            assert [layer.name for layer in handle.report().layers] == ["layers.0.moe", "layers.2.moe"]


def test_teacher_forcing_is_refused():
    with lynx.attach(build("mixtral"), "exact") as handle, pytest.raises(lynx.AttachError, match="teacher forcing"):
        handle.teacher_forced(2)


def test_a_short_type_is_held_against_its_own_forward_too():
    for name in ("mixtral", "deepseek", "stacked"):
        model = build(name).to(torch.bfloat16)
        with lynx.attach(model, "batch-union", top=1) as handle:
            assert model(torch.zeros(4, 1, dtype=torch.long)).dtype == torch.bfloat16
            assert handle.report().failures == 0


class Authored(nn.Module):
    """A layer in two methods; nothing of it could be read."""

    top_k = 2
    rule = WeightRule("sigmoid", renormalise=False)

    def __init__(self, dim=HIDDEN, whole=False):
        super().__init__()
        self.whole = whole
        self.enter = nn.Linear(dim, dim)
        self.pick = nn.Linear(dim, EXPERTS)
        self.mlps = nn.ModuleDict({f"expert_{e}": SwiGLU(dim, dim) for e in range(EXPERTS)})
        self.called = []

    def route(self, hidden):
        logits = self.pick(self.enter(hidden))
        if not self.whole:
            return logits
        weights, ids = logits.sigmoid().topk(2, dim=-1)
        return Routing.of(logits, ids, weights, self.rule)

    def run(self, hidden, ids, weights):
        out = self.enter(hidden)
        used = F.one_hot(ids, EXPERTS).to(hidden) * weights.unsqueeze(-1)
        self.called = [e for e in range(EXPERTS) if used[..., e].any()]
        for e in self.called:
            out = out + used[..., e].sum(-1, keepdim=True) * self.mlps[f"expert_{e}"](hidden)
        return out

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.pick(self.enter(rows)).sigmoid().topk(2, dim=-1)
        return self.run(rows, ids, weights).view_as(x)


@pytest.mark.parametrize("whole", [False, True])
def test_authors_may_say_it_in_two_methods(whole):
    torch.manual_seed(0)
    model = Model(lambda dim: Authored(dim, whole)).eval()
    step = torch.randint(64, (8, 1))
    alone = model(step)
    layer = discover(model).layers[0]
    assert layer.notes == ("route() and run() of its author",)
    assert (layer.info.num_experts, layer.info.top_k, layer.info.rule) == (EXPERTS, 2, Authored.rule)
    with lynx.attach(model, "exact"):
        assert torch.equal(model(step), alone)
    before = len(model.layers[0].moe.called)
    with lynx.attach(model, "batch-union", top=1):
        assert not torch.equal(model(step), alone)
        assert len(model.layers[0].moe.called) < before
    assert torch.equal(model(step), alone)
    assert "forward" not in vars(model.layers[0].moe)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"route": lambda self, hidden: hidden.sum()}, "route() returns neither logits (T, E) nor a lynx.Routing"),
        ({"route": lambda self, hidden: self.gone}, "route() failed: AttributeError"),
        ({"top_k": None}, "the block needs an attribute top_k"),
        ({"rule": WeightRule()}, "its output differs in 8 of 8 rows"),
        ({"run": lambda self, hidden, ids, weights: hidden}, "its output differs in 8 of 8 rows"),
    ],
)
def test_methods_that_do_not_say_what_the_forward_does(body, reason):
    class Wrong(Authored):
        def forward(self, x):
            rows = x.reshape(-1, x.shape[-1])
            weights, ids = self.pick(self.enter(rows)).sigmoid().topk(2, dim=-1)
            return Authored.run(self, rows, ids, weights).view_as(x)

    for name, value in body.items():
        setattr(Wrong, name, value)
    torch.manual_seed(0)
    with pytest.raises(lynx.UnsupportedModelError) as told:
        lynx.attach(Wrong().eval(), "exact")
    assert reason in str(told.value)
