"""Models whose weights accelerate keeps on the CPU or on disk: on no device between the forwards of their modules."""

import accelerate
import families
import pytest
import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

import lynx

PRUNING = {"name": "batch-union", "top": 1}
CPU = torch.device("cpu")


def _decode(model):
    return families.stepwise(model, families.prompts(), families.new_tokens())


def _ernie():
    """Its bias is a parameter, in a module inside the router: offloaded with the weights."""
    options = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Ernie4_5_MoeConfig(**{**families._COMMON, **options, "moe_num_shared_experts": 1})
        model = Ernie4_5_MoeForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("e_score_correction_bias"):
                parameter.data.normal_(0.0, 0.2)
    return model


def _build(family):
    return _ernie() if family == "ernie4_5_moe" else families.build(family)


def _offload(model, how, folder):
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)
    if how == "disk":
        return accelerate.disk_offload(model, folder / "off", execution_device=CPU, offload_buffers=True)
    model.save_pretrained(folder / "saved")
    layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(len(model.model.layers))}
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu") | layers
    places = {name: place for name, place in places.items() if name in dict(model.named_modules())}
    return type(model).from_pretrained(folder / "saved", device_map=places, offload_folder=folder / "off").eval()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "ernie4_5_moe"])
@pytest.mark.parametrize("how", ["cpu", "disk", "device-map"])
@pytest.mark.parametrize("experts", ["model", "lynx"])
def test_offloaded(family, how, experts, tmp_path):
    """Selects what it selects where all is in place, bit for bit, and leaves nothing behind."""
    plain, model = _build(family), _offload(_build(family), how, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    before, traces = _decode(model), families.footprint(model)
    assert torch.equal(before.decode, _decode(plain).decode)
    outputs, counts = [], []
    for each in (plain, model):
        with lynx.attach(each, PRUNING, experts=experts) as handle:
            outputs.append(_decode(each))
        decode = handle.report().total["decode"]
        counts.append((decode.open_rows, decode.rows_changed, decode.active_before, decode.active_after))
    assert torch.equal(outputs[0].prefill, outputs[1].prefill)
    assert torch.equal(outputs[0].decode, outputs[1].decode)
    assert counts[0] == counts[1]
    assert counts[0][3] < counts[0][2]
    assert handle.report().failures == 0
    with lynx.attach(model, "exact"):
        assert torch.equal(_decode(model).decode, before.decode)
    assert torch.equal(_decode(model).decode, before.decode)
    assert families.footprint(model) == traces


def test_offloaded_after_attach():
    plain, model = (families.build("deepseek_v3") for _ in range(2))
    with lynx.attach(plain, PRUNING):
        expected = _decode(plain)
    with lynx.attach(model, PRUNING) as handle:
        accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)
        assert torch.equal(_decode(model).decode, expected.decode)
    assert handle.report().total["decode"].rows_changed > 0
