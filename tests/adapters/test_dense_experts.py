"""Llama 4: its block multiplies the input of every expert by a score, and runs all experts on all tokens."""

import copy
import io
import pickle

import pytest
import torch
import zoo
import zoo_checks
from torch._dynamo.backends.registry import lookup_backend
from transformers import StaticCache

import lynx
import lynx.attachment
from lynx.adapters.transformers.dense import DenseExperts
from lynx.demo.cache import as_argument

PRUNING = {"name": "batch-union", "top": 1}


@pytest.fixture
def model():
    """A model, which a test leaves as it found it."""
    built = zoo.build("llama4")
    traces, before = _traces(built), zoo_checks.generated(built)
    yield built
    assert _traces(built) == traces
    assert _equal(zoo_checks.generated(built), before)


def _traces(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return [(name, sorted(vars(m)), [list(getattr(m, kind)) for kind in kinds]) for name, m in model.named_modules()]


def _equal(first, second):
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def _blocks(model):
    return [layer.feed_forward for layer in model.model.layers]


class Scores:
    """Keeps the scores ``(T, E)`` that routers give, after Lynx."""

    def __init__(self, model):
        self.calls = []
        self.handles = [block.router.register_forward_hook(self) for block in _blocks(model)]

    def __call__(self, module, args, output):
        self.calls.append(output)

    def decode(self):
        for handle in self.handles:
            handle.remove()
        return self.calls[len(self.handles) :]


def test_scores_follow_the_routers_rule(model):
    """Sigmoid of the logit for each expert that a token has, 0 for the others; each token has as many as before."""
    with lynx.attach(model, PRUNING):
        scores = Scores(model)
        zoo_checks.generated(model)
    moved = 0
    for given, logits in scores.decode():
        used = given != 0
        assert (used.sum(-1) == 3).all() or int(used.any(0).sum()) < 3
        assert int(used.any(0).sum()) <= zoo_checks.ROWS
        torch.testing.assert_close(given[used], logits.sigmoid()[used])
        own = torch.zeros_like(used).scatter(-1, logits.topk(3, dim=-1).indices, True)
        moved += int((own != used).any(-1).sum())
    assert moved > 0


@pytest.mark.parametrize("experts", ["auto", "lynx"])
def test_dropped_experts_are_not_read(model, experts):
    """Poison in their weights changes nothing, while one that is kept would spoil everything."""
    with lynx.attach(model, PRUNING, experts=experts) as handle:
        assert handle.experts == "lynx"
        ids, step = zoo_checks.tokens(6), zoo_checks.tokens(1, seed=2)
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            (name,) = as_argument(None, model)
            cached = {name: out[name]}
            expected = model(input_ids=step, **copy.deepcopy(cached), use_cache=True).logits
            scores = Scores(model)
            model(input_ids=step, **copy.deepcopy(cached), use_cache=True)
            for handle in scores.handles:
                handle.remove()
            saved = [block.experts.down_proj.detach().clone() for block in _blocks(model)]
            for block, (given, _) in zip(_blocks(model), scores.calls, strict=True):
                dropped = (given == 0).all(0)
                assert dropped.any()
                block.experts.down_proj[dropped] = torch.nan
                block.experts.gate_up_proj[dropped] = torch.nan
    original = zoo.build("llama4")
    try:
        with lynx.attach(model, PRUNING, experts=experts), torch.no_grad():
            assert torch.equal(model(input_ids=step, **copy.deepcopy(cached), use_cache=True).logits, expected)
        with torch.no_grad():
            assert model(input_ids=step, **copy.deepcopy(cached), use_cache=True).logits.isnan().any()
    finally:
        model.load_state_dict(original.state_dict())
    assert all(torch.equal(block.experts.down_proj, kept) for block, kept in zip(_blocks(model), saved, strict=True))


@pytest.mark.parametrize("refill", ["re-pick", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_models_own_execution(dtype, refill):
    """The same selection, run by the model on all experts, within its own distance from float64."""
    model = zoo.build("llama4").to(dtype)
    results = {}
    for experts in ("model", "lynx"):
        with lynx.attach(model, PRUNING, refill=refill, experts=experts) as handle:
            assert handle.experts == experts
            results[experts] = torch.stack(zoo_checks.generated(model))
    with lynx.attach(model.double(), PRUNING, refill=refill, experts="model"):
        exact = torch.stack(zoo_checks.generated(model))
    own = (results["model"].double() - exact).abs().max()
    assert (results["lynx"].double() - exact).abs().max() <= max(3 * float(own), 1e-5)


def test_exact_is_the_models_own_forward(model):
    before = zoo_checks.generated(model)
    for experts in ("auto", "model", "lynx"):
        with lynx.attach(model, "exact", experts=experts) as handle:
            assert handle.experts == "model"
            assert _equal(zoo_checks.generated(model), before)
        assert handle.report().total["decode"].steps == zoo_checks.STEPS
    # prefill and what is paused run as they did
    with lynx.attach(model, PRUNING) as handle:
        pruned = zoo_checks.generated(model)
        assert torch.equal(pruned[0], before[0])
        assert not torch.equal(pruned[1], before[1])
        with handle.paused():
            assert _equal(zoo_checks.generated(model), before)
        assert _equal(zoo_checks.generated(model), pruned)
    with lynx.attach(model, {"name": "per-layer", "strategies": {0: PRUNING}, "default": "exact"}) as handle:
        placed = [isinstance(vars(block.experts).get("forward"), DenseExperts) for block in _blocks(model)]
    assert handle.experts == "lynx"
    assert placed == [True, False, False, False]


def test_copies_and_pickles(model):
    with lynx.attach(model, PRUNING):
        pruned = zoo_checks.generated(model)
        twins = copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))
        for twin in twins:
            own = vars(_blocks(twin)[0].experts)["forward"]
            assert own.module is _blocks(twin)[0].experts
            assert _equal(zoo_checks.generated(twin), pruned)


def test_a_forward_of_the_instance_is_kept(model):
    """Others put a forward of their own into the module, before or after; accelerate keeps the module's beside it."""
    calls = []
    experts = _blocks(model)[0].experts

    def own(hidden):
        calls.append(len(hidden))
        return type(experts).forward(experts, hidden)

    experts.forward = own
    with lynx.attach(model, PRUNING):
        zoo_checks.generated(model)
        assert calls == [8 * zoo_checks.ROWS * zoo_checks.PROMPT]  # prefill alone
    assert vars(experts)["forward"] is own
    del experts.forward
    handle = lynx.attach(model, PRUNING)
    placed = vars(experts)["forward"]
    experts._old_forward, experts.forward = placed, lambda hidden: experts._old_forward(hidden)
    wrapper = vars(experts)["forward"]
    handle.detach()
    assert vars(experts)["forward"] is wrapper
    hidden = torch.randn(experts.num_experts, experts.hidden_size)
    assert torch.equal(wrapper(hidden), type(experts).forward(experts, hidden))  # what it calls is there, and not ours
    del experts.forward, experts._old_forward


def test_a_forward_that_brings_weights_in(model):
    """Where accelerate has put its own forward into the module, ours stands behind it and finds the weights."""
    with lynx.attach(model, PRUNING):
        expected = zoo_checks.generated(model)
    offloaded = zoo.build("llama4")
    for block in _blocks(offloaded):
        experts = block.experts
        weights = {name: parameter.detach() for name, parameter in experts.named_parameters()}
        experts._hf_hook, experts._old_forward = object(), experts.forward
        experts.forward = BringsIn(experts, weights)
        experts.forward.put(None)
    traces, before = _traces(offloaded), zoo_checks.generated(offloaded)
    with lynx.attach(offloaded, PRUNING) as handle:
        assert handle.experts == "lynx"
        assert _equal(zoo_checks.generated(offloaded), expected)
    assert _traces(offloaded) == traces
    assert _equal(zoo_checks.generated(offloaded), before)


class BringsIn:
    """What accelerate's forward does: the module has its weights while it runs and not between."""

    def __init__(self, module, weights):
        self.module = module
        self.weights = weights

    def put(self, weights):
        for name, value in self.weights.items():
            value = value.to("meta") if weights is None else value
            self.module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))

    def __call__(self, hidden):
        self.put(self.weights)
        try:
            return self.module._old_forward(hidden)
        finally:
            self.put(None)


def test_compiled_whole_with_a_static_cache(monkeypatch):
    """No graph break in a decode step, and equal to what is not compiled."""
    monkeypatch.setenv("LYNX_KERNELS", "grouped_mm")  # on a CPU, the default reads row counts
    model, outputs = zoo.build("llama4", num_hidden_layers=1).to(torch.bfloat16), []
    for compiled in (False, True):
        cached = as_argument(StaticCache(config=model.config, max_cache_len=16), model)
        step = model.forward
        if compiled:
            step = torch.compile(model.forward, backend=lookup_backend("aot_eager"), fullgraph=True)
        with torch.no_grad(), lynx.attach(model, PRUNING) as handle:
            model(input_ids=zoo_checks.tokens(6), **cached, use_cache=True)
            outputs.append(step(input_ids=zoo_checks.tokens(1, seed=2), **cached, use_cache=True).logits)
        decode = handle.report().total["decode"]
        assert decode.active_after < decode.active_before
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.compiler.reset()


@pytest.mark.parametrize("fault", ["formula", "layout", "quantised"])
def test_experts_that_compute_something_else(model, fault, monkeypatch):
    """They are left to the model: a formula is tried out, not taken for granted."""
    block = _blocks(model)[0]
    own = block.experts.down_proj
    if fault == "formula":
        forward = type(block.experts).forward
        monkeypatch.setattr(type(block.experts), "forward", lambda self, hidden: forward(self, hidden) * 1.01)
    elif fault == "layout":
        block.experts.down_proj = torch.nn.Parameter(own.detach().flatten(0, 1))
    else:
        block.experts.down_proj = torch.nn.Parameter(own.detach().to(torch.float8_e4m3fn), requires_grad=False)
    words = {"formula": "does not compute down", "layout": "not one stacked", "quantised": "quantised"}
    try:
        with pytest.raises(lynx.ConfigError, match=words[fault]):
            lynx.attach(model, PRUNING, experts="lynx")
        with lynx.attach(model, PRUNING) as handle:
            assert handle.experts == "model"
    finally:
        block.experts.down_proj = own
        monkeypatch.undo()
