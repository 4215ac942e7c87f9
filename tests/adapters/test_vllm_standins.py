"""Stand-ins under vLLM, on stand-ins for its types: what is added, where, for whom, and what is refused."""

import pytest
import torch
from vllm_stand_in import RoutedExperts, Router, UnquantizedFusedMoEMethod, engine

import lynx
from lynx.adapters.vllm.adapter import VllmAdapter
from lynx.adapters.vllm.hook import hooks
from lynx.errors import ConfigError, UnsupportedModelError
from lynx.matching import experts_of
from lynx.standins_file import StandInLayer, experts_hash, read_standins, write_standins

EXACT = {"lynx": {"strategy": {"name": "exact"}}}
SIZES = {"top_k": 4, "global_num_experts": 16}
E, H, RANK = 16, 8, 3
STEP = [0, 1, 2, 3, 4, 5], [9, 9, 9, 9, 9]  # five requests in decode


@pytest.fixture
def model(vllm):
    """Two layers whose weights were laid out anew after they were noted."""
    torch.manual_seed(0)
    vllm.config = engine(EXACT)
    return vllm.load(SIZES, SIZES)


def checkpoint(layer):
    """A layer's weights as they were loaded."""
    return [weight.data.mT.contiguous() for weight in (layer.routed_experts.w13_weight, layer.routed_experts.w2_weight)]


def written(model, path, change=lambda layer, tensors: tensors):
    """A file of random stand-ins, as it is made from the checkpoint by another host, whose names differ."""
    generator = torch.Generator().manual_seed(1)
    layers = []
    for index, layer in enumerate(model["experts"]):
        shapes = (E, RANK, H), (E, RANK, H), (E, H), (E, H)
        maps = [torch.randn(*shape, generator=generator) / 4 for shape in shapes]
        code = experts_hash(change(index, checkpoint(layer)))
        layers.append(StandInLayer(f"model.layers.{index}.gate", index, code, *maps, torch.ones(E, dtype=torch.bool)))
    write_standins(path, layers, {})
    return path


@pytest.fixture
def file(model, tmp_path):
    return written(model, tmp_path / "s.safetensors")


def rows(count=5, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, H, generator=generator), torch.randn(count, E, generator=generator)


def one(layer, x, expert):
    """One expert for one row."""
    w13, w2 = (weight[expert] for weight in checkpoint(layer))
    gate, up = (w13 @ x).chunk(2)
    return w2 @ (torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize(("mode", "share"), [("stand-in", 0.0), ("blend", 0.2)])
def test_a_layer_by_hand(vllm, model, file, mode, share):
    layer, (hidden, logits) = model["experts"][1], rows()
    weights, ids = Router._compute_routing(layer.router, hidden, logits, None)
    with lynx.attach(model, "batch-union", top=1), vllm.step(*STEP):
        re_weights, re_ids = layer.router._compute_routing(hidden, logits, None)
    with lynx.attach(model, "batch-union", top=1, standins={"file": file, "mode": mode}) as handle, vllm.step(*STEP):
        output = layer.run(hidden, logits)
    maps, active = read_standins(file).layers[1], ids[:, :1].flatten().tolist()
    expected = torch.zeros(5, H)
    for t, x in enumerate(hidden):
        lost = [e not in active for e in ids[t].tolist()]
        own = 1 - share if any(lost) else 1.0
        for slot, e in enumerate(ids[t].tolist()):
            answer = maps.mean_out[e] + (x - maps.mean_in[e]) @ maps.inner[e].T @ maps.outer[e]
            expected[t] += own * weights[t, slot] * (answer if lost[slot] else one(layer, x, e))
        if any(lost):
            for slot, e in enumerate(re_ids[t].tolist()):
                expected[t] += share * re_weights[t, slot] * one(layer, x, e)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert handle.report().total["decode"].answered_mass_mean > 0.05


def test_only_rows_that_lose_something_get_an_answer(vllm, model, file):
    layer, (hidden, logits) = model["experts"][0], rows(8)
    plain = layer.run(hidden, logits)
    with lynx.attach(model, "batch-union", top=1, standins=file) as handle:
        with vllm.step([0, 4, 5, 6, 7, 8], [4, 9, 9, 9, 9]):  # four rows of a prompt, four in decode
            output = layer.run(hidden, logits)
        assert torch.equal(output[:4], plain[:4])
        assert not torch.equal(output[4:], plain[4:])
        with vllm.step([0, 8], [8]):
            assert torch.equal(layer.run(hidden, logits), plain)
        with handle.paused(), vllm.step([*range(9)], [9] * 8):
            assert torch.equal(layer.run(hidden, logits), plain)


def test_what_a_step_lost_is_not_added_to_another(vllm, model, file):
    """A step whose experts did not run, and then one in which nothing is selected."""
    layer, (hidden, logits) = model["experts"][0], rows()
    plain = layer.run(hidden, logits)
    with lynx.attach(model, "batch-union", top=1, standins=file):
        with vllm.step(*STEP):
            layer.router._compute_routing(hidden, logits, None)
        assert hooks[layer.router.lynx_number].lost
        assert torch.equal(layer.run(hidden, logits), plain)  # no step is under way


@pytest.mark.parametrize("before", [False, True], ids=["bare", "watched"])
def test_detached_the_experts_are_called_as_before(vllm, model, file, before):
    experts = [layer.routed_experts for layer in model["experts"]]
    if before:
        for each in experts:
            each.forward_modular = each.forward_modular
    found = [dict(vars(each)) for each in experts]
    lynx.attach(model, "batch-union", top=1, standins=file)
    assert [dict(vars(each)) for each in experts] != found
    lynx.attach(model, "batch-union", top=2, standins=file)
    lynx.attach(model, "batch-union", top=2)
    assert [dict(vars(each)) for each in experts] == found
    lynx.detach(model)
    assert [dict(vars(each)) for each in experts] == found


def test_code_that_goes_on_calling_the_op_finds_nothing_to_add(vllm, model, file):
    layer, (hidden, logits) = model["experts"][0], rows()
    lynx.attach(model, "batch-union", top=1, standins=file)
    number, output = layer.router.lynx_number, torch.randn(5, H)
    with vllm.step(*STEP):
        layer.router._compute_routing(hidden, logits, None)
        torch.library.opcheck(torch.ops.lynx.vllm_answer.default, (output, hidden, number))
        layer.router._compute_routing(hidden, logits, None)
        assert not torch.equal(torch.ops.lynx.vllm_answer(output, hidden, number), output)
        layer.router._compute_routing(hidden, logits, None)
        lynx.detach(model)
        assert torch.equal(torch.ops.lynx.vllm_answer(output, hidden, number), output)


def test_from_the_engines_own_configuration(vllm, model, file):
    torch.manual_seed(0)
    vllm.config = engine({"lynx": {"strategy": {"name": "batch-union", "top": 1}, "standins": str(file)}})
    again = vllm.load(SIZES, SIZES)
    assert lynx.handle_of(again).config.standins.file == file
    layer, (hidden, logits) = again["experts"][0], rows()
    with vllm.step(*STEP):
        output = layer.run(hidden, logits)
    with lynx.attach(again, "batch-union", top=1), vllm.step(*STEP):
        assert not torch.equal(layer.run(hidden, logits), output)


def test_files_for_other_experts_are_refused(vllm, model, tmp_path):
    def trained(index, tensors):
        return [tensors[0], tensors[1] * 1.1] if index == 1 else tensors

    path = written(model, tmp_path / "other.safetensors", trained)
    with pytest.raises(ConfigError, match=r"made for other experts .*'model.layers.1.gate'"):
        lynx.attach(model, "batch-union", top=1, standins=path)
    torch.manual_seed(1)
    vllm.config = engine({"lynx": {"strategy": {"name": "exact"}, "standins": str(path)}})
    vllm.said.clear()
    with pytest.raises(ConfigError, match="made for other experts"):
        vllm.load(SIZES, SIZES)
    assert vllm.said == []


def test_weights_that_were_not_seen_before_they_were_laid_out_are_refused(vllm, model, file):
    model["experts"][1].router.lynx_experts = ""
    with pytest.raises(UnsupportedModelError, match=r"'experts.1' takes no stand-ins: .* --load-format"):
        lynx.attach(model, "batch-union", top=1, standins=file)


class Fp8(UnquantizedFusedMoEMethod):
    """Another way to run experts."""


class Substituted(RoutedExperts):
    """Experts that do more than run."""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda layer: setattr(layer.moe_config, "tp_size", 2), "spread over processes"),
        (lambda layer: setattr(layer.moe_config, "ep_size", 2), "spread over processes"),
        (lambda layer: setattr(layer.moe_config, "is_lora_enabled", True), "LoRA"),
        (lambda layer: setattr(layer.moe_config, "num_experts", 20), "more than once"),
        (lambda layer: setattr(layer.moe_config, "has_bias", True), "without biases"),
        (lambda layer: setattr(layer.moe_config, "is_act_and_mul", False), "a gate, an up and a down"),
        (lambda layer: setattr(layer.moe_config, "hidden_dim_unpadded", 6), "padded"),
        (lambda layer: setattr(layer.moe_config, "intermediate_size_per_partition_unpadded", 1), "padded"),
        (lambda layer: setattr(layer.routed_experts, "quant_method", Fp8()), "run by Fp8"),
        (lambda layer: setattr(layer, "routed_experts", Substituted(E)), "Substituted, which are not known"),
        (lambda layer: setattr(layer.routed_experts, "apply_router_weight_on_input", True), "weighs what goes in"),
        (lambda layer: setattr(layer, "routed_input_transform", object()), "transforms"),
        (lambda layer: setattr(layer, "routed_output_transform", object()), "transforms"),
    ],
)
def test_layers_that_take_none_are_refused_by_name(model, file, change, words):
    change(model["experts"][1])
    with pytest.raises(UnsupportedModelError, match=rf"'experts.1' takes no stand-ins: .*{words}.*leave out `stand"):
        lynx.attach(model, "batch-union", top=1, standins=file)
    assert lynx.attach(model, "batch-union", top=1).layers == 2


def test_an_output_that_is_not_finished_raises(vllm, model, file):
    layer, (hidden, logits) = model["experts"][0], rows()
    layer.routed_experts.quant_method.apply = lambda *args, **named: object()
    lynx.attach(model, "exact", standins=file)
    with vllm.step(*STEP), pytest.raises(UnsupportedModelError, match="leaves its output unfinished"):
        layer.run(hidden, logits)


def test_files_are_made_elsewhere(model):
    adapter = VllmAdapter()
    with pytest.raises(ConfigError, match="vllm"):
        experts_of(adapter, model, adapter.discover(model).layers[0])
