"""Copies of an attached model: deep copies, pickles, saved files, and parts of it copied into it."""

import copy
import io
import pickle

import families
import pytest
import torch

import lynx
from lynx.adapters.transformers.hooks import RouterHook

PRUNING = {"name": "batch-union", "top": 1}


def _decode(model):
    return families.stepwise(model, families.prompts(), families.new_tokens())


def _equal(first, second):
    return torch.equal(first.prefill, second.prefill) and torch.equal(first.decode, second.decode)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("experts", ["model", "lynx"])
def test_copies_and_pickles(model, experts):
    """Hooks are objects: an attached model can be copied and sent to a process; the copy prunes for itself."""
    with lynx.attach(model, PRUNING, experts=experts) as handle:
        pruned = _decode(model)
        for twin in (copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))):
            assert torch.equal(_decode(twin).decode, pruned.decode)
        assert handle.report().total["decode"].steps == 3


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_saved_while_attached(model, tmp_path):
    """The same files, byte for byte, and what is loaded from them is the model without Lynx."""
    model.save_pretrained(tmp_path / "plain")
    with lynx.attach(model, PRUNING, experts="lynx"):
        model.save_pretrained(tmp_path / "attached")
    files = {path.name: path.read_bytes() for path in (tmp_path / "attached").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert b"lynx" not in files["config.json"] + files["generation_config.json"]
    loaded = type(model).from_pretrained(tmp_path / "attached").eval()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.modules())
    assert _equal(_decode(loaded), _decode(model))
    with pytest.raises(lynx.AttachError, match="nothing is attached"):
        lynx.detach(loaded)


@pytest.mark.parametrize("family", ["mixtral"])
@pytest.mark.parametrize("part", ["router", "layer"])
def test_a_part_that_is_replaced_by_its_copy(family, part):
    """The copy selects for the same handle, as nothing else would tell it of the step; detach takes it off as well."""
    model = families.build(family)
    before = _decode(model)
    with lynx.attach(model, PRUNING) as handle:
        pruned = _decode(model)
        for index, layer in enumerate(model.model.layers):
            if part == "router":
                layer.mlp.gate = copy.deepcopy(layer.mlp.gate)
            else:
                model.model.layers[index] = copy.deepcopy(layer)
        handle.reset()
        assert torch.equal(_decode(model).decode, pruned.decode)
        assert handle.report().total["decode"].steps == 3
        whole = copy.deepcopy(model)  # a model's copy is on its own again
        assert torch.equal(_decode(whole).decode, pruned.decode)
        assert handle.report().total["decode"].steps == 3
    for router in families.routers(model):
        assert not any(isinstance(hook, RouterHook) for hook in router._forward_hooks.values())
        assert not router._forward_hooks_with_kwargs
    assert _equal(_decode(model), before)
