"""The SGLang adapter on tensors and stand-ins: rows, rules, hooks, refusals. No engine has run it yet."""

from functools import partial

import pytest
import torch
from sglang_stand_in import E, Format, ForwardBatch, H, K, Mode, Standard, StandIn, TopKConfig, choose
from torch import nn

import lynx
from lynx.adapters.sglang import hook, plugin
from lynx.adapters.sglang.adapter import SglangAdapter
from lynx.adapters.sglang.routers import find_rules
from lynx.adapters.sglang.rows import read_rows
from lynx.attachment import discover
from lynx.errors import AttachError, ConfigError, UnsupportedModelError
from lynx.routing import Phase, Role, WeightRule

CPU = torch.device("cpu")


@pytest.fixture
def sglang(monkeypatch):
    monkeypatch.setattr(plugin, "log_when_served", lambda handle: None)  # not when the tests end
    return StandIn(monkeypatch)


@pytest.fixture
def configured(sglang, monkeypatch, tmp_path):
    file = tmp_path / "lynx.yaml"

    def configure(text="strategy: {name: batch-union, top: 1}"):
        file.write_text(text + "\n")
        monkeypatch.setenv("LYNX_CONFIG", str(file))
        plugin.register()
        plugin.register()
        sglang.registry.apply_hooks()
        return sglang

    return configure


def route(runner, tokens, layer=0, seed=0):
    """What the layer's own rule gives, and what leaves SGLang's top-k."""
    logits = torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed))
    topk = runner.model["layers"][layer].topk
    return choose(logits, topk.topk_config), topk(torch.zeros(tokens, H), logits)


def same(own, given):
    return torch.equal(own[0], given.topk_weights) and torch.equal(own[1], given.topk_ids)


@pytest.mark.parametrize(
    ("mode", "phase"),
    [(Mode.DECODE, Phase.DECODE), (Mode.EXTEND, Phase.PREFILL), (Mode.MIXED, Phase.PREFILL)],
)
def test_rows_of_a_step(mode, phase):
    """Rows behind the count are padding, and so are rows that write to the cache's slot 0."""
    batch = ForwardBatch(mode, torch.tensor([5, 6, 7, 0, 9]))
    assert read_rows(batch, 5, CPU).role.tolist() == [2, 2, 2, 0, 2]
    rows = read_rows(batch, 5, CPU, torch.tensor(4))
    assert rows.role.tolist() == [2, 2, 2, 0, 0]
    assert rows.phase.tolist() == [int(phase)] * 5
    assert rows.role.dtype == rows.phase.dtype == torch.int8
    batch.out_cache_loc = None
    assert read_rows(batch, 3, CPU, torch.tensor([2])).role.tolist() == [int(Role.OPEN)] * 2 + [int(Role.PADDING)]


@pytest.mark.parametrize("mode", [Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2, Mode.DLLM_EXTEND, Mode.IDLE])
def test_modes_that_are_left_alone(mode):
    assert read_rows(ForwardBatch(mode, torch.ones(4)), 4, CPU) == f"steps in the mode {mode.name}"


def test_rows_of_others_are_left_alone():
    assert "other rows" in read_rows(ForwardBatch(Mode.DECODE, torch.ones(4)), 8, CPU)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, WeightRule("softmax", True, 1.0)),
        ({"renormalize": False}, WeightRule("softmax", False, 1.0)),
        ({"scoring_func": "sigmoid", "routed_scaling_factor": 2.5}, WeightRule("sigmoid", True, 2.5)),
        ({"scoring_func": "sigmoid", "correction_bias": torch.zeros(E)}, WeightRule("sigmoid", True, 1.0)),
        (
            {
                "scoring_func": "sigmoid",
                "correction_bias": torch.zeros(E),
                "use_grouped_topk": True,
                "num_expert_group": 4,
                "topk_group": 2,
            },
            WeightRule("sigmoid", True, 1.0),
        ),
        ({"num_shared_topk_slots": 1, "top_k": K + 1}, WeightRule("softmax", True, 1.0)),
    ],
    ids=["softmax", "raw", "scaled", "bias", "groups", "shared"],
)
def test_rules_are_found_by_asking(configured, options, rule):
    """A bias that is still zero is found all the same, and is the model's own tensor."""
    topk = configured().TopK(0, **options)
    found = find_rules(topk, E, H, CPU)
    assert (found.weights, found.notes, found.refused) == (rule, (), "")
    assert (found.choice.groups, found.choice.kept_groups) == ((4, 2) if "topk_group" in options else (1, 1))
    bias = topk.topk_config.correction_bias
    assert found.bias is bias is None or found.bias.data_ptr() == bias.data_ptr()
    assert vars(topk.topk_config).keys() == vars(TopKConfig()).keys()


def test_an_unknown_rule_keeps_and_loses_only_own_experts(configured):
    sglang = configured()
    sglang.choose = lambda logits, config: (choose(logits, config)[0].square(), choose(logits, config)[1])
    found = find_rules(sglang.TopK(0), E, H, CPU)
    assert not found.weights.repick
    assert "no known weight rule" in found.notes[0]
    sglang.choose = lambda logits, config: 1 / 0
    found = find_rules(sglang.TopK(0), E, H, CPU)
    assert not found.weights.repick
    assert "could not be asked (ZeroDivisionError" in found.notes[0]


def test_without_configuration_nothing_changes(sglang, monkeypatch):
    monkeypatch.delenv("LYNX_CONFIG", raising=False)
    plugin.register()
    assert sglang.registry.registered == ()
    assert not SglangAdapter().recognises(nn.Linear(1, 1))


def test_armed_once(configured, caplog):
    caplog.set_level("INFO", "sglang.lynx")
    sglang = configured()
    assert [target.rpartition(".")[2] for target, *_ in sglang.registry.registered] == [
        "_post_process_topk_ids",
        "load_model",
        "init_cuda_graphs",
    ]
    runner = sglang.load({}, {})
    armed = [record.message for record in caplog.records if "armed" in record.message]
    assert armed == [
        "Lynx is armed: 2 MoE layers, strategy batch-union, SGLang 0.5.23 "
        "(this adapter has not been run on an engine yet)"
    ]
    assert discover(runner.model).layers[1].info.expert_bytes == 24


def test_decode_prunes_and_padding_is_left(configured):
    sglang = configured()
    runner = sglang.load({}, {})
    with runner.step(Mode.DECODE, range(1, 7)):
        own, given = route(runner, 6, layer=1)
    assert given.topk_ids.dtype == torch.int32
    assert given.topk_ids[given.topk_weights != 0].unique().numel() <= 6 < own[1].unique().numel()
    assert torch.allclose(given.topk_weights.sum(-1), torch.ones(6))
    with runner.step(Mode.DECODE, [1, 2, 3, 4, 0, 0]):  # a graph's padding, which nobody counts
        own, given = route(runner, 6)
    assert same((own[0][4:], own[1][4:]), Standard(given.topk_weights[4:], given.topk_ids[4:], None))
    assert not torch.equal(own[1][:4], given.topk_ids[:4])
    assert lynx.handle_of(runner.model).report().layers[0].phases["decode"].open_rows == 4
    with runner.step(Mode.DECODE, range(1, 7), non_padded=4):
        own, given = route(runner, 6)
    assert torch.equal(sglang.mapped[-1][4:], own[1][4:])  # and SGLang marks them itself, behind Lynx
    assert (given.topk_ids[4:] == -1).all()


@pytest.mark.parametrize("mode", [Mode.EXTEND, Mode.MIXED, Mode.SPLIT_PREFILL, Mode.TARGET_VERIFY])
def test_all_but_decode_is_the_routers_own(configured, mode, caplog):
    runner = configured().load({})
    for _ in range(2):
        with runner.step(mode, range(1, 7)):
            assert same(*route(runner, 6))
    left = [record.message for record in caplog.records if "left_exact" in record.message]
    assert left == (["lynx.steps_left_exact reason=steps in the mode TARGET_VERIFY"] if "V" in mode.name else [])
    assert same(*route(runner, 6))  # no step is under way


def test_exact_changes_nothing(configured):
    runner = configured("strategy: {name: exact}").load({}, {"renormalize": False})
    for layer in (0, 1):
        with runner.step(Mode.DECODE, range(1, 7)):
            assert same(*route(runner, 6, layer))


def test_slots_of_shared_experts_stay(configured):
    runner = configured().load({"num_shared_topk_slots": 1, "top_k": K + 1})
    with runner.step(Mode.DECODE, range(1, 7)):
        own, given = route(runner, 6)
    assert torch.equal(own[1][:, K:], given.topk_ids[:, K:])
    assert torch.equal(own[0][:, K:], given.topk_weights[:, K:])
    assert not torch.equal(own[1], given.topk_ids)


def test_drafts_with_the_same_layer_ids_stay(configured):
    sglang = configured()
    runner, draft = sglang.load({}), sglang.runner(sglang.build({}), is_draft_worker=True)
    draft.load_model()
    draft.init_cuda_graphs()
    with runner.step(Mode.DECODE, range(1, 7)):
        assert same(*route(draft, 6))
        assert not same(*route(runner, 6))


def test_the_handle_pauses_and_detaches(configured):
    runner = configured().load({})
    handle, config = lynx.handle_of(runner.model), runner.model["layers"][0].topk.topk_config
    with runner.step(Mode.DECODE, range(1, 7)):
        with handle.paused():
            assert same(*route(runner, 6))
        assert not same(*route(runner, 6))
        lynx.detach(runner.model)
        assert same(*route(runner, 6))
    assert vars(config).keys() == vars(TopKConfig()).keys()
    with pytest.raises(AttachError, match="teacher forcing"), lynx.attach(runner.model, "exact").teacher_forced(0):
        pass


def test_the_op_keeps_its_promises(configured):
    runner = configured().load({})
    logits = torch.randn(6, E)
    weights, ids = choose(logits, TopKConfig())
    number = getattr(runner.model["layers"][0].topk.topk_config, hook.NUMBER)
    with runner.step(Mode.DECODE, range(1, 7)):
        for bound in (None, torch.tensor(4)):
            torch.library.opcheck(torch.ops.lynx.sglang_select.default, (logits, weights, ids, bound, number))


@pytest.mark.parametrize("form", ["BYPASSED", "TRITON_KERNEL", "PACKED"])
def test_other_output_formats_are_refused(configured, form):
    words = rf"layer 'layers.1.topk' cannot be taken: .*\(output format {form}\); .*--moe-runner-backend \(triton"
    with pytest.raises(UnsupportedModelError, match=words):
        configured().load({}, {"output_format": Format[form]})


def test_what_cannot_be_taken_is_refused(configured):
    sglang = configured()
    with pytest.raises(UnsupportedModelError, match="chosen by token id"):
        sglang.load(sglang.HashTopK())
    with pytest.raises(UnsupportedModelError, match="no gate or router beside it"):
        sglang.load({"output_format": None}, gate=False)
    sglang.packs = True
    with pytest.raises(UnsupportedModelError, match="is packed before Lynx sees it"):
        sglang.load({})
    sglang.topk.select_experts = lambda **given: None
    with pytest.raises(UnsupportedModelError, match="does not pass _post_process_topk_ids"):
        sglang.load({})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: setattr(s.sglang, "__version__", "0.5.9.post1"), "SGLang 0.5.9.post1 is older than 0.5.23"),
        (lambda s: setattr(s.exec.deterministic, "enable_deterministic_inference", True), "--enable-deterministic"),
        (lambda s: setattr(s.parallel, "attn_dp_size", 2), "--attn-dp-size"),
    ],
)
def test_what_an_engine_must_not_be(configured, change, words):
    sglang = configured()
    change(sglang)
    with pytest.raises(UnsupportedModelError, match=words):
        sglang.load({})


@pytest.mark.parametrize(
    ("line", "words"),
    [("experts: lynx", "inside SGLang"), ("max_decode_q: 3", "max_decode_q=3"), ("layer: all", "layer")],
)
def test_configurations_that_mean_nothing_are_refused(configured, line, words):
    with pytest.raises(ConfigError, match=words):
        configured(f"strategy: {{name: exact}}\n{line}").load({})


def test_a_time_to_hold_is_refused(configured):
    """Nothing would time its steps."""
    with pytest.raises(ConfigError, match="steps are not timed"):
        configured("strategy: {name: target-active, share: 0.5}\ntpot_ms: 20").load({})


def test_layers_that_route_in_another_way_are_told(configured, caplog):
    sglang = configured()
    runner = sglang.load({}, {})
    with pytest.raises(UnsupportedModelError, match="no MoE layer of ModuleDict routes through"):
        runner.init_cuda_graphs()
    runner.init_cuda_graphs(partial(route, runner, 4))
    assert "lynx.layers_not_reached layers=1 first=layers.1.topk" in caplog.text


def test_logits_that_are_not_given_leave_the_step(configured, caplog):
    sglang = configured()
    runner = sglang.load({})
    own = choose(torch.randn(4, E), TopKConfig())
    with runner.step(Mode.DECODE, range(1, 5)):
        ids, weights, _ = sglang.topk._post_process_topk_ids(
            own[1].clone(), own[0], runner.model["layers"][0].topk.topk_config, torch.zeros(0, E), 0
        )
    assert same(own, Standard(weights, ids, None))
    assert "router logits are not given" in caplog.text


def test_a_model_that_was_loaded_in_another_way_is_told(configured, monkeypatch):
    sglang = configured()
    monkeypatch.setattr(hook, "hooks", [])
    runner = sglang.runner(sglang.build({}))
    assert same(*route(runner, 4))
    with runner.step(Mode.DECODE, range(1, 5)), pytest.raises(UnsupportedModelError, match="did not see loaded"):
        route(runner, 4)
