"""The vLLM adapter on tensors and stand-ins: rows, rules, hooks, configuration, refusals."""

from types import SimpleNamespace

import pytest
import torch
from vllm_stand_in import CUDAGraphMode, Router, ZeroExpertRouter, engine, route

import lynx
from lynx.adapters.vllm import metrics, plugin, requests, routers
from lynx.adapters.vllm.adapter import VllmAdapter
from lynx.adapters.vllm.rows import Rows, read_rows
from lynx.errors import AttachError, ConfigError
from lynx.routing import Phase, Role, WeightRule

PADDING, EXACT, OPEN = int(Role.PADDING), int(Role.EXACT), int(Role.OPEN)
PREFILL, DECODE = int(Phase.PREFILL), int(Phase.DECODE)
UNION = {"lynx": {"strategy": {"name": "batch-union", "top": 1}}}
SIZES = {"top_k": 4, "global_num_experts": 16}


def metadata(starts, lengths):
    return {"a": SimpleNamespace(), "b": SimpleNamespace(query_start_loc=torch.tensor(starts), seq_lens=lengths)}


def test_rows_of_a_mixed_batch():
    """A prompt of 3, a decode step, a prompt of 1, a decode step, and padding of rows and of requests."""
    rows = read_rows(metadata([0, 3, 4, 5, 6, 6, 6], torch.tensor([3, 10, 1, 7, 0, 0])), 8, torch.device("cpu"))
    assert rows.role.tolist() == [OPEN] * 6 + [PADDING] * 2
    assert rows.phase.tolist()[:6] == [PREFILL] * 3 + [DECODE, PREFILL, DECODE]
    assert rows.role.dtype == rows.phase.dtype == torch.int8


def test_rows_of_speculation_and_of_exact_requests():
    exact = torch.tensor([False, True, False, False])
    verify = metadata([0, 3, 4], torch.tensor([9, 5]))
    assert read_rows(verify, 4, torch.device("cpu")).phase.tolist() == [PREFILL] * 3 + [DECODE]
    rows = read_rows(verify, 5, torch.device("cpu"), max_decode_q=3, exact=exact)
    assert rows.phase.tolist()[:4] == [DECODE] * 4
    assert rows.role.tolist() == [OPEN, OPEN, OPEN, EXACT, PADDING]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "without requests"),
        ([{}, {}], "DBO"),
        ({"a": SimpleNamespace()}, "SimpleNamespace"),
        ({}, "nothing"),
    ],
)
def test_rows_that_cannot_be_told(given, words):
    assert words in read_rows(given, 4, torch.device("cpu"))


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
    assert (found.bias is None) == ("bias" not in options)


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


def test_decode_prunes_and_all_else_is_the_routers_own(vllm):
    vllm.config = engine(UNION)
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


def test_piecewise_graphs_are_left_alone_and_say_so_once(vllm, caplog):
    vllm.config = engine(UNION)
    layer = vllm.load(SIZES)["experts"][0]
    for _ in range(2):
        with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9], CUDAGraphMode.PIECEWISE):
            (_, ids), (_, new_ids) = route(layer, 4)
        assert torch.equal(new_ids, ids)
    assert [record.message for record in caplog.records if "left_exact" in record.message] == [
        "lynx.steps_left_exact reason=steps that run as piecewise CUDA graphs"
    ]


def test_the_handle_pauses_replaces_and_detaches(vllm):
    vllm.config = engine(UNION)
    model = vllm.load(SIZES)
    layer, handle = model["experts"][0], lynx.handle_of(model)
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        assert not torch.equal(*(ids for _, ids in route(layer, 4)))
        with handle.paused():
            assert torch.equal(*(ids for _, ids in route(layer, 4)))
        lynx.attach(model, "exact")
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


def test_counters_for_prometheus(vllm, monkeypatch, tmp_path):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    vllm.config, now = engine(UNION), [0.0]
    layer = vllm.load(SIZES)["experts"][0]
    assert not any("counters" in line for line in vllm.said)
    (exporter,) = metrics._exporters
    exporter._clock = lambda: now[0]
    exporter._last = 0.0
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        route(layer, 4)
    runner = vllm.runner()
    runner.execute_model()
    assert vllm.gauges == {}
    now[0] = 11.0
    runner.execute_model()
    assert vllm.gauges["lynx_steps", "experts.0", "decode"] == 1
    before, after = (vllm.gauges[f"lynx_active_{name}", "experts.0", "decode"] for name in ("before", "after"))
    assert after < before


def test_the_op_keeps_its_promises(vllm):
    vllm.config = engine(UNION)
    layer = vllm.load(SIZES)["experts"][0]
    logits = torch.randn(4, 16)
    weights, ids = Router._compute_routing(layer.router, None, logits, None)
    torch.library.opcheck(torch.ops.lynx.vllm_select.default, (logits, weights, ids, layer.router.lynx_number))


def test_requests_that_ask_for_exact_routing(vllm, caplog):
    vllm.config = engine(UNION)
    model = vllm.load(SIZES)
    layer, runner = model["experts"][0], vllm.runner()
    wishes = [None, {"lynx": "exact"}, {"other": 1}, {"lynx": "exakt"}]
    runner.model = model
    runner.requests = {n: SimpleNamespace(sampling_params=SimpleNamespace(extra_args=w)) for n, w in enumerate(wishes)}
    runner.input_batch = SimpleNamespace(req_ids=[0, 1, 2, 3])
    assert runner._prepare_inputs() == "prepared"
    assert requests.flags[model].tolist() == [False, True, False, True] + [False] * 12
    assert "request_not_understood" in caplog.text  # and is left exact, to be on the safe side
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        (weights, ids), (new_weights, new_ids) = route(layer, 4)
    assert torch.equal(new_ids[[1, 3]], ids[[1, 3]])
    assert torch.equal(new_weights[[1, 3]], weights[[1, 3]])
    assert not torch.equal(new_ids, ids)
    runner.input_batch.req_ids = [2, 0]
    runner._prepare_inputs()
    assert not requests.flags[model].any()


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


def test_rows_are_read_once_per_step(vllm, monkeypatch):
    from lynx.adapters.vllm import hook

    vllm.config = engine(UNION)
    model, calls = vllm.load(SIZES, SIZES), []
    monkeypatch.setattr(hook, "read_rows", lambda *given: calls.append(given) or read_rows(*given))
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]) as context:
        for layer in model["experts"]:
            route(layer, 4)
        assert isinstance(context.additional_kwargs["lynx_rows"][1], Rows)
    assert len(calls) == 1
