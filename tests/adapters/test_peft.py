"""PEFT's adapters on a model: Lynx goes on before them or after, and off without a trace."""

import families
import peft
import pytest
import torch

import lynx

PRUNING = {"name": "batch-union", "top": 1}
WHERE = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "router": {"target_parameters": ["gate.weight"]},
    "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "all": {"target_modules": ["q_proj"], "target_parameters": ["gate.weight", "experts.gate_up_proj"]},
    "router-copy": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}
SOME = ["mixtral", "qwen3_moe"]


def _decode(model):
    return families.stepwise(model, families.prompts(), families.new_tokens())


def _adapt(model, where):
    """Put adapters on a model, with weights that matter."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, **WHERE[where])).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()
        if "lora_" in name or ".modules_to_save." in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapted


def _traces(model):
    """What hooks and attributes all modules have."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    hooks = {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}
    return {
        name: (sorted(vars(module)), hooks[name], id(getattr(module, "config", None)))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("where", WHERE)
def test_attached_before_and_after(family, where):
    """The same steps either way, fewer experts than the adapted model wakes, and the adapted model's own afterwards."""
    base, adapted = families.build(family), _adapt(families.build(family), where)
    before, traces = _decode(adapted), _traces(adapted)
    assert not families.same(before.prefill, _decode(base).prefill)

    first = lynx.attach(base, PRUNING)
    early = _adapt(base, where)
    pruned = _decode(early)
    assert torch.equal(pruned.prefill, before.prefill)
    assert not families.same(pruned.decode, before.decode)
    decode = first.report().total["decode"]
    assert (decode.steps, decode.open_rows) == (3, 12)
    assert decode.active_after < decode.active_before
    first.detach()
    assert torch.equal(_decode(early).decode, before.decode)
    assert {name: found[:2] for name, found in _traces(early).items()} == {
        name: own[:2] for name, own in traces.items()
    }

    with lynx.attach(adapted, "exact") as handle:
        assert torch.equal(_decode(adapted).decode, before.decode)
    assert handle.layers == 2
    with lynx.attach(adapted, PRUNING) as handle:
        assert torch.equal(_decode(adapted).decode, pruned.decode)
    late = handle.report().total["decode"]
    assert (late.steps, late.active_before, late.active_after) == (3, decode.active_before, decode.active_after)
    assert torch.equal(_decode(adapted).decode, before.decode)
    assert _traces(adapted) == traces


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("where", ["attention", "router", "experts"])
def test_lynx_experts_under_adapters(family, where):
    """Attached before, Lynx's implementation runs the adapted weights; after, it runs them or says that it cannot."""
    base = families.build(family)
    with lynx.attach(base, "exact", experts="lynx"):
        adapted = _adapt(base, where)
        found = _decode(adapted)
    assert families.same(found.decode, _decode(adapted).decode)
    if where == "experts":
        with pytest.raises(lynx.ConfigError, match="ParamWrapper does not go through"):
            lynx.attach(adapted, "exact", experts="lynx")
        return
    with lynx.attach(adapted, "exact", experts="lynx"):
        assert families.same(_decode(adapted).decode, found.decode)


@pytest.mark.parametrize("where", ["all", "router-copy"])
def test_adapters_switched_and_merged(where):
    """An adapter that is turned off, and one that is merged into the weights, while Lynx is attached."""
    plain = families.build("mixtral")
    with lynx.attach(plain, PRUNING):
        expected = _decode(plain)
    adapted = _adapt(families.build("mixtral"), where)
    with lynx.attach(adapted, PRUNING) as handle:
        pruned = _decode(adapted)
        with adapted.disable_adapter():
            assert torch.equal(_decode(adapted).decode, expected.decode)
        assert torch.equal(_decode(adapted).decode, pruned.decode)
        merged = adapted.merge_and_unload()
        assert families.same(_decode(merged).decode, pruned.decode)
        assert handle.report().total["decode"].steps == 4 * 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())
