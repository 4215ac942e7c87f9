"""Selection's way to the route kernel: what is fused, what is refused, and how it behaves inside a program."""

import dataclasses
import warnings

import pytest
import torch
from cases import launched_with
from hypothesis import given, settings
from hypothesis import strategies as st

import lynx
import lynx.kernels.fused.launch_route as launch
from lynx.counters import Counters
from lynx.errors import ConfigError, LynxWarning
from lynx.fusion import FusedRoute
from lynx.kernels import Plan
from lynx.kernels import route as room
from lynx.kernels.route import Routed, RouteRule, RouteSettings, route
from lynx.rerouting import own_top_k
from lynx.routing import Phase, Role, Routing, WeightRule
from lynx.selection import LayerSelection
from lynx.strategies.batch_union import BatchUnion
from lynx.strategies.top_budget import TopBudget
from lynx.strategy import LayerInfo
from lynx.testing import make_routing

pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEVICE_OF_TENSORS = torch.zeros(0, device=DEVICE).device
INFO = LayerInfo("layer", 0, 16, 4, WeightRule())
IN_TORCH = {
    "affinity-binning": "affinity-binning selects in torch",
    "pooled-threshold": "pooled-threshold keeps by pooled mass, which the kernel does not",
    "target-active": "target-active is no single strategy with a keep rule",
    "by-batch-size": "by-batch-size is no single strategy with a keep rule",
}


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    monkeypatch.setenv("LYNX_KERNELS", "triton")


def placed(strategy, info=INFO, min_tokens=2):
    selection = LayerSelection(info, strategy, min_tokens)
    selection.place(DEVICE)
    return selection


def tensors(routing):
    names = ("choice", "logits", "ids", "weights", "role", "phase")
    return tuple(getattr(routing, name).to(DEVICE) for name in names)


def test_rules_survive_the_way_into_a_custom_op():
    for rule in (RouteRule(), RouteRule("sigmoid", False, False, False, False, True, True, True, True, True, "count")):
        assert RouteRule.decode(rule.encode()) == rule
        assert all(type(number) is int for number in rule.encode())


@pytest.mark.parametrize("name", sorted(lynx.plugins.registry().strategies))
def test_which_strategies_are_fused(name):
    selection = placed(lynx.plugins.registry().strategies[name].cls.example())
    assert selection.why_not_fused == IN_TORCH.get(name, "")
    assert isinstance(selection.fused, FusedRoute) == (name not in IN_TORCH)


def test_settings_are_one_tensor_in_the_kernels_order():
    from lynx.kernels.fused import rows

    numbers = RouteSettings(*range(12)).tensor(DEVICE).tolist()
    for name in (
        "RANK",
        "RATIO",
        "MASS",
        "BUDGET",
        "DROP",
        "DEMAND_PROTECT",
        "PROTECT",
        "MIN_TOKENS",
        "SCALE",
        "COVER",
    ):
        field = [each.name for each in dataclasses.fields(RouteSettings)].index(name.lower())
        assert numbers[getattr(rows, name).value] == field
    assert (rows.ON_PREFILL.value, rows.ON_DECODE.value) == (8, 9)


@settings(max_examples=12, deadline=None)
@given(
    score=st.sampled_from(["softmax", "sigmoid", "sqrt_softplus", "softmax_over_chosen"]),
    renormalise=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    T=st.integers(1, 9),
    shape=st.sampled_from([(4, 1), (4, 4), (24, 5), (64, 8)]),
    seed=st.integers(0, 10**6),
    coarse=st.booleans(),
    two_launches=st.booleans(),
)
def test_finds_the_own_top_k(score, renormalise, scale, T, shape, seed, coarse, two_launches):
    (E, k), generator = shape, torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator) * 3
    logits = logits.round() if coarse else logits
    choice = logits + torch.randn(E, generator=generator).round()
    choice[:, : E // 4] = -torch.inf
    if k > E - E // 4:
        choice = logits.clone()
    weight_rule = WeightRule(score, renormalise, scale)
    ids, weights = own_top_k(choice, logits, k, weight_rule)
    rule = RouteRule(score=score, renormalise=renormalise, by_demand=True)
    numbers = RouteSettings(budget=float(E // 2), scale=scale).tensor(DEVICE)
    role = torch.full((T,), int(Role.OPEN), dtype=torch.int8)
    phase = torch.full((T,), int(Phase.DECODE), dtype=torch.int8)
    inputs = [tensor.to(DEVICE) for tensor in (choice, logits, role, phase)]
    with launched_with({"BT": 4, "PART": 4} if two_launches else {}):
        found = route(*inputs, rule, numbers, Counters().on(DEVICE), top_k=k)
    assert torch.equal(found.own_ids.cpu(), ids)
    torch.testing.assert_close(found.own_weights.cpu(), weights, rtol=2e-6, atol=1e-7)
    # from its own top-k on, the kernel does as it does with a router's
    again = route(*inputs, rule, numbers, Counters().on(DEVICE), top_k=k, ids=found.own_ids, weights=found.own_weights)
    assert torch.equal(found.ids, again.ids)
    assert torch.equal(found.weights, again.weights)
    assert torch.equal(found.plan.buffer, again.plan.buffer)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_own_top_k_of_scores_that_are_not_finite(bad):
    """They rank first, as in torch, so that the same experts are woken; selection leaves such a row as it is."""
    choice, logits, _, _, role, phase = tensors(make_routing(tokens=4, experts=16, top_k=4))
    choice[0, 5], choice[1] = bad, bad
    rule, numbers = RouteRule(by_demand=True), RouteSettings(budget=2.0).tensor(DEVICE)
    found = route(choice, logits, role, phase, rule, numbers, Counters().on(DEVICE), top_k=4)
    ids, _ = own_top_k(choice.cpu(), logits.cpu(), 4, WeightRule())
    assert torch.equal(found.own_ids.cpu(), ids)
    assert torch.equal(found.ids[:2], found.own_ids[:2])


def test_an_empty_batch():
    empty = make_routing(tokens=1, experts=16, top_k=4)
    choice, logits, ids, weights, role, phase = (tensor[:0] for tensor in tensors(empty))
    counters = Counters()
    numbers = RouteSettings().tensor(DEVICE)
    done = route(
        choice, logits, role, phase, RouteRule(by_rank=True), numbers, counters.on(DEVICE),
        top_k=4, ids=ids, weights=weights,
    )  # fmt: skip
    assert isinstance(done, Routed)
    assert done.ids.shape == (0, 4)
    assert done.plan.count.item() == 0
    assert done.plan.offsets.tolist() == [0] * 17
    assert counters.read()[Phase.DECODE].steps == 0


def test_wrong_arguments_are_told():
    choice, logits, ids, _, role, phase = tensors(make_routing(tokens=4, experts=16, top_k=4))
    common = (RouteRule(), RouteSettings().tensor(DEVICE), Counters().on(DEVICE))
    with pytest.raises(ValueError, match="both"):
        route(choice, logits, role, phase, *common, top_k=4, ids=ids)
    with pytest.raises(ValueError, match=r"ids is \(4, 4\), must be \(4, 3\)"):
        route(choice, logits, role, phase, *common, top_k=3, ids=ids, weights=ids.float())
    with pytest.raises(ValueError, match=r"logits is \(4, 15\), must be \(4, 16\)"):
        route(choice, logits[:, 1:], role, phase, *common, top_k=4)
    with pytest.raises(ValueError, match=r"must be float32, not torch\.float64"):
        route(choice.double(), logits, role, phase, *common, top_k=4)
    many = torch.zeros(1025, 16, device=DEVICE)
    with pytest.raises(ValueError, match="up to 1024 tokens, got 1025"):
        route(many, many, role, phase, *common, top_k=4)


def test_layers_too_large_stay_with_torch(monkeypatch):
    monkeypatch.delenv("LYNX_KERNELS")
    assert "up to 512 experts" in placed(BatchUnion(), LayerInfo("a", 0, 513, 4, WeightRule())).why_not_fused
    assert "up to 16 slots" in placed(BatchUnion(), LayerInfo("a", 0, 64, 17, WeightRule())).why_not_fused


def test_many_batches_at_once_stay_with_torch():
    routing = make_routing(tokens=6, experts=16, top_k=4)
    stacked = Routing(*(torch.stack([tensor, tensor]) for tensor in tensors(routing)), rule=routing.rule)
    selection = placed(BatchUnion(top=1))
    assert selection(stacked).plan is None
    assert selection(Routing(*tensors(routing), rule=routing.rule)).plan is not None


def test_triton_can_be_ruled_out(monkeypatch):
    monkeypatch.setenv("LYNX_KERNELS", "grouped_mm")
    assert placed(BatchUnion()).why_not_fused == "LYNX_KERNELS=grouped_mm"
    monkeypatch.setenv("LYNX_KERNELS", "cuda")
    with pytest.raises(ConfigError, match=r"Unknown LYNX_KERNELS='cuda'. Known: auto, grouped_mm, loop"):
        placed(BatchUnion())


def test_asking_for_triton_where_it_cannot_run_raises(monkeypatch):
    monkeypatch.delenv("LYNX_KERNELS")
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    assert placed(BatchUnion()).why_not_fused == "triton is not installed"
    monkeypatch.setenv("LYNX_KERNELS", "triton")
    with pytest.raises(ConfigError, match="LYNX_KERNELS=triton, but triton is not installed"):
        placed(BatchUnion())


def test_a_kernel_that_fails_is_told_once_and_torch_goes_on(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of registers")

    routing = Routing(*tensors(make_routing(tokens=6, experts=16, top_k=4)), rule=WeightRule())
    plain, selection = placed(TopBudget(budget=3)), placed(TopBudget(budget=3))
    plain.fused = None
    monkeypatch.setattr(launch, "launch_route", fail)
    with pytest.warns(LynxWarning, match=r"'layer', which goes on in torch: RuntimeError: out of registers"):
        result = selection(routing)
    assert torch.equal(result.ids, plain(routing).ids)
    assert selection.counters.failures == 0
    assert "out of registers" in selection.why_not_fused
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection(routing)


def test_settings_may_change_between_calls_without_compiling_again():
    routing = Routing(*tensors(make_routing(tokens=8, experts=16, top_k=4, seed=1)), rule=WeightRule())
    selection = placed(TopBudget(budget=16, protect=0))
    assert not selection(routing).lost.any()
    selection.fused.placed[3] = 2.0
    fewer = selection(routing)
    assert fewer.lost.any()
    assert fewer.ids.unique().numel() <= 8


def test_the_custom_op_keeps_its_promises():
    choice, logits, ids, weights, role, phase = tensors(make_routing(tokens=5, experts=16, top_k=4))
    numbers, counters = RouteSettings(budget=4.0).tensor(DEVICE), Counters().on(DEVICE)
    rule = RouteRule(by_demand=True).encode()
    for own in ((ids, weights), (None, None)):
        arguments = (choice, logits, *own, role, phase, None, numbers, *counters, rule, 4)
        torch.library.opcheck(torch.ops.lynx.route.default, arguments)


def test_compiles_whole_and_once_for_all_layers():
    """One graph for layers that differ in their settings: nothing of a layer is a constant of it."""
    routing = make_routing(tokens=6, experts=16, top_k=4)
    layers = [placed(TopBudget(budget=budget)) for budget in (2, 5, 9)]
    plain = [LayerSelection(INFO, TopBudget(budget=budget)) for budget in (2, 5, 9)]
    for each in plain:
        each.fused = None
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def forward(*inputs):
        outputs = []
        for layer in layers:
            result = layer(Routing(*inputs, rule=routing.rule))
            outputs += [result.ids, result.weights, result.plan.buffer]
        return outputs

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    for _ in range(2):
        outputs = compiled(*tensors(routing))
    torch._dynamo.reset()
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if "lynx.route" in str(node.target)]
    assert len(calls) == 3
    for layer, reference, ids in zip(layers, plain, outputs[::3], strict=True):
        for _ in range(2):
            expected = reference(Routing(*tensors(routing), rule=routing.rule))
        assert torch.equal(ids, expected.ids)
        assert layer.counters.read()[Phase.DECODE].steps == 2
        mine, theirs = (each.counters.read()[Phase.DECODE] for each in (layer, reference))
        assert mine.open_active_after == theirs.open_active_after


def test_a_plan_belongs_to_the_ids_that_come_with_it():
    routing = Routing(*tensors(make_routing(tokens=7, experts=16, top_k=4)), rule=WeightRule())
    result = placed(TopBudget(budget=3))(routing)
    assert isinstance(result.plan, Plan)
    assert result.plan.num_slots == result.ids.numel()


def test_on_a_cpu_the_interpreter_runs_only_if_asked_for(monkeypatch):
    monkeypatch.setenv("LYNX_KERNELS", "auto")
    monkeypatch.setattr(room, "interpreted", lambda: True)
    selection = LayerSelection(INFO, BatchUnion())
    selection.place(torch.device("cpu"))
    assert "interpreter" in selection.why_not_fused
    assert selection(make_routing(tokens=6, experts=16, top_k=4)).plan is None


def test_a_layer_of_another_size_stays_with_torch():
    """A router that gives other numbers of slots or experts than when it was probed is left to the core."""
    selection = placed(BatchUnion(top=1))
    for size in ({"experts": 16, "top_k": 3}, {"experts": 12, "top_k": 4}):
        routing = make_routing(tokens=6, **size)
        result = selection(Routing(*tensors(routing), rule=routing.rule))
        assert result.plan is None
        assert result.ids.shape == routing.ids.shape


@pytest.mark.parametrize("options", [{}, {"BT": 4, "PART": 4}], ids=["one launch", "two launches"])
def test_launches_are_on_the_device_of_the_tensors(monkeypatch, options):
    """Triton launches on the current device, whatever tensors it is given."""
    seen = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            seen.append(self.device)

        def __exit__(self, *error):
            seen.append("left")

    def inside(kernel):
        class Watched:
            def __getitem__(self, grid):
                assert seen == [DEVICE_OF_TENSORS]
                return kernel[grid]

        return Watched()

    for name in ("route_kernel", "hear_kernel", "reroute_kernel"):
        monkeypatch.setattr(launch, name, inside(getattr(launch, name)))
    monkeypatch.setattr(launch.launch, "on", Guard)
    with launched_with(options):
        placed(BatchUnion(top=1))(Routing(*tensors(make_routing(tokens=6, experts=16, top_k=4)), rule=WeightRule()))
    assert seen == [DEVICE_OF_TENSORS, "left"]


def test_a_moved_model_never_stops_generation(monkeypatch):
    """What attach refuses, a forward goes round: a batch from where the kernel cannot run stays with torch."""
    selection = placed(BatchUnion(top=1))
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    selection.fused.device = torch.device("meta")  # as if the batch came from another device than before
    assert selection(Routing(*tensors(make_routing(tokens=6, experts=16, top_k=4)), rule=WeightRule())).plan is None
    assert selection.why_not_fused == "triton is not installed"


def test_parts_are_whole_tiles():
    choice, logits, _, _, role, phase = tensors(make_routing(tokens=8, experts=16, top_k=4))
    common = (RouteRule(), RouteSettings().tensor(DEVICE), Counters().on(DEVICE))
    with launched_with({"BT": 4, "PART": 6}), pytest.raises(ValueError, match="no whole number of tiles of 4"):
        route(choice, logits, role, phase, *common, top_k=4)


def test_gradients_stay_with_torch():
    choice, logits, ids, weights, role, phase = tensors(make_routing(tokens=6, experts=16, top_k=4))
    selection, weights = placed(BatchUnion(top=1)), weights.requires_grad_()
    routing = Routing(choice, logits, ids, weights, role, phase, WeightRule())
    assert selection(routing).plan is None
    with torch.no_grad():
        assert selection(routing).plan is not None
