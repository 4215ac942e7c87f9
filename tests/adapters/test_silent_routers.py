"""Kernels that go past the routers are noticed in the first forward; layers that do not run are no fault."""

import logging

import families
import pytest
import torch
import zoo

import lynx

PRUNING = {"name": "batch-union", "top": 1}


class PastTheRouter:
    """What a fused kernel does: the block runs, and reads the router's weights without calling it."""

    def __init__(self, block):
        self.block = block

    def __call__(self, hidden):
        rows = hidden.flatten(0, 1)
        _, weights, ids = type(self.block.gate).forward(self.block.gate, rows)
        return self.block.experts(rows, ids, weights).view_as(hidden)


class OtherRows(PastTheRouter):
    """A kernel that shows the router more rows than there are tokens."""

    def __call__(self, hidden):
        rows = hidden.flatten(0, 1)
        _, weights, ids = (part[: len(rows)] for part in self.block.gate(torch.cat([rows, rows])))
        return self.block.experts(rows, ids, weights).view_as(hidden)


def _decode(model):
    return families.stepwise(model, families.prompts(), families.new_tokens())


def _equal(first, second):
    return torch.equal(first.prefill, second.prefill) and torch.equal(first.decode, second.decode)


def _steps(handle):
    """Decode steps that each layer has counted, by the name of its router."""
    return {layer.name: layer.phases["decode"].steps for layer in handle.report().layers}


@pytest.mark.parametrize("family", ["mixtral"])
@pytest.mark.parametrize("strategy", ["exact", PRUNING], ids=["exact", "pruning"])
def test_a_kernel_past_the_router(model, strategy, caplog):
    before = _decode(model)
    block = model.model.layers[1].mlp
    block.forward = PastTheRouter(block)
    try:
        fused = _decode(model)
        handle = lynx.attach(model, strategy)
        for _ in range(2):  # again, for those who go on as if nothing had been said
            with (
                caplog.at_level(logging.ERROR, "lynx"),
                pytest.raises(lynx.AttachError, match=r"1 of [12] routers .*layers\.1\.mlp\.gate.*use_kernels.*detach"),
            ):
                _decode(model)
        assert "lynx.routers_silent" in caplog.text
        context = handle.installation._context
        assert context.step is None
        assert context.tokens is None
        handle.detach()
        assert _equal(_decode(model), fused)
        # as the message says: without the layer it goes on
        with lynx.attach(model, strategy, layers={"exclude": [1]}) as handle:
            _decode(model)
        assert handle.report().total["decode"].steps == 3
        # and nothing is said while the hooks are inert
        with lynx.attach(model, strategy) as handle, handle.paused():
            assert _equal(_decode(model), fused)
    finally:
        del block.forward
    assert _equal(_decode(model), before)


@pytest.mark.parametrize("family", ["mixtral"])
def test_a_kernel_that_shows_other_rows(model):
    block = model.model.layers[1].mlp
    block.forward = OtherRows(block)
    try:
        with lynx.attach(model, "exact"):
            with pytest.warns(lynx.LynxWarning, match=r"1 routers .*other rows.*layers\.1\.mlp\.gate") as caught:
                _decode(model)
            assert len(caught) == 1
    finally:
        del block.forward


@pytest.mark.parametrize("family", ["mixtral"])
@pytest.mark.parametrize("first", ["whole", "short"])
def test_layers_that_are_not_run(model, first, recwarn):
    """As with an early exit: a forward may stop before a layer, at first or later."""
    backbone = model.model
    with lynx.attach(model, PRUNING) as handle:
        for part in ("whole", "short", "whole") if first == "whole" else ("short", "whole"):
            kept = backbone.layers
            if part == "short":
                backbone.layers = kept[:1]
            try:
                _decode(model)
            finally:
                backbone.layers = kept
    assert list(_steps(handle).values()) == ([9, 6] if first == "whole" else [6, 3])
    assert not recwarn.list


@pytest.mark.parametrize("family", ["mixtral"])
def test_training_mode(family, recwarn):
    """In train() the router of a frozen part may be in another mode than the model around it."""
    model = families.build(family)
    with lynx.attach(model, PRUNING):
        model.model.layers[1].mlp.gate.train()
        _decode(model)
        model.train()
        _decode(model)
    assert not [each for each in recwarn.list if issubclass(each.category, lynx.LynxWarning)]


def test_experts_of_another_modality(recwarn):
    """Text runs past the experts for images; in a prompt with images, each kind sees rows of its own alone."""
    model = zoo.build("ernie4_5_vl_moe")
    backbone = model.model.language_model
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    kinds = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]])
    with lynx.attach(model, PRUNING) as handle, torch.no_grad():
        out = backbone(input_ids=ids, moe_mm_token_type_ids=kinds, use_cache=True)
        for column in range(2):
            step = {"cache": out["cache"]} if "cache" in out else {"past_key_values": out["past_key_values"]}
            out = backbone(input_ids=ids[:, column : column + 1], use_cache=True, **step)
    steps = _steps(handle)
    assert [count for name, count in steps.items() if "text_moe" in name] == [2, 2, 2]
    assert [count for name, count in steps.items() if "vision_moe" in name] == [0, 0, 0]
    assert not [each for each in recwarn.list if issubclass(each.category, lynx.LynxWarning)]
