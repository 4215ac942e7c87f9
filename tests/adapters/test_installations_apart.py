"""What stands in a model belongs to one installation, and goes with it, whatever was put around it meanwhile."""

import copy

import families
import hand_written
import pytest
import torch

import lynx
from lynx.adapters.transformers import experts as experts_room

PRUNING = {"name": "batch-union", "top": 1}


def test_two_installations_in_one_model():
    """One through the model and one through its backbone: each takes out its own."""
    model = families.build("mixtral")
    routers = [layer.mlp.gate for layer in model.model.layers]
    outer = lynx.attach(model, PRUNING, layers={"include": [0]})
    inner = lynx.attach(model.model, PRUNING, layers={"include": [1]})
    assert [len(router._forward_hooks) for router in routers] == [1, 1]
    with pytest.raises(lynx.AttachError, match="attached through another module"):
        lynx.attach(model, PRUNING)
    outer.detach()
    assert [len(router._forward_hooks) for router in routers] == [0, 1]
    inner.detach()
    assert [len(router._forward_hooks) for router in routers] == [0, 0]


def test_a_hand_written_block_that_was_wrapped_meanwhile():
    """What somebody keeps of ours lets the block's own forward through once Lynx is off."""
    model = hand_written.build("mixtral")
    tokens = torch.arange(8).view(8, 1)
    block = next(module for module in model.modules() if isinstance(module, hand_written.MixtralMoe))
    with torch.no_grad(), lynx.step("decode"):
        before = model(tokens)
        handle = lynx.attach(model, PRUNING)
        assert not torch.equal(model(tokens), before)
        kept = block.forward
        block.forward = lambda hidden: kept(hidden)
        handle.detach()
        assert torch.equal(model(tokens), before)


def test_a_copy_says_what_it_is():
    model = families.build("mixtral")
    with lynx.attach(model, PRUNING):
        twin = copy.deepcopy(model)
    with pytest.raises(lynx.AttachError, match="copy it while it is not attached"):
        lynx.attach(twin, PRUNING)


def test_a_refusal_of_the_kernels_leaves_the_strategy_that_is_on(monkeypatch):
    model = families.build("mixtral")
    with lynx.attach(model, PRUNING) as handle:
        monkeypatch.setenv("LYNX_KERNELS", "triton")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(lynx.ConfigError, match="LYNX_KERNELS=triton"):
            lynx.attach(model, "exact")
        assert handle.attached


def test_experts_of_other_processes_are_not_run_here():
    """Whichever way they are told what to run."""
    model = families.build("mixtral")
    experts = model.model.layers[0].mlp.experts
    assert experts_room.why_not(experts) == ""
    experts._hf_tp_plan = "moe_tp_experts"
    assert "spread over processes" in experts_room.why_not(experts)

    class RunsAll(torch.nn.Module):
        def forward(self, hidden):
            return hidden

    dense = RunsAll()
    dense._hf_tp_plan = "moe_tp_experts"
    assert "spread over processes" in experts_room.why_not(dense)
