"""Experts in FP8, which have a registry of their own: selection works over the model's, Lynx's refuses or runs.

The host's kernels are for GPUs and come from a hub: stand-ins take their place, which multiply dequantised weights.
"""

import copy

import families
import pytest
import torch
from torch.nn import functional
from transformers import FineGrainedFP8Config
from transformers.integrations import finegrained_fp8 as fp8

import lynx

PRUNING = {"name": "batch-union", "top": 1}
BLOCK = (8, 8)
KEPT = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "gate", "router"]


def _dequantised(weight, scale):
    return weight.float() * scale.repeat_interleave(BLOCK[0], -2).repeat_interleave(BLOCK[1], -1)


def _matmul(hidden, weight, scale, block_size, dtype, activation_scale=None):
    return functional.linear(hidden, _dequantised(weight, scale).to(dtype))


def _batched(hidden, weight, scale, *, block_size, expert_ids):
    return torch.einsum("shi,si->sh", _dequantised(weight, scale)[expert_ids].to(hidden.dtype), hidden)


def _grouped(hidden, weight, scale, *, offsets, tokens_per_expert, block_size):
    ids = torch.searchsorted(offsets, torch.arange(len(hidden), dtype=offsets.dtype), right=True)
    return _batched(hidden, weight, scale, block_size=block_size, expert_ids=ids)


def _build(family, quantised=True):
    """A tiny model whose experts are FP8Experts."""
    model = families.build(family)
    own = {name: copy.deepcopy(m) for name, m in model.named_modules() if name.endswith(".experts")}
    settings = FineGrainedFP8Config(weight_block_size=BLOCK)
    model = fp8.replace_with_fp8_linear(model, modules_to_not_convert=KEPT, quantization_config=settings)
    for name, module in model.named_modules():
        if name not in own:
            continue
        module.to_empty(device="cpu")
        for part in ("gate_up_proj", "down_proj"):
            weight = getattr(own[name], part).data
            tiles = weight.unflatten(-1, (-1, BLOCK[1])).unflatten(-3, (-1, BLOCK[0]))
            scale = tiles.abs().amax((-1, -3)) / torch.finfo(torch.float8_e4m3fn).max
            if quantised:
                spread = scale.repeat_interleave(BLOCK[0], -2).repeat_interleave(BLOCK[1], -1)
                getattr(module, part).data = (weight / spread).to(torch.float8_e4m3fn)
                getattr(module, f"{part}_scale_inv").data = scale
            else:
                setattr(module, part, torch.nn.Parameter(weight))
    return model.eval().requires_grad_(False)


def _decode(model):
    return families.stepwise(model, families.prompts(), families.new_tokens())


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(fp8, "_FINEGRAINED_FP8", fp8.FineGrainedFP8(_matmul, _batched, _grouped))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("experts", ["model", "auto"])
def test_selection_over_fp8_experts(family, implementation, experts, kernels):
    model = _build(family)
    model.set_experts_implementation(implementation)
    before, traces = _decode(model), families.footprint(model)
    assert families.routers(model)
    with lynx.attach(model, "exact", experts=experts) as handle:
        exact = _decode(model)
        assert handle.experts == "model"
    assert torch.equal(exact.decode, before.decode)
    with families.counted(model) as plain:
        _decode(model)
    with lynx.attach(model, PRUNING, experts=experts) as handle, families.counted(model) as counter:
        pruned = _decode(model)
    assert torch.equal(pruned.prefill, before.prefill)
    assert torch.isfinite(pruned.decode).all()
    assert sum(counter.active[handle.layers :]) < sum(plain.active[handle.layers :])
    assert torch.equal(_decode(model).decode, before.decode)
    assert families.footprint(model) == traces


def test_lynx_experts_refuse_fp8_weights(kernels):
    """At attach, with the reason; not by a name that the other registry does not know, in the first forward."""
    model = _build("mixtral")
    traces = families.footprint(model)
    with pytest.raises(lynx.ConfigError, match=r"gate_up_proj is quantised \(torch\.float8_e4m3fn\).*experts='model'"):
        lynx.attach(model, PRUNING, experts="lynx")
    assert families.footprint(model) == traces


def test_lynx_experts_run_what_is_not_quantised():
    """Modules for FP8 may hold plain weights: Lynx's implementation is in their registry as well."""
    plain, model = families.build("mixtral"), _build("mixtral", quantised=False)
    expected = _decode(plain)
    with lynx.attach(model, "exact", experts="lynx") as handle:
        found = _decode(model)
        assert handle.experts == "lynx"
    assert families.same(found.decode, expected.decode)
    with lynx.attach(plain, PRUNING, experts="lynx"):
        expected = _decode(plain)
    with lynx.attach(model, PRUNING, experts="lynx"):
        assert families.same(_decode(model).decode, expected.decode)
