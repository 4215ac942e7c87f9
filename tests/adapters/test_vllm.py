"""The vLLM adapter on tensors and stand-ins: rows, rules, hooks, configuration, refusals."""

from types import SimpleNamespace

import pytest
import torch
from vllm_stand_in import Router, ZeroExpertRouter, engine, route

import lynx
from lynx.adapters.vllm import metrics, plugin, routers
from lynx.adapters.vllm.adapter import VllmAdapter
from lynx.errors import AttachError, ConfigError
from lynx.routing import Phase, Role, WeightRule

PADDING, EXACT, OPEN = int(Role.PADDING), int(Role.EXACT), int(Role.OPEN)
PREFILL, DECODE = int(Phase.PREFILL), int(Phase.DECODE)
UNION = {"lynx": {"strategy": {"name": "batch-union", "top": 1}}}
SIZES = {"top_k": 4, "global_num_experts": 16}


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, WeightRule("softmax", True, 1.0)),
        ({"renormalize": False}, WeightRule("softmax", False, 1.0)),
        ({"bias": torch.linspace(-1, 1, 16), "scale": 2.5}, WeightRule("sigmoid", True, 2.5)),
        ({"bias": torch.linspace(-1, 1, 16), "groups": 4, "kept": 2}, WeightRule("sigmoid", True, 1.0)),
    ],
    ids=["softmax", "raw", "bias", "groups"],
)
def test_rules_are_found_by_asking(options, rule):
    found = routers.find_rules(Router(**SIZES, **options), 16, 8, torch.device("cpu"))
    assert found.weights == rule
    assert found.notes == ()
    assert (found.choice.groups, found.choice.kept_groups) == (options.get("groups", 1), options.get("kept", 1))
    assert (found.choice.bias is None) == ("bias" not in options)


def test_an_unknown_rule_keeps_and_loses_only_own_experts():
    class Odd(Router):
        def _compute_routing(self, *args, **named):
            weights, ids = super()._compute_routing(*args, **named)
            return weights.square(), ids

    found = routers.find_rules(Odd(**SIZES), 16, 8, torch.device("cpu"))
    assert not found.weights.repick
    assert "no known weight rule" in found.notes[0]


def test_without_configuration_nothing_changes(vllm):
    model = vllm.load(SIZES)
    assert type(model["experts"][0].router) is Router
    assert vllm.said == []
    assert not VllmAdapter().recognises(model)


def test_registering_again_wraps_nothing_twice(vllm):
    before = vllm.layer.create_fused_moe_router
    plugin.register()
    assert vllm.layer.create_fused_moe_router is before is vllm.factory.create_fused_moe_router


@pytest.mark.parametrize("second", [False, True], ids=["first runner", "second runner"])
def test_decode_prunes_and_all_else_is_the_routers_own(vllm, second):
    vllm.config = engine(UNION)
    vllm.config.use_v2_model_runner = second
    model = vllm.load(SIZES, SIZES)
    assert vllm.said[0] == "Lynx is armed: 2 MoE layers, strategy batch-union, vLLM 0.32.0"
    layer = model["experts"][1]
    with vllm.step([0, 5, 6, 7, 8, 9], [5, 9, 9, 9, 9]):
        (weights, ids), (new_weights, new_ids) = route(layer, 12)
    assert torch.equal(new_ids[:5], ids[:5])
    assert torch.equal(new_weights[9:], weights[9:])
    assert new_ids.dtype == ids.dtype
    assert not torch.equal(new_ids[5:9], ids[5:9])
    report = lynx.handle_of(model).report().layers[1].phases
    assert (report["decode"].open_rows, report["prefill"].exact_rows) == (4, 5)
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        (_, ids), (new_weights, new_ids) = route(layer, 4)
    assert new_ids[new_weights != 0].unique().numel() <= 4 < ids.unique().numel()
    (_, ids), (_, new_ids) = route(layer, 6)  # as while memory is measured: no step is under way
    assert torch.equal(new_ids, ids)


def test_rows_that_vllm_marked_as_padding_keep_their_mark(vllm):
    vllm.config = engine(UNION)
    layer = vllm.load(SIZES)["experts"][0]
    logits = torch.randn(4, 16)
    weights, ids = Router._compute_routing(layer.router, None, logits, None)
    ids[2:], weights[2:] = -1, 0.0
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        new_weights, new_ids = torch.ops.lynx.vllm_select(logits, weights, ids, layer.router.lynx_number)
    assert torch.equal(new_ids[2:], ids[2:])
    assert torch.equal(new_weights[2:], weights[2:])
    assert not torch.equal(new_ids[:2], ids[:2])


def test_a_strategy_for_prefill_decides_there(vllm):
    vllm.config = engine(
        {"lynx": {"strategy": {"name": "phase-aware", "prefill": {"name": "batch-union", "top": 1}, "decode": "exact"}}}
    )
    model = vllm.load(SIZES)
    with vllm.step([0, 3, 6], [3, 3]):
        (_, ids), (_, new_ids) = route(model["experts"][0], 6)
    assert not torch.equal(new_ids, ids)


def test_the_handle_pauses_replaces_and_detaches(vllm):
    vllm.config = engine(UNION)
    model = vllm.load(SIZES)
    layer, handle = model["experts"][0], lynx.handle_of(model)
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        assert not torch.equal(*(ids for _, ids in route(layer, 4)))
        with handle.paused():
            assert torch.equal(*(ids for _, ids in route(layer, 4)))
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        assert not torch.equal(*(ids for _, ids in route(layer, 4)))
    lynx.attach(model, "exact")
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        assert torch.equal(*(ids for _, ids in route(layer, 4)))
        lynx.detach(model)
        assert torch.equal(*(ids for _, ids in route(layer, 4)))
    with pytest.raises(AttachError, match="teacher forcing"), lynx.attach(model, "exact").teacher_forced(0):
        pass


def test_what_was_served_is_logged_at_the_end(vllm, monkeypatch, caplog):
    from lynx.adapters import serving

    at_exit = []
    monkeypatch.setattr(serving.atexit, "register", lambda *given: at_exit.append(given))
    vllm.config = engine(UNION)
    model = vllm.load(SIZES)
    layer = model["experts"][0]
    serving.log_when_served(lynx.handle_of(model))
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        route(layer, 4)
    ((log, *given),) = at_exit
    with caplog.at_level("INFO", "lynx"):
        log(*given)
    assert "lynx.served phase=decode steps=1" in caplog.text


def test_slots_of_zero_experts_stay(vllm):
    """They are expert 0 at weight 0 when the hook sees them, and must come out so; nothing is moved to zero experts."""
    vllm.config = engine(UNION)
    layer = vllm.load(SIZES | {"kind": ZeroExpertRouter})["experts"][0]
    logits = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    weights, ids = ZeroExpertRouter._compute_routing(layer.router, None, logits, None)
    zero = weights == 0
    assert zero.any()
    with vllm.step(list(range(13)), [9] * 12):
        new_weights, new_ids = layer.router._compute_routing(None, logits, None)
    assert torch.equal(new_ids[zero], ids[zero])
    assert (new_weights[zero] == 0).all()
    assert not torch.equal(new_ids, ids) or not torch.equal(new_weights, weights)
    assert (new_ids < 12).all()


def test_slots_of_fused_shared_experts_stay(vllm):
    class Shared(Router):
        def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
            weights, ids = super()._compute_routing(hidden_states, router_logits, indices_type)
            shared = torch.full((len(ids), 1), 16, dtype=ids.dtype)
            return torch.cat([weights, torch.ones(len(ids), 1)], -1), torch.cat([ids, shared], -1)

    vllm.config = engine(UNION)
    layer = vllm.load(SIZES | {"kind": Shared})["experts"][0]
    logits = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    _, ids = Shared._compute_routing(layer.router, None, logits, None)
    with vllm.step(list(range(7)), [9] * 6):
        new_weights, new_ids = layer.router._compute_routing(None, logits, None)
    assert (new_ids[:, 4] == 16).all()
    assert (new_weights[:, 4] == 1).all()
    assert not torch.equal(new_ids, ids)
    torch.testing.assert_close(new_weights[:, :4].sum(-1), torch.ones(6))


@pytest.mark.parametrize("second", [False, True], ids=["first runner", "second runner"])
def test_counters_for_prometheus(vllm, monkeypatch, tmp_path, second):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    vllm.config, now = engine(UNION), [0.0]
    vllm.config.use_v2_model_runner = second
    layer = vllm.load(SIZES)["experts"][0]
    assert not any("counters" in line for line in vllm.said)
    (exporter,) = metrics._exporters
    exporter._clock = lambda: now[0]
    exporter._last = 0.0
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        route(layer, 4)
    runner = vllm.runner
    runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=4))
    assert vllm.gauges == {}
    now[0] = 11.0
    runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=4))
    assert vllm.gauges["lynx_steps", "experts.0", "decode"] == 1
    before, after = (vllm.gauges[f"lynx_active_{name}", "experts.0", "decode"] for name in ("before", "after"))
    assert after < before


def test_the_op_keeps_its_promises(vllm):
    vllm.config = engine(UNION)
    layer = vllm.load(SIZES)["experts"][0]
    logits = torch.randn(4, 16)
    weights, ids = Router._compute_routing(layer.router, None, logits, None)
    torch.library.opcheck(torch.ops.lynx.vllm_select.default, (logits, weights, ids, layer.router.lynx_number))


def test_a_bias_that_is_loaded_anew_is_used(vllm):
    vllm.config = engine({"lynx": {"strategy": {"name": "batch-union", "top": 1, "protect": 0}}})
    bias = torch.linspace(-1, 1, 16)
    layer = vllm.load(SIZES | {"bias": bias})["experts"][0]
    bias = torch.zeros(16, dtype=torch.bfloat16)
    bias[3] = 9.0
    layer.router.e_score_correction_bias = bias
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        _, (new_weights, new_ids) = route(layer, 4)
    assert new_ids[new_weights != 0].unique().tolist() == [3]


def test_the_configuration_is_in_the_key_of_the_compile_cache(vllm, monkeypatch, tmp_path):
    file = tmp_path / "lynx.yaml"
    file.write_text("strategy: {name: top-budget, budget: 5}\n")
    monkeypatch.setenv("LYNX_CONFIG", str(file))
    vllm.load(SIZES)
    assert vllm.config.additional_config["lynx"]["strategy"]["budget"] == 5


def test_configuration_may_be_a_mapping_or_a_file(vllm, tmp_path):
    file = tmp_path / "lynx.yaml"
    file.write_text("strategy: {name: exact}\n")
    assert plugin.configuration({"lynx": str(file)}).strategy.name == "exact"
    assert plugin.configuration(UNION).strategy.top == 1
    assert plugin.configuration({}) is plugin.configuration(None) is None
    with pytest.raises(ConfigError, match=r"additional_config\['lynx'\] is a mapping or a path; got list"):
        plugin.configuration({"lynx": ["exact"]})
