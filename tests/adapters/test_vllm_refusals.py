"""What the vLLM adapter refuses, leaves alone and says, on stand-ins."""

import logging
from types import SimpleNamespace

import pytest
import torch
from vllm_stand_in import Router, engine, route

import lynx
from lynx.adapters.vllm import hook, routers
from lynx.errors import AttachError, LynxError, UnsupportedModelError

UNION = {"lynx": {"strategy": {"name": "batch-union", "top": 1}}}
SIZES = {"top_k": 4, "global_num_experts": 16}


def test_a_draft_model_stays_as_it_is(vllm):
    vllm.config = engine(UNION)
    vllm.config.model_config = object()
    vllm.config.load = lambda: pytest.fail("attached") if vllm.said else torch.nn.Linear(1, 1)
    vllm.loader.BaseModelLoader().load_model(vllm.config, object())
    assert vllm.said == []


def test_a_draft_of_the_engines_own_configuration_stays_too(vllm):
    """vLLM gives a draft a configuration in which it is the model."""
    vllm.config = engine(UNION)
    vllm.config.speculative_config = SimpleNamespace(draft_model_config=vllm.config.model_config)
    model = vllm.load(SIZES)
    assert vllm.said == []
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        (_, ids), (_, new_ids) = route(model["experts"][0], 4)
    assert torch.equal(new_ids, ids)


def test_a_model_that_was_loaded_past_lynx_is_told(vllm):
    vllm.config = engine(UNION)
    router = vllm.layer.create_fused_moe_router(**SIZES)
    logits = torch.randn(4, 16)
    router._compute_routing(None, logits, None)  # while memory is measured
    vllm.context = SimpleNamespace(attn_metadata={})
    with pytest.raises(UnsupportedModelError, match="--load-format"):
        router._compute_routing(None, logits, None)


def test_routers_that_cannot_be_asked_are_refused_by_name(vllm):
    class Hashed(Router):
        def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
            assert input_ids is not None
            return super()._compute_routing(hidden_states, router_logits, indices_type)

    vllm.config = engine(UNION)
    with pytest.raises(UnsupportedModelError, match=r"layer 'experts.0' cannot be taken: .*could not be asked"):
        vllm.load(SIZES | {"kind": Hashed})


def test_events_are_heard_where_vllm_logs(vllm, monkeypatch):
    mine, own = logging.NullHandler(), logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [mine])
    monkeypatch.setattr(logging.getLogger("lynx"), "handlers", [logging.NullHandler()])
    vllm.config = engine(UNION)
    for root, heard in ([own], False), ([], True):  # what the root logger hears is not said twice
        monkeypatch.setattr(logging.getLogger(), "handlers", root)
        vllm.load(SIZES)
        assert (mine in logging.getLogger("lynx").handlers) == heard


def test_what_was_taken_out_is_kept_for_captured_graphs(vllm):
    vllm.config = engine(UNION)
    model = vllm.load(SIZES)
    before = hook.hooks[model["experts"][0].router.lynx_number]
    lynx.detach(model)
    assert before in hook.retired


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: setattr(v.vllm, "__version__", "0.29.1"), "vLLM 0.29.1 is older than 0.30"),
        (lambda v: setattr(v.platform, "is_out_of_tree", lambda: True), "platform"),
        (lambda v: setattr(v.envs, "VLLM_BATCH_INVARIANT", True), "VLLM_BATCH_INVARIANT"),
        (lambda v: setattr(v.config.parallel_config, "data_parallel_size", 2), "data parallelism"),
        (lambda v: setattr(v.config.parallel_config, "use_sequence_parallel_moe", True), "sequence-parallel"),
        (lambda v: setattr(v.config.cache_config, "kv_sharing_fast_prefill", True), "--kv-sharing-fast-prefill"),
        (lambda v: v.config.additional_config.update(decode_backend="latency_specialized"), "`decode_backend`"),
        (lambda v: setattr(v.envs, "VLLM_ROCM_MONO_DECODE", True), "VLLM_ROCM_MONO_DECODE"),
        (lambda v: setattr(v.config.parallel_config, "enable_dbo", True), "--enable-dbo"),
        (lambda v: setattr(v.config.parallel_config, "prefill_context_parallel_size", 2), "context parallelism"),
        (lambda v: setattr(v.config.parallel_config, "pipeline_parallel_size", 2), "pipeline parallelism"),
        (lambda v: setattr(v.config.model_config, "enable_sleep_mode", True), "--enable-sleep-mode"),
    ],
)
def test_what_an_engine_must_not_be(vllm, change, words):
    vllm.config = engine(dict(UNION))
    change(vllm)
    with pytest.raises(UnsupportedModelError, match=words):
        vllm.load(SIZES)


def test_kernels_that_route_by_themselves_are_refused(vllm):
    vllm.config = engine(UNION)
    with pytest.raises(LynxError, match=r"layer 'experts.0' cannot be taken: .* routes by itself; .*--moe-backend"):
        vllm.load(SIZES, monolithic=True)
    assert vllm.said == []


@pytest.mark.parametrize(("second", "name"), [(False, "_prepare_inputs"), (True, "prepare_inputs")])
def test_a_runner_of_another_kind_is_refused(vllm, second, name):
    vllm.config = engine(UNION)
    vllm.config.use_v2_model_runner = second
    delattr(vllm.modules[second].GPUModelRunner, name)
    with pytest.raises(UnsupportedModelError, match=rf"no {name}\(\)"):
        vllm.load(SIZES)


def test_a_part_of_a_model_cannot_be_attached(vllm):
    vllm.config = engine(UNION)
    model = vllm.load(SIZES)
    with pytest.raises(AttachError, match="not a model as vLLM loaded it"):
        lynx.attach(model["experts"], "exact")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda layer: setattr(layer.moe_config, "is_sequence_parallel", True), "sequence parallelism"),
        (lambda layer: delattr(layer, "moe_config"), "not one of vLLM's usual MoE layers"),
        (lambda layer: delattr(layer, "is_monolithic"), "not one of vLLM's usual MoE layers"),
    ],
)
def test_layers_of_another_kind_are_refused(vllm, change, words):
    vllm.config = engine(UNION)
    model = vllm.load(SIZES)
    change(model["experts"][0])
    with pytest.raises(UnsupportedModelError, match=words):
        lynx.attach(model, "exact")


def test_a_router_of_another_kind_is_refused(vllm):
    class New(Router):
        def _compute_routing(self, hidden_states, router_logits):
            return None

    with pytest.raises(UnsupportedModelError, match=r"New routes by _compute_routing\(hidden_states, router_logits\)"):
        routers.make_room(New(**SIZES))


def test_a_model_without_moe_layers_is_refused(vllm):
    vllm.config = engine(UNION)
    with pytest.raises(UnsupportedModelError, match="no adapter takes"):
        vllm.load()


def test_kernels_are_told_that_the_routing_is_not_one_they_know(vllm):
    vllm.config = engine(UNION)
    router = vllm.load(SIZES)["experts"][0].router
    assert router.routing_method_type.name == "Custom"
    assert router.supports_monolithic_kernels is False
    assert isinstance(router, Router)
