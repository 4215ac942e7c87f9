"""The steps that vLLM runs, on stand-ins: whose rows they are, what is captured, what is left alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm_stand_in import CUDAGraphMode, Router, engine, route

import lynx
from lynx.adapters.vllm.hook import hooks
from lynx.adapters.vllm.requests import wish
from lynx.adapters.vllm.rows import Requests, StepRows
from lynx.adapters.vllm.runner import watched
from lynx.errors import AttachError
from lynx.routing import Phase, Role, Routing
from lynx.selection import LayerSelection

PADDING, EXACT, OPEN = int(Role.PADDING), int(Role.EXACT), int(Role.OPEN)
PREFILL, DECODE = int(Phase.PREFILL), int(Phase.DECODE)
UNION = {"lynx": {"strategy": {"name": "batch-union", "top": 1}}}
SIZES = {"top_k": 4, "global_num_experts": 16}


def written(query, computed, prompts, exact, max_decode_q=1):
    rows = StepRows(8, torch.device("cpu"), max_decode_q)
    rows.write(Requests(*(np.array(column) for column in (query, computed, prompts, exact))))
    role, phase = rows.read(8)
    assert role.dtype == phase.dtype == torch.int8
    return role.tolist(), phase.tolist(), rows.deciding


def test_rows_of_a_mixed_batch():
    """A prompt of 3, a decode step, a prompt of 1, the last token of a split prompt, a decode step; then padding."""
    role, phase, deciding = written([3, 1, 1, 1, 1], [0, 9, 0, 6, 6], [3, 4, 1, 7, 6], [False] * 5)
    assert role == [OPEN] * 7 + [PADDING]
    assert phase[:7] == [PREFILL] * 3 + [DECODE, PREFILL, PREFILL, DECODE]
    assert deciding


def test_rows_of_speculation_and_of_exact_requests():
    verify = ([3, 1], [6, 4], [5, 4])
    role, phase, deciding = written(*verify, [False, False])
    assert (role[:4], phase[:4], deciding) == ([EXACT] * 3 + [OPEN], [DECODE] * 4, True)
    role, phase, deciding = written(*verify, [False, True], max_decode_q=3)
    assert phase[:4] == [DECODE] * 4
    assert role[:5] == [OPEN, OPEN, OPEN, EXACT, PADDING]
    assert deciding
    assert not written(*verify, [True, True], max_decode_q=3)[2]
    assert not written([3, 2], [0, 1], [3, 5], [False, False])[2]


def test_a_step_leaves_nothing_of_the_one_before():
    rows = StepRows(8, torch.device("cpu"))
    place = rows.kinds.data_ptr()
    for count in (6, 2):
        rows.write(Requests(*(np.array([value] * count) for value in (1, 5, 2, True))))
    assert rows.kinds.tolist() == [[EXACT] * 2 + [PADDING] * 6, [DECODE] * 2 + [PREFILL] * 6]
    assert rows.kinds.data_ptr() == place  # captured graphs read it
    assert rows.read(9) is None


@pytest.mark.parametrize("mode", list(CUDAGraphMode))
def test_a_step_without_decode_is_only_counted_unless_a_graph_is_captured(vllm, mode, monkeypatch):
    """What is captured in such a step will serve others."""
    vllm.config = engine(UNION)
    model = vllm.load(SIZES)
    seen = []
    monkeypatch.setattr(LayerSelection, "observe", lambda self, routing: seen.append(routing))
    with vllm.step([0, 3, 6], [3, 3], mode):
        (_, ids), (_, new_ids) = route(model["experts"][0], 6)
    assert torch.equal(new_ids, ids)
    assert bool(seen) == (mode is CUDAGraphMode.NONE)


def test_more_rows_than_vllm_said_are_left_alone_and_say_so_once(vllm, caplog):
    vllm.config = engine(UNION)
    layer = vllm.load(SIZES)["experts"][0]
    for _ in range(2):
        with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
            (_, ids), (_, new_ids) = route(layer, 33)
        assert torch.equal(new_ids, ids)
    assert [record.message for record in caplog.records if "left_exact" in record.message] == [
        "lynx.steps_left_exact reason=a step of 33 rows, more than vLLM said there are"
    ]


def test_before_the_first_step_all_rows_are_padding(vllm):
    """Memory is measured, kernels are warmed up and graphs are captured: all of it runs, and nothing of it counts."""
    vllm.config = engine(UNION)
    model = vllm.load(SIZES)
    vllm.context = SimpleNamespace(attn_metadata=None, cudagraph_runtime_mode=CUDAGraphMode.NONE)
    (weights, ids), (new_weights, new_ids) = route(model["experts"][0], 6)
    assert torch.equal(new_ids, ids)
    assert torch.equal(new_weights, weights)
    assert lynx.handle_of(model).report().layers[0].phases["decode"].steps == 0


def test_layers_that_see_a_part_of_the_rows_are_left_alone(vllm, caplog):
    """As where text and images have experts of their own: whose rows they are is not known."""
    vllm.config = engine(UNION)
    layer = vllm.load(SIZES)["experts"][0]
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        (_, ids), (_, new_ids) = route(layer, 3)
    assert torch.equal(new_ids, ids)
    assert "layers that see a part of a step's rows" in caplog.text


@pytest.mark.parametrize("second", [False, True], ids=["first runner", "second runner"])
def test_what_vllm_runs_to_warm_up_is_not_ours(vllm, second):
    """Steps of its own making go through the runner like others."""
    vllm.config = engine(UNION)
    vllm.config.use_v2_model_runner = second
    model = vllm.load(SIZES)

    def work():
        with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
            (_, ids), (_, new_ids) = route(model["experts"][0], 4)
        assert torch.equal(new_ids, ids)
        vllm.runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=4))
        return "warm"

    vllm.worker.work = work
    assert vllm.worker.compile_or_warm_up_model() == "warm"
    assert lynx.handle_of(model).report().layers[0].phases["decode"].steps == 0
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        (_, ids), (_, new_ids) = route(model["experts"][0], 4)
    assert not torch.equal(new_ids, ids)


def test_what_was_captured_sees_padding_once_lynx_is_off(vllm):
    """Graphs go on calling the old hooks, and vLLM on preparing steps."""
    vllm.config = engine(UNION)
    model = vllm.load(SIZES)
    hook = hooks[model["experts"][0].router.lynx_number]
    logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weights, ids = Router._compute_routing(model["experts"][0].router, None, logits, None)
    handle = lynx.handle_of(model)
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        assert not torch.equal(hook.selection(routing(hook, logits, weights, ids)).ids, ids)
        handle.detach()
        assert torch.equal(hook.selection(routing(hook, logits, weights, ids)).ids, ids)
    with vllm.step([0, 1, 2, 3, 4], [9, 9, 9, 9]):
        assert torch.equal(hook.selection(routing(hook, logits, weights, ids)).ids, ids)


def routing(hook, logits, weights, ids):
    role, phase = hook.rows.read(4)
    return Routing(logits, logits, ids, weights, role, phase, hook.rule)


def test_an_engine_that_compiles_on_a_cpu_takes_no_other_strategy(vllm):
    """Its code has no guards, and calls the hooks of its start for ever."""
    vllm.config = engine(UNION)
    vllm.config.compilation_config.mode = 3
    model = vllm.load(SIZES)
    handle = lynx.handle_of(model)
    with pytest.raises(AttachError, match="compiled its model and goes on calling"):
        lynx.attach(model, "exact")
    assert lynx.handle_of(model) is handle


def test_an_engine_with_captured_graphs_takes_no_other_strategy(vllm):
    vllm.config = engine(UNION)
    vllm.config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    model = vllm.load(SIZES)
    vllm.worker.work = lambda: None
    vllm.worker.compile_or_warm_up_model()
    with pytest.raises(AttachError, match="captured CUDA graphs"):
        lynx.attach(model, "exact")
    lynx.detach(model)


def test_a_runner_that_goes_its_own_way_is_told(vllm, caplog):
    vllm.config = engine(UNION)
    vllm.load(SIZES)
    for _ in range(2):
        vllm.runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=4))
    assert caplog.text.count("prepares its steps in a way of its own") == 1


@pytest.mark.parametrize("second", [False, True], ids=["first runner", "second runner"])
def test_requests_that_ask_for_exact_routing(vllm, second, caplog):
    vllm.config = engine(UNION)
    vllm.config.use_v2_model_runner = second
    model = vllm.load(SIZES)
    layer, runner = model["experts"][0], vllm.runner
    wishes = [None, {"lynx": "exact"}, {"other": 1}, {"lynx": "exakt"}]
    assert vllm.prepare([3, 3, 3, 3], [0] * 4, [3] * 4, wishes) == (runner.batch if second else "prepared")
    assert "request_not_understood" in caplog.text  # and is left exact, to be on the safe side
    with vllm.step([0, 1, 2, 3, 4], [4, 4, 4, 4]):
        assert watched[model].rows.kinds[0, :5].tolist() == [OPEN, EXACT, OPEN, EXACT, PADDING]
        (weights, ids), (new_weights, new_ids) = route(layer, 4)
    assert torch.equal(new_ids[[1, 3]], ids[[1, 3]])
    assert torch.equal(new_weights[[1, 3]], weights[[1, 3]])
    assert not torch.equal(new_ids, ids)
    vllm.prepare([1], [4], [3])  # the others are gone; one of the names comes again, and asks for nothing
    vllm.prepare([3, 3], [0] * 2, [3] * 2, [None, None])
    assert watched[model].rows.kinds[0].tolist() == [OPEN] * 6 + [PADDING] * 26


@pytest.mark.parametrize("second", [False, True], ids=["first runner", "second runner"])
def test_requests_with_a_priority(vllm, second, monkeypatch):
    vllm.config = engine({"lynx": {"strategy": {"name": "top-budget", "budget": 1, "protect": 0}}})
    vllm.config.use_v2_model_runner = second
    model = vllm.load(SIZES)
    rows, place = watched[model].rows, watched[model].rows.votes.data_ptr()
    seen, keep = [], lynx.SelectionStrategy.keep
    monkeypatch.setattr(
        lynx.SelectionStrategy, "keep", lambda self, routing: (seen.append(routing), keep(self, routing))[1]
    )
    wishes = [{"lynx": {"priority": 2.5}}, None, {"lynx": 0.5}, {"lynx": {"priority": "exact"}}]
    vllm.prepare([3, 3, 3, 3], [0] * 4, [3] * 4, wishes)
    assert rows.votes[:13].tolist() == [2.5] * 3 + [1.0] * 3 + [0.5] * 3 + [1.0] * 4
    assert rows.kinds[0, 9:12].tolist() == [EXACT] * 3
    with vllm.step([0, 1, 2, 3, 4], [4, 4, 4, 4]):
        assert rows.kinds[0, :5].tolist() == [OPEN, OPEN, OPEN, EXACT, PADDING]
        route(model["experts"][0], 5)
    assert seen[0].priority[:5].tolist() == [2.5, 1.0, 0.5, 1.0, 1.0]
    vllm.prepare([1], [4], [3])  # the others are gone: so are their votes
    vllm.prepare([3, 3], [0] * 2, [3] * 2, [None, None])
    assert rows.votes.tolist() == [1.0] * 32
    assert rows.votes.data_ptr() == place  # captured graphs read it


@pytest.mark.parametrize("word", [0, -1, True, 1000, float("nan"), {"priority": 0}, {"prioritaet": 2}, {}, [2]])
def test_what_is_no_priority_is_exact_and_told(word, caplog):
    request = SimpleNamespace(req_id="a", sampling_params=SimpleNamespace(extra_args={"lynx": word}))
    assert wish(request) is None
    assert "request_not_understood" in caplog.text


def test_drafts_that_the_device_shares_out_are_exact(vllm):
    """Then the host does not know whose row is whose."""
    vllm.config = engine(UNION)
    vllm.config.use_v2_model_runner = True
    model = vllm.load(SIZES)
    vllm.runner.adaptive_verification = object()
    for drafts, role in (({}, OPEN), ({"request 0": [5]}, EXACT)):
        vllm.prepare([1, 1], [4, 4], [3, 3], drafts=drafts)
        assert watched[model].rows.kinds[0, :2].tolist() == [role] * 2


def test_a_model_inside_another_one_is_found(vllm):
    """As where adapters of LoRA are put around it after it was loaded."""
    vllm.config = engine(UNION)
    model = vllm.load(SIZES)
    vllm.runner.model = torch.nn.ModuleDict({"inner": model})
    vllm.prepare([1, 1], [4, 4], [3, 3])
    assert watched[model].rows.kinds[0, :3].tolist() == [OPEN, OPEN, PADDING]
    vllm.runner.model = torch.nn.Linear(1, 1)  # another model's steps are not ours
    vllm.prepare([1], [4], [3])
    assert watched[model].rows.kinds[0, :3].tolist() == [OPEN, OPEN, PADDING]


HELD = {"lynx": {"strategy": {"name": "target-active", "share": 0.5}, "tpot_ms": 1000}}


@pytest.mark.parametrize("second", [False, True], ids=["first runner", "second runner"])
def test_a_time_is_held_from_the_configuration_alone(vllm, second):
    """Steps that bring every request one token are timed, from one to the next; others are a break."""
    vllm.config = engine(HELD)
    vllm.config.use_v2_model_runner = second
    model = vllm.load(SIZES)
    handle, now = lynx.handle_of(model), [0.0]
    handle.tpot._clock = lambda: now[0]
    steps = []

    def step(seconds, query=(1, 1, 1, 1), prompts=(1, 1, 1, 1), wishes=()):
        vllm.prepare(list(query), [6] * len(query), list(prompts), wishes)
        now[0] += seconds
        steps.append(handle.tpot.steps)

    step(0.5)
    step(0.5)
    step(0.5, query=[3, 1], prompts=[9, 1])  # a prefill is in it
    step(0.5)
    step(0.5)
    step(0.5, query=[2, 1], prompts=[1, 1])  # drafts are verified
    step(0.5)
    with handle.paused():
        step(0.5)
        step(0.5)
    step(0.5)
    step(0.5, wishes=[{"lynx": "exact"}] * 3)  # one row is open, which selects nothing
    step(9.0, query=[1], prompts=[1])
    step(0.5, wishes=[{}] * 3)
    assert steps == [0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3]
    for _ in range(60):
        step(0.5)
    state = handle._selections[0].bound.state
    assert (handle.tpot.position, state[4].item()) == (1.0, 1.0)
    lynx.detach(model)
    assert watched[model].tpot is None


def test_a_time_is_not_held_on_several_ranks(vllm):
    """Each has its own clock, and all must choose the same experts."""
    vllm.config = engine(HELD, tensor_parallel_size=2)
    with pytest.raises(lynx.ConfigError, match="tpot_ms cannot hold a time under tensor parallelism"):
        vllm.load(SIZES)
