"""Hand-written MoE models: found, read, selected for, run and left as they were."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from hand_written import BLOCKS, EXPERTS, VOCABULARY, Model, build
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import lynx
from lynx.attachment import discover
from lynx.routing import WeightRule

pytestmark = pytest.mark.parametrize("name", list(BLOCKS))

RULES = {
    "mixtral": (2, WeightRule("softmax", True)),
    "deepseek": (3, WeightRule("sigmoid", True, 2.5)),
    "nano": (2, WeightRule("softmax", True)),
    "stacked": (2, WeightRule("softmax", False)),
    "biased": (2, WeightRule("sigmoid", False)),
}
NOTES = {
    "mixtral": ("router `gate`", "8 modules in `experts`"),
    "deepseek": (
        "router `gate` decides, logits from `gate.weight`",
        "chosen by sigmoid + `gate.bias`",
        "from 2 of 4 groups",
        "8 modules in `experts`",
        "shared `shared_experts`",
    ),
    "nano": ("router `router` decides, logits from `router.linear.weight`", "8 modules in `experts`"),
    "stacked": ("router `router`", "stacked up `w_in`, down `w_out` (transposed), swiglu"),
    "biased": (
        "router `gate`",
        "chosen by sigmoid + `expert_bias`",
        "8 modules in `experts`",
        "shared `shared_expert` under `shared_expert_gate`",
    ),
}


@pytest.fixture
def model(name):
    return build(name)


@pytest.fixture
def step():
    """Eight sequences, one token each."""
    return torch.randint(VOCABULARY, (8, 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prompt():
    return torch.randint(VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def poison(block, dead):
    """Fill the weights of experts that must not be run with NaN."""
    if hasattr(block, "experts"):
        for e in dead:
            for parameter in block.experts[e].parameters():
                parameter.fill_(torch.nan)
    else:
        block.w_in[dead], block.w_out[dead] = torch.nan, torch.nan


def experts_in_double(block, rows, ids, weights):
    """Combine experts as nested sums in float64, by code that has nothing of Lynx."""
    twin = copy.deepcopy(block).double()
    output = torch.zeros(rows.shape, dtype=torch.float64)
    for t, row in enumerate(rows.double()):
        for e, weight in zip(ids[t].tolist(), weights[t].double(), strict=True):
            if hasattr(twin, "experts"):
                output[t] += weight * twin.experts[e](row)
            else:
                gate, up = (row @ twin.w_in[e]).chunk(2)
                output[t] += weight * ((F.silu(gate) * up) @ twin.w_out[e])
    if hasattr(twin, "shared_experts"):
        output += twin.shared_experts(rows.double())
    if hasattr(twin, "shared_expert"):
        output += torch.sigmoid(twin.shared_expert_gate(rows.double())) * twin.shared_expert(rows.double())
    return output


class Recorder:
    """Stands before a layer's selection and keeps what came out."""

    def __init__(self, selection):
        self.selection, self.seen = selection, []
        self.info, self.min_tokens, self.inert = selection.info, selection.min_tokens, selection.inert

    def __call__(self, routing):
        self.seen.append((routing, self.selection(routing)))
        return self.seen[-1][1]


def record(block):
    """Keep what the selection of an attached block decides."""
    stands = block.forward.__self__
    stands.selection = Recorder(stands.selection)
    return stands.selection.seen


def test_what_is_read(name, model):
    found = discover(model)
    assert found.adapter.name == "pytorch"
    assert [layer.info.name for layer in found.layers] == ["layers.0.moe", "layers.1.moe"]
    for layer in found.layers:
        assert layer.refused == ""
        assert (layer.info.num_experts, layer.info.top_k, layer.info.rule) == (EXPERTS, *RULES[name])
        assert layer.notes == NOTES[name]
        weights = layer.router.experts[0] if hasattr(layer.router, "experts") else None
        each = [layer.router.w_in[0], layer.router.w_out[0]] if weights is None else weights.parameters()
        assert layer.info.expert_bytes == sum(4 * p.numel() for p in each)


def test_without_weights_it_is_read_all_the_same(name):
    with torch.device("meta"):
        model = Model(BLOCKS[name]).eval()
    for layer in discover(model).layers:
        assert (layer.info.top_k, layer.info.rule) == RULES[name]
        assert layer.notes == (*NOTES[name], "its weights are not here: not held against its own forward")


def test_where_no_row_can_change_the_models_own_code_runs(model, step, prompt):
    alone, prefill, one = model(step), model(prompt), model(step[:1])
    with lynx.attach(model, "exact") as handle:
        assert torch.equal(model(step), alone)
        assert handle.report().total["decode"].open_rows == 8
    with lynx.attach(model, "batch-union", top=1) as handle:
        assert torch.equal(model(prompt), prefill)
        assert torch.equal(model(step[:1]), one)  # fewer rows than min_tokens
        counted = handle.report().total
        assert (counted["prefill"].exact_rows, counted["decode"].exact_rows) == (12, 1)
        with handle.paused():
            assert torch.equal(model(step), alone)
        with lynx.step("prefill"):
            assert torch.equal(model(step), alone)
        assert not torch.equal(model(step), alone)


def test_at_its_full_setting_a_strategy_changes_nothing(model, step):
    alone = model(step)
    with lynx.attach(model, "static-top", top=discover(model).layers[0].info.top_k) as handle:
        torch.testing.assert_close(model(step), alone)
        assert handle.report().total["decode"].kept_mass_mean == 1.0


def test_only_kept_experts_run(model, step):
    block = model.layers[0].moe
    with lynx.attach(model, "batch-union", top=1) as handle:
        seen = record(block)
        expected = model(step)
        ((routing, result),) = seen
        active = result.ids[result.weights != 0].unique().tolist()
        before = routing.ids.unique().numel()
        assert 1 < len(active) < before
        poison(block, [e for e in range(EXPERTS) if e not in active])
        assert torch.equal(model(step), expected)
    total = handle.report().total["decode"]
    assert total.active_after < total.active_before
    assert model(step).isnan().any()  # without Lynx, they do run


@pytest.mark.parametrize("refill", ["re-pick", "none"])
def test_execution_follows_ids_and_weights(name, model, step, refill):
    block = model.layers[0].moe
    inputs = {}
    block.register_forward_pre_hook(lambda module, args: inputs.update(hidden=args[0]))
    with lynx.attach(model, "batch-union", top=1, refill=refill):
        seen = record(block)
        outputs = []
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
        model(step)
    ((routing, result),) = seen
    assert bool(result.lost.any())
    if name != "deepseek":  # whose tokens may not re-pick from every group
        assert bool((result.weights == 0).any()) == (refill == "none")
    rows = inputs["hidden"].reshape(8, -1)
    found = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    assert found.shape == inputs["hidden"].shape
    expected = experts_in_double(block, rows, result.ids, result.weights)
    torch.testing.assert_close(found.reshape(8, -1).double(), expected, rtol=1e-5, atol=1e-5)
    if isinstance(outputs[0], tuple):
        assert torch.equal(outputs[0][1], routing.logits)


def test_weights_follow_the_models_rule(name, model, step):
    with lynx.attach(model, "batch-union", top=1):
        seen = record(model.layers[0].moe)
        model(step)
    ((routing, result),) = seen
    score = torch.sigmoid(routing.logits) if name in ("deepseek", "biased") else routing.logits.softmax(-1)
    expected = score.gather(-1, result.ids).masked_fill(result.weights == 0, 0.0)
    if RULES[name][1].renormalise:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(result.weights, expected * RULES[name][1].scale)


def test_detach_leaves_nothing(model, step, prompt):
    before = [(path, sorted(vars(module)), list(module._forward_hooks)) for path, module in model.named_modules()]
    keys, alone = list(model.state_dict()), model(step)
    handle = lynx.attach(model, "batch-union", top=1)
    model(step)
    assert list(model.state_dict()) == keys
    handle.detach()
    after = [(path, sorted(vars(module)), list(module._forward_hooks)) for path, module in model.named_modules()]
    assert after == before
    assert torch.equal(model(step), alone)
    with pytest.raises(RuntimeError, match="on purpose"), lynx.attach(model, "batch-union", top=1):
        raise RuntimeError("on purpose")
    assert torch.equal(model(step), alone)


def test_attaching_again_replaces(model, step):
    first = lynx.attach(model, "batch-union", top=1)
    second = lynx.attach(model, "exact")
    assert not first.attached
    alone = build_like(model)(step)
    assert torch.equal(model(step), alone)
    first.detach()
    assert second.attached
    inside = model.layers[0]
    with pytest.raises(lynx.AttachError, match="attached through another module"):
        lynx.attach(inside, "exact")
    second.detach()


def build_like(model):
    """The same weights without what stands in for forwards."""
    other = copy.deepcopy(model)
    for module in other.modules():
        vars(module).pop("forward", None)
    return other


def test_copies_and_pickles_are_models_of_their_own(model, step):
    alone = model(step)
    with lynx.attach(model, "batch-union", top=1):
        pruned = model(step)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(step), pruned)
            twin.layers[0].moe.load_state_dict(twin.layers[1].moe.state_dict())
            assert not torch.equal(twin(step), pruned)
        assert torch.equal(model(step), pruned)
    assert torch.equal(model(step), alone)


def test_nothing_keeps_the_model_alive(name, step):
    model = build(name)
    lynx.attach(model, "batch-union", top=1)
    model(step)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_decorator(name, step):
    with torch.no_grad():
        expected = build(name)
        with lynx.attach(expected, "batch-union", top=1):
            pruned = expected(step)

    @lynx.prune("batch-union", top=1)
    def load():
        return build(name)

    @lynx.prune("batch-union", top=1)
    class Pruned(Model):
        """A class of one's own."""

    assert torch.equal(load()(step), pruned)
    with pytest.warns(lynx.LynxWarning, match="training mode"):  # as modules are when they are made
        twin = Pruned(BLOCKS[name])
    twin.load_state_dict(expected.state_dict())
    assert torch.equal(twin.eval()(step), pruned)
    lynx.detach(twin)
    assert torch.equal(twin(step), expected(step))


def test_in_training_mode_it_is_off(model, step):
    torch.manual_seed(3)
    alone = model.train()(step)
    with pytest.warns(lynx.LynxWarning, match="training mode"):
        lynx.attach(model, "batch-union", top=1)
    torch.manual_seed(3)
    assert torch.equal(model(step), alone)
    assert not torch.equal(model.eval()(step), build_like(model)(step))


def test_compiled_whole(name, step):
    model, counter = build(name, layers=1), CompileCounter()
    with lynx.attach(model, "batch-union", top=1) as handle:
        expected = model(step)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        handle.reset()
        torch.testing.assert_close(compiled(step), expected)
        torch.testing.assert_close(compiled(step.flip(0)), expected.flip(0))
        assert counter.frame_count == 1
        assert handle.report().total["decode"].steps == 2
        valid = torch.tensor([True] * 6 + [False] * 2)
        with lynx.step(valid=valid):
            torch.testing.assert_close(compiled(step), model(step))
            recompiled = counter.frame_count
        with lynx.step(valid=valid.flip(0)):
            torch.testing.assert_close(compiled(step), model(step))
        assert counter.frame_count == recompiled


def test_a_spec_that_says_what_was_found_finds_the_same(name, model):
    rule = RULES[name][1]
    spec = lynx.MoESpec(
        blocks=[BLOCKS[name].__name__],
        top_k=RULES[name][0],
        score=rule.score,
        renormalise=rule.renormalise,
        scale=rule.scale,
        router="router" if name in ("nano", "stacked") else "gate",
        experts=None if name == "stacked" else "experts",
        up="w_in" if name == "stacked" else None,
        down="w_out" if name == "stacked" else None,
        shared={"deepseek": ["shared_experts"], "biased": ["shared_expert"]}.get(name, []),
    )
    assert [replace(layer, router=None) for layer in discover(model, spec).layers] == [
        replace(layer, router=None) for layer in discover(model).layers
    ]
    with lynx.attach(model, "exact", layers=spec) as handle:
        assert handle.layers == 2
        assert lynx.load_config(handle.config.dump()) == handle.config
