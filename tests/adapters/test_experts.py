"""Lynx's experts implementation: equal to the model's own, run only where it was asked for, gone afterwards."""

import copy
from importlib import import_module

import families
import pytest
import torch
from transformers import MixtralForCausalLM

import lynx
import lynx.adapters.transformers.experts as experts_room
from lynx.kernels import make_plan

STOCK = ("eager", "grouped_mm", "batched_mm")

# layouts that none of the families has: weights stored input first, no gate, a norm behind the experts
LAYOUTS = {
    "transposed": (
        "aria",
        "AriaExperts",
        "AriaTextConfig",
        {"moe_num_experts": 8, "hidden_size": 32, "intermediate_size": 24},
    ),
    "no-gate": (
        "nemotron_h",
        "NemotronHExperts",
        "NemotronHConfig",
        {"n_routed_experts": 8, "hidden_size": 32, "moe_intermediate_size": 24, "moe_latent_size": None},
    ),
    "post-norm": (
        "muse_spark",
        "MuseSparkExperts",
        "MuseSparkTextConfig",
        {"num_local_experts": 8, "moe_hidden_size": 32, "moe_intermediate_size": 24},
    ),
}


def _module(name):
    """An experts module with random weights; a family's own comes from its model."""
    if name in families.FAMILIES:
        module = next(m for path, m in families.shared(name).named_modules() if path.endswith(".experts"))
        module = copy.deepcopy(module)
    else:
        family, experts, config, options = LAYOUTS[name]
        path = f"transformers.models.{family}"
        pytest.importorskip(path)
        config = getattr(import_module(f"{path}.configuration_{family}"), config)(**options)
        module = getattr(import_module(f"{path}.modeling_{family}"), experts)(config).eval()
        if not hasattr(module, "has_gate"):
            pytest.skip("these experts are not in the registry of this transformers")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    return module


def _inputs(dtype, rows=9, experts=8, k=3):
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(rows, 32, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(experts - 2, generator=generator)[:k] for _ in range(rows)])
    weights = torch.rand(rows, k, generator=generator).to(dtype)
    lost = torch.rand(rows, k, generator=generator) < 0.3
    lost[:, 0] = False
    # empty slots as the core leaves them: weight 0 on an expert that the row keeps; the last row uses an expert alone
    ids = torch.where(lost, ids[:, :1], ids)
    ids[-1, 0] = experts - 2
    return hidden, ids, weights.masked_fill(lost, 0.0)


def _run(module, implementation, *inputs):
    module.config._experts_implementation = implementation
    with torch.no_grad():
        return module(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*families.FAMILIES, *LAYOUTS])
def test_equals_stock(name, dtype):
    """No further from the truth, in float64, than the implementations of the host are."""
    module = _module(name).to(dtype)
    inputs = _inputs(dtype)
    exact = _run(copy.deepcopy(module).double(), "eager", *(t.double() if t.is_floating_point() else t for t in inputs))
    stock = [(_run(module, name, *inputs).double() - exact).abs().max().item() for name in STOCK]
    switch = experts_room.ExpertsSwitch()
    switch.set([module])
    with torch.no_grad():
        out = module(*inputs)
    assert out.dtype == dtype
    assert out.shape == inputs[0].shape
    assert (out.double() - exact).abs().max().item() <= 2 * max(stock) + 1e-7
    assert exact.abs().max() > 0.01
    switch.undo()
    assert module.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", *LAYOUTS])
def test_lost_slots_are_not_computed(name):
    """A slot of weight 0 reads no weights: poisoned ones do not show."""
    module = _module(name)
    hidden, ids, weights = _inputs(torch.float32)
    ids[2, 1], weights[2, 1] = 7, 0.0
    experts_room.ExpertsSwitch().set([module])
    with torch.no_grad():
        before = module(hidden, ids, weights)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter[7] = torch.nan
        assert torch.equal(module(hidden, ids, weights), before)
        weights[2, 1] = 0.1
        assert torch.isnan(module(hidden, ids, weights)[2]).all()


@pytest.mark.smoke
def test_whole_model(model):
    """Equal logits in prefill and decode, exact and pruned, within what the host's implementations differ by."""
    batch, tokens = families.prompts(), families.new_tokens()
    own = model.get_experts_implementation()
    for strategy in ("exact", {"name": "batch-union", "top": 1}):
        stock = []
        for implementation in STOCK:
            model.set_experts_implementation(implementation)
            with lynx.attach(model, strategy, experts="model") as handle:
                stock.append(families.stepwise(model, batch, tokens))
            assert handle.experts == "model"
        model.set_experts_implementation(own)
        with lynx.attach(model, strategy, experts="lynx") as handle:
            ours = families.stepwise(model, batch, tokens)
        assert handle.experts == handle.report().experts == "lynx"
        for part in ("prefill", "decode"):
            logits = [getattr(run, part) for run in stock]
            spread = max((first - second).abs().max() for first in logits for second in logits)
            distance = min((getattr(ours, part) - stock_logits).abs().max() for stock_logits in logits)
            assert distance <= 2 * spread + 1e-6


@pytest.fixture
def calls(monkeypatch):
    """Count what Lynx's implementation runs."""
    counted = []

    def run(hidden, *rest, **named):
        counted.append(len(hidden))
        return original(hidden, *rest, **named)

    original = experts_room.run_experts
    monkeypatch.setattr(experts_room, "run_experts", run)
    return counted


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("asked", "own", "expected"),
    [
        ("auto", "grouped_mm", "model"),  # on a CPU; elsewhere generate() would take batched_mm in its place
        ("auto", "eager", "model"),
        ("auto", "batched_mm", "lynx"),
        ("model", "batched_mm", "model"),
        ("lynx", "grouped_mm", "lynx"),
    ],
)
@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_choice(model, calls, asked, own, expected):
    before = model.get_experts_implementation()
    model.set_experts_implementation(own)
    with lynx.attach(model, "exact", experts=asked) as handle:
        assert handle.experts == expected
        families.generate(model, families.prompts(), max_new_tokens=2, min_new_tokens=2)
    assert len(calls) == (4 if expected == "lynx" else 0)  # 2 layers, prefill and one decode step
    families.generate(model, families.prompts(), max_new_tokens=2)
    assert len(calls) == (4 if expected == "lynx" else 0)
    assert model.get_experts_implementation() == {"": own}
    model.set_experts_implementation(before)


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_only_chosen_layers(model, calls):
    with lynx.attach(model, "exact", experts="lynx", layers={"include": [1]}), torch.no_grad():
        model(**families.prompts())
    assert len(calls) == 1


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_configs_can_be_shown_while_attached(model):
    before = repr(model.config)
    with lynx.attach(model, "exact", experts="lynx"):
        families.generate(model, families.prompts(), max_new_tokens=2)
        config = model.model.layers[0].mlp.experts.config
        assert config is not model.config
        assert repr(config) == repr(model.config) == before
        assert config.to_json_string(use_diff=False) == model.config.to_json_string(use_diff=False)


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_a_copy_has_seats_of_its_own(model):
    with lynx.attach(model, "exact", experts="lynx"):
        twin = copy.deepcopy(model)
        for router, first, second in zip(
            families.routers(twin),
            *([layer.mlp.experts for layer in m.model.layers] for m in (twin, model)),
            strict=True,
        ):
            (hook,) = router._forward_hooks.values()
            assert hook.seat is first._lynx_seat
            assert hook.seat is not second._lynx_seat


def test_a_seat_gives_its_plan_once_and_to_its_own_ids():
    ids, seat = torch.tensor([[0, 1]]), experts_room.Seat()
    plan = make_plan(ids, torch.ones(1, 2), 4)
    for asked, experts, expected in [(ids, 4, plan), (ids.clone(), 4, None), (ids, 3, None)]:
        seat.give(ids, plan)
        assert seat.take(asked, experts) is expected
        assert seat.take(ids, 4) is None
    seat.give(ids, None)
    assert seat.take(ids, 4) is None


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_owner_may_change_the_implementation_meanwhile(model, calls):
    with lynx.attach(model, "exact", experts="lynx"), torch.no_grad():
        model.set_experts_implementation("eager")
        model(**families.prompts())
    assert len(calls) == 2
    assert model.get_experts_implementation() == {"": "eager"}
    model.set_experts_implementation("grouped_mm")


def test_models_that_share_a_config(calls):
    """Attached and detached in any order, neither sees the other's implementation."""
    first = families.build("mixtral")
    second = MixtralForCausalLM(first.config).eval()
    assert first.config is second.config
    batch = families.prompts()
    one = lynx.attach(first, "exact", experts="lynx")
    with torch.no_grad():
        second(**batch)
        assert calls == []
        two = lynx.attach(second, "exact", experts="lynx")
        one.detach()
        second(**batch)
        assert len(calls) == 2
        two.detach()
        first(**batch)
        second(**batch)
    assert len(calls) == 2
    assert first.get_experts_implementation() == {"": "grouped_mm"}


def test_subclass_outside_of_transformers(calls):
    """`set_experts_implementation` silently does nothing for these; ours does not go through it."""

    class Mine(MixtralForCausalLM):
        pass

    model = Mine(families.shared("mixtral").config).eval()
    with lynx.attach(model, "exact", experts="lynx"), torch.no_grad():
        model(**families.prompts())
    assert len(calls) == 2


def test_impossible():
    def experts(model):
        return model.model.layers[1].mlp.experts

    def spread_out(model):
        experts(model)._is_expert_parallel = True

    def quantise(model):
        experts(model).down_proj.data = experts(model).down_proj.data.to(torch.float8_e4m3fn)

    def unstack(model):
        del experts(model).down_proj

    def unregister(model):
        del experts(model).has_gate

    def remove(model):
        model.model.layers[1].mlp.experts = None

    for change, reason in [
        (spread_out, "spread over processes"),
        (quantise, "MixtralExperts.down_proj is quantised (torch.float8_e4m3fn)"),
        (unstack, "MixtralExperts.down_proj is not one stacked floating-point tensor"),
        (unregister, "MixtralExperts does not go through transformers' experts registry"),
        (remove, "no experts module was found beside the router"),
    ]:
        model = families.build("mixtral")
        change(model)
        before = families.footprint(model)
        with pytest.raises(lynx.ConfigError) as caught:
            lynx.attach(model, "exact", experts="lynx")
        assert reason in str(caught.value)
        assert "experts='model'" in str(caught.value)
        assert families.footprint(model) == before
        # selection works all the same
        handle = lynx.attach(model, "exact", experts="auto")
        assert handle.experts == "model"
        handle.detach()
        # and where that layer is left out, the rest can run on ours
        lynx.attach(model, "exact", experts="lynx", layers={"exclude": [1]}).detach()
