"""Attach, detach and everything that can go wrong in between."""

import copy
import gc
import logging
import warnings
import weakref
from typing import Literal

import families
import pytest
import torch
from torch import nn

import lynx
import lynx.attachment
from lynx.adapters.transformers import experts as experts_room
from lynx.adapters.transformers.hooks import RouterHook

PRUNING = {"name": "batch-union", "top": 1}


def _decode(model):
    return families.stepwise(model, families.prompts(), families.new_tokens())


def _equal(first, second):
    return torch.equal(first.prefill, second.prefill) and torch.equal(first.decode, second.decode)


@pytest.mark.smoke
@pytest.mark.parametrize("experts", ["model", "lynx"])
def test_detach_restores(model, experts):
    """Outputs bit for bit, hooks, attributes, state_dict keys and the experts implementation (see the fixture)."""
    before, traces = _decode(model), families.footprint(model)
    handle = lynx.attach(model, PRUNING, experts=experts)
    assert list(model.state_dict()) == traces["state"]
    assert not torch.equal(_decode(model).decode, before.decode)
    handle.detach()
    assert families.footprint(model) == traces
    assert _equal(_decode(model), before)
    assert handle.report().total["decode"].steps == 3  # the report outlives it
    handle.detach()  # a second time does nothing

    lynx.attach(model, PRUNING, experts=experts)
    lynx.detach(model)
    assert families.footprint(model) == traces
    with pytest.raises(lynx.AttachError, match="nothing is attached"):
        lynx.detach(model)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_detach_after_an_exception(model):
    before, traces = _decode(model), families.footprint(model)

    def fail(*_):
        raise ZeroDivisionError

    handle = lynx.attach(model, PRUNING, experts="lynx")
    context = handle.installation._context
    # in the middle of a forward: what is known of the step must not stay behind
    broken = model.model.layers[-1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        _decode(model)
    assert context.step is None
    assert context.tokens is None
    with pytest.raises(ZeroDivisionError), handle:
        _decode(model)
    broken.remove()
    assert not handle.attached
    assert families.footprint(model) == traces
    assert _equal(_decode(model), before)


@pytest.mark.parametrize("family", ["qwen3_moe"])
@pytest.mark.parametrize("where", ["router", "experts", "backbone"])
def test_attach_fails_half_way(model, monkeypatch, where):
    before, traces = _decode(model), families.footprint(model)
    if where == "experts":
        original = copy.copy

        def copy_once(value, done=[]):  # noqa: B006
            if done:
                raise ZeroDivisionError
            done.append(value)
            return original(value)

        monkeypatch.setattr(experts_room.copy, "copy", copy_once)
    else:
        module = families.routers(model)[1] if where == "router" else model.model

        def fail(*_, **__):
            raise ZeroDivisionError

        # not an attribute of the module: the footprint would show it
        method = type(module).register_forward_hook

        def register(self, *args, **kwargs):
            return fail() if self is module else method(self, *args, **kwargs)

        monkeypatch.setattr(type(module), "register_forward_hook", register)
    with pytest.raises(ZeroDivisionError):
        lynx.attach(model, PRUNING, experts="lynx")
    monkeypatch.undo()
    assert families.footprint(model) == traces
    assert _equal(_decode(model), before)


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_attaching_twice_replaces(model):
    before, traces = _decode(model), families.footprint(model)
    first = lynx.attach(model, PRUNING, experts="lynx")
    pruned = _decode(model)
    second = lynx.attach(model, "exact")
    assert (first.attached, second.attached) == (False, True)
    assert _equal(_decode(model), before)
    assert first.report().total["decode"].steps == 3
    first.detach()  # to nothing
    assert second.attached
    assert second.report().total["decode"].steps == 3
    third = lynx.attach(model, PRUNING)
    assert torch.allclose(_decode(model).decode, pruned.decode, atol=1e-5)
    with pytest.raises(lynx.AttachError, match="detached or replaced"), first.paused():
        pass
    third.detach()
    assert families.footprint(model) == traces


@pytest.mark.parametrize("family", ["mixtral"])
def test_a_refused_attach_leaves_the_first_in_place(model, monkeypatch):
    monkeypatch.setattr(model.model.layers[0].mlp.experts, "_is_expert_parallel", True, raising=False)
    handle = lynx.attach(model, PRUNING)
    before = _decode(model)
    for wrong in ({"experts": "lynx"}, {"layers": {"include": ["nowhere"]}}, {"top": 99}):
        with pytest.raises(lynx.ConfigError):
            lynx.attach(model, "batch-union", **wrong)
    assert handle.attached
    assert _equal(_decode(model), before)
    handle.detach()
    monkeypatch.undo()


@pytest.mark.parametrize("family", ["mixtral"])
def test_through_a_submodule(model):
    for outer, inner in [(model, model.model), (model.model, model)]:
        handle = lynx.attach(outer, PRUNING)
        before = _decode(model)
        with pytest.raises(lynx.AttachError, match=r"mlp\.gate' is attached through another module"):
            lynx.attach(inner, "exact")
        assert handle.attached
        assert _equal(_decode(model), before)
        handle.detach()
    # one layer each is no conflict
    with (
        lynx.attach(model, PRUNING, layers={"include": [0]}),
        lynx.attach(model.model, "exact", layers={"include": [1]}),
    ):
        _decode(model)


def test_training_mode():
    model = families.build("qwen3_moe").train()
    with pytest.warns(lynx.LynxWarning, match="training mode"):
        handle = lynx.attach(model, PRUNING)
    batch = families.prompts()
    model(**batch).logits.sum().backward()
    _decode(model)
    assert handle.report().total["prefill"].steps == handle.report().total["decode"].steps == 0
    model.eval()
    _decode(model)
    assert handle.report().total["decode"].rows_changed > 0
    # one layer back in training is left alone
    handle.reset()
    families.routers(model)[0].train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lynx.LynxWarning)
        _decode(model)
    first, second = handle.report().layers
    assert (first.phases["decode"].steps, second.phases["decode"].steps) == (0, 3)


@pytest.mark.parametrize("family", ["deepseek_v3"])
@pytest.mark.parametrize(
    ("layers", "taken"),
    [
        ("all", [0, 1]),
        ({"include": [1]}, [1]),
        ({"include": ["model.layers.1.mlp.gate"]}, [0]),
        ({"exclude": [0]}, [1]),
        ({"exclude": ["model.layers.2.mlp.gate"]}, [0]),
        ({"include": [0, 1], "exclude": ["model.layers.1.mlp.gate"]}, [1]),
    ],
)
def test_layer_filters(model, layers, taken):
    """Indices count MoE layers: the first layer of this family is dense."""
    names = ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    before = _decode(model)
    with lynx.attach(model, PRUNING, layers=layers) as handle, families.counted(model) as counter:
        _decode(model)
    assert [layer.name for layer in handle.report().layers] == [names[index] for index in taken]
    assert handle.layers == len(taken)
    active = [sum(counter.active[2 + index :: 2]) for index in (0, 1)]
    with families.counted(model) as counter:
        assert _equal(_decode(model), before)
    plain = [sum(counter.active[2 + index :: 2]) for index in (0, 1)]
    if 0 not in taken:
        assert active[0] == plain[0]
    for index in taken:
        assert active[index] < plain[index]


@pytest.mark.parametrize("family", ["deepseek_v3"])
@pytest.mark.parametrize("key", [2, -1, "model.layers.0.mlp.gate", "gate"])
@pytest.mark.parametrize("list_name", ["include", "exclude"])
def test_unknown_layers(model, key, list_name):
    with pytest.raises(lynx.ConfigError) as caught:
        lynx.attach(model, PRUNING, layers={list_name: [key]})
    assert repr(key) in str(caught.value)
    assert "model.layers.1.mlp.gate" in str(caught.value)
    with pytest.raises(lynx.ConfigError, match="leaves no MoE layer"):
        lynx.attach(model, PRUNING, layers={"exclude": [0, 1]})


class Raises(lynx.SelectionStrategy):
    """Works in the first layer, fails in the second."""

    name: Literal["raises"] = "raises"

    def bind(self, layer):
        return self if layer.index else lynx.make_strategy(PRUNING)

    def select(self, routing):
        raise KeyError("no such expert")


class WrongShape(Raises):
    name: Literal["wrong-shape"] = "wrong-shape"

    def select(self, routing):
        return torch.ones(3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("strategy", [Raises(), WrongShape()], ids=["raises", "wrong-shape"])
def test_strategy_that_raises(model, strategy, caplog):
    """The layer falls back to the model's own routing; generation goes on; one warning, all counted."""
    batch = families.prompts()
    with lynx.attach(model, PRUNING, layers={"include": [0]}):
        only_first = families.generate(model, batch, min_new_tokens=6)
    with lynx.attach(model, strategy) as handle, caplog.at_level(logging.ERROR, "lynx"):
        with pytest.warns(lynx.LynxWarning, match=r"the strategy failed in layer 'model\.layers\.1") as caught:
            failing = families.generate(model, batch, min_new_tokens=6)
        assert len(caught) == 1
        assert [record.message.split()[0] for record in caplog.records] == ["lynx.strategy_failed"]
    assert torch.equal(torch.stack(failing.logits), torch.stack(only_first.logits))
    report = handle.report()
    assert report.failures == 5
    assert [layer.failures for layer in report.layers] == [0, 5]
    assert report.layers[0].phases["decode"].rows_changed > 0
    assert report.layers[1].phases["decode"].rows_changed == 0


def test_scores_that_are_not_finite(family, caplog):
    """One row's NaN stays that row's: it routes as the model says, the others are pruned, all is counted."""
    model = families.build(family)
    batch, tokens = families.prompts(rows=5), families.new_tokens(rows=5, columns=1)
    first_router = families.routers(model)[0]

    def poison(module, args):
        hidden = args[0].clone()
        if hidden.numel() == 5 * 32:  # in decode
            hidden.view(5, 32)[2] = torch.nan
        return (hidden, *args[1:])

    hook = first_router.register_forward_pre_hook(poison)
    with families.counted(model) as plain:
        families.stepwise(model, batch, tokens)
    with lynx.attach(model, PRUNING) as handle, families.counted(model) as counter:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            families.stepwise(model, batch, tokens)
        with pytest.warns(lynx.LynxWarning, match="not finite"), caplog.at_level(logging.ERROR, "lynx"):
            report = handle.report()
        handle.report()
    hook.remove()
    assert [record.message.split()[0] for record in caplog.records] == ["lynx.scores_not_finite"]
    (ids, weights), (own_ids, own_weights) = counter.calls[handle.layers], plain.calls[handle.layers]
    assert torch.equal(ids[2], own_ids[2])
    assert torch.equal(weights[2], own_weights[2]) or weights[2].isnan().equal(own_weights[2].isnan())
    others = [0, 1, 3, 4]
    assert torch.isfinite(weights[others]).all()
    decode = report.layers[0].phases["decode"]
    assert (decode.unsound_rows, decode.open_rows, decode.exact_rows) == (1, 4, 1)
    assert decode.rows_changed > 0
    assert not torch.equal(ids[others], own_ids[others])


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_paused_and_reset(model):
    before = _decode(model)
    with lynx.attach(model, PRUNING) as handle:
        with handle.paused():
            assert _equal(_decode(model), before)
            with handle.paused():
                pass
            assert _equal(_decode(model), before)
        assert handle.report().total["prefill"].steps == 0
        assert not _equal(_decode(model), before)
        assert handle.report().total["decode"].steps == 3
        handle.reset()
        assert handle.report().total["decode"].steps == 0


@pytest.mark.parametrize("family", ["mixtral"])
def test_in_and_out_of_inference_mode(model):
    with lynx.attach(model, PRUNING) as handle:
        with torch.inference_mode():
            first = _decode(model)
        assert torch.equal(_decode(model).decode, first.decode)
        assert handle.report().total["decode"].steps == 6
        handle.reset()
        with torch.inference_mode():
            _decode(model)
        assert handle.report().total["decode"].steps == 3


def test_an_attached_model_can_be_collected():
    for root in (lambda model: model, lambda model: model.model):
        model = root(families.build("mixtral"))
        handle = lynx.attach(model, PRUNING, experts="lynx")
        with torch.no_grad():
            model(**families.prompts())
        seen = weakref.ref(model)
        del model
        gc.collect()
        assert seen() is None
        assert handle.report().total["prefill"].steps == 1


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["mixtral"])
def test_inside_another_module(model):
    """The model may be wrapped, as PEFT and evaluation harnesses do."""
    wrapper = nn.ModuleDict({"policy": model})
    before = _decode(model)
    with lynx.attach(wrapper, PRUNING) as handle:
        assert not torch.equal(_decode(model).decode, before.decode)
    assert handle.report().layers[0].name == "policy.model.layers.0.mlp.gate"
    assert _equal(_decode(model), before)
    assert not any(isinstance(hook, RouterHook) for hook in families.routers(model)[0]._forward_hooks.values())
