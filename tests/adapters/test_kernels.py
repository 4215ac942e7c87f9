"""The whole decode step on Lynx's kernels: selection, plan and experts, inside models of transformers."""

import logging

import families
import pytest
import torch
from torch._dynamo import lookup_backend
from transformers import StaticCache

import lynx
import lynx.adapters.transformers.experts as experts_room
import lynx.kernels.experts as kernels_experts
import lynx.kernels.fused.launch as launch
import lynx.kernels.fused.layer as layer
from lynx.demo.cache import as_argument
from lynx.errors import ConfigError
from lynx.handle import Handle
from lynx.kernels import backends, make_plan

pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
BUDGET = {"name": "top-budget", "budget": 3, "protect": 0}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["mixtral", "gpt_oss", "deepseek_v3"]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    monkeypatch.setenv("LYNX_KERNELS", "triton")


def on_device(model, batch, tokens):
    """Move a model and what it is fed to the GPU, where there is one."""
    return model.to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in batch.items()}, tokens.to(DEVICE)


@pytest.fixture
def plans(monkeypatch):
    """For every call of the kernels' layer, whether the plan came from the router's own launch."""
    seen = []

    def run(hidden, ids, weights, experts, plan, *rest):
        seen.append((len(hidden), plan is not None))
        return original(hidden, ids, weights, experts, plan, *rest)

    original = layer.run_fused
    monkeypatch.setattr(layer, "run_fused", run)
    return seen


def selections(handle: Handle):
    return handle._selections


@pytest.mark.parametrize("name", KINDS)
def test_decode_steps_equal_those_in_torch(name, plans, monkeypatch):
    """Every step's logits agree with selection and experts in torch; the plan is made once, by the route kernel."""
    model, batch, tokens = on_device(families.build(name), families.prompts(), families.new_tokens(columns=2))
    with lynx.attach(model, BUDGET, experts="lynx") as handle:
        found = families.stepwise(model, batch, tokens)
        mine = handle.report().total["decode"]
    assert plans
    decode_rows = tokens.shape[0]
    assert all(planned for rows, planned in plans if rows == decode_rows)
    assert any(rows == decode_rows for rows, _ in plans)
    monkeypatch.setenv("LYNX_KERNELS", "loop")
    with lynx.attach(model, BUDGET, experts="lynx") as handle:
        expected = families.stepwise(model, batch, tokens)
        theirs = handle.report().total["decode"]
    assert mine.active_after < mine.active_before
    for field in ("steps", "open_rows", "active_before", "active_after", "rows_changed"):
        assert getattr(mine, field) == getattr(theirs, field), field
    torch.testing.assert_close(found.decode, expected.decode, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(found.prefill, expected.prefill, rtol=2e-4, atol=2e-4)


def test_the_step_compiles_whole_with_a_static_cache(plans):
    """No graph break: selection, plan and experts are opaque operations of one graph, and the plan is the router's."""
    model = families.build("mixtral", num_hidden_layers=1)
    model, batch, tokens = on_device(model, families.prompts(columns=3), families.new_tokens(columns=2))
    reports, outputs, operations = [], [], set()

    def kept(graph, inputs):
        operations.update(str(node.target).removesuffix(".default") for node in graph.graph.nodes)
        return lookup_backend("aot_eager")(graph, inputs)

    for compiled in (False, True):
        cached = as_argument(StaticCache(config=model.config, max_cache_len=16), model)
        step = torch.compile(model.forward, backend=kept, fullgraph=True) if compiled else model.forward
        with torch.no_grad(), lynx.attach(model, BUDGET, experts="lynx") as handle:
            mask = batch["attention_mask"]
            model(**batch, **cached, use_cache=True)
            for column in tokens.T:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
                output = step(input_ids=column[:, None], attention_mask=mask, **cached, use_cache=True)
            outputs.append(output.logits)
            reports.append(handle.report().total["decode"])
    assert reports[0].active_after < reports[0].active_before
    for field in ("steps", "open_rows", "active_before", "active_after", "rows_changed"):
        assert getattr(reports[1], field) == getattr(reports[0], field), field
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert {name for name in operations if name.startswith("lynx")} == {"lynx.route", "lynx.gate_up", "lynx.down"}
    torch.compiler.reset()


@pytest.mark.parametrize(("rows", "planned"), [(3, True), (4, False)])
def test_a_plan_for_other_experts_is_not_handed_over(plans, rows, planned):
    """A router may know experts that the module does not have."""
    model, _, _ = on_device(families.build("mixtral"), families.prompts(), torch.zeros(0))
    with torch.no_grad(), lynx.attach(model, BUDGET, experts="lynx"):
        experts = model.model.layers[0].mlp.experts
        hidden = torch.randn(2, model.config.hidden_size, device=DEVICE)
        ids, weights = torch.tensor([[0, 1], [1, 2]], device=DEVICE), torch.full((2, 2), 0.5, device=DEVICE)
        expected = experts(hidden, ids, weights)
        experts._lynx_seat.give(ids, make_plan(ids, weights, len(experts.down_proj) - 3 + rows))
        assert torch.equal(experts(hidden, ids, weights), expected)
        assert experts._lynx_seat.given is None
    assert [given for _, given in plans] == [False, planned]


def test_generate_runs_on_the_kernels(plans):
    model, batch, _ = on_device(families.build("mixtral"), families.prompts(), torch.zeros(0))
    plain = families.generate(model, batch, max_new_tokens=3)
    with lynx.attach(model, "exact", experts="lynx") as handle:
        tokens = families.generate(model, batch, max_new_tokens=3)
        assert handle.report().total["decode"].steps > 0
    assert torch.equal(tokens.sequences, plain.sequences)
    assert any(planned for _, planned in plans)


def test_asking_for_what_cannot_run_is_refused_at_attach(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model = families.build("mixtral")  # on the CPU, whatever else there is
    before = families.footprint(model)
    with pytest.raises(ConfigError, match="LYNX_KERNELS"):
        lynx.attach(model, BUDGET, experts="lynx")
    with pytest.raises(ConfigError, match="LYNX_KERNELS"):
        lynx.attach(model, BUDGET)
    assert families.footprint(model) == before
    # where selection is in torch in any case, and experts="auto" comes to Lynx's
    model.set_experts_implementation("batched_mm")
    with pytest.raises(ConfigError, match="LYNX_KERNELS='triton' cannot run these experts: the kernels need a GPU"):
        lynx.attach(model, "affinity-binning", budget=3)


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine on which Triton cannot compile."""

    def fail(*_):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(backends, "_trials", {})
    monkeypatch.setattr(launch, "plan", fail)


def test_kernels_that_fail_to_launch_are_refused_at_attach_if_asked_for(no_compiler):
    model, _, _ = on_device(families.build("mixtral"), families.prompts(), torch.zeros(0))
    before = families.footprint(model)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"LYNX_KERNELS='triton' .*: a first launch on .* find C compiler"):
            lynx.attach(model, BUDGET, experts="lynx")
    assert families.footprint(model) == before


def test_kernels_that_fail_to_launch_are_left_for_torch(no_compiler, plans, monkeypatch, caplog):
    def as_on_a_card(experts, tokens=None):
        reason = backends.why_not("triton", experts, tokens)
        return backends.BackendChoice("loop", reason) if reason else backends.BackendChoice("triton", "")

    monkeypatch.setattr(experts_room, "choose_backend", as_on_a_card)
    monkeypatch.setattr(kernels_experts, "choose_backend", as_on_a_card)
    monkeypatch.setenv("LYNX_KERNELS", "auto")
    model, batch, _ = on_device(families.build("mixtral"), families.prompts(), torch.zeros(0))
    with caplog.at_level(logging.ERROR, "lynx"):
        with pytest.warns(lynx.LynxWarning, match="cannot run: a first launch on .* C compiler") as told:
            handle = lynx.attach(model, BUDGET, experts="lynx")
        with handle, torch.no_grad():
            model(**batch)
        lynx.attach(model, BUDGET, experts="lynx").detach()  # is not told again
    assert len(told) == 1
    assert [record.message.split()[0] for record in caplog.records] == ["lynx.kernel_failed"]
    assert (handle.experts, handle.experts_backend) == ("lynx", "loop")
    assert not plans


@pytest.mark.parametrize("experts", ["lynx", "model"])
def test_the_handle_names_the_backend(experts):
    model, _, _ = on_device(families.build("mixtral"), families.prompts(), torch.zeros(0))
    with lynx.attach(model, BUDGET, experts=experts) as handle:
        assert handle.experts_backend == {"lynx": "triton", "model": ""}[experts]


def test_offloaded_experts_say_nothing_at_attach(plans):
    """Their weights are on no device until their forward; whether kernels run them is found then."""
    model, batch, _ = on_device(families.build("mixtral"), families.prompts(), torch.zeros(0))
    plain = model(**batch).logits
    for layer_ in model.model.layers:
        experts = layer_.mlp.experts
        kept = {name: parameter.data for name, parameter in experts.named_parameters()}
        experts.to("meta")

        def come(module, args, kept=kept):
            for name, value in kept.items():
                setattr(module, name, torch.nn.Parameter(value))

        experts.register_forward_pre_hook(come)
        experts.register_forward_hook(lambda module, args, output: module.to("meta") and None)
    with lynx.attach(model, "exact", experts="lynx") as handle, torch.no_grad():
        assert handle.experts_backend == ""
        torch.testing.assert_close(model(**batch).logits, plain, rtol=1e-4, atol=1e-4)
    assert plans
