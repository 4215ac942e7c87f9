"""What only a GPU can show of the route kernel: captured graphs, and bits over many repeats."""

import pytest
import torch

from lynx.counters import Counters
from lynx.kernels.route import RouteRule, RouteSettings, route
from lynx.routing import Phase, Routing, WeightRule
from lynx.selection import LayerSelection
from lynx.strategies.top_budget import TopBudget
from lynx.strategy import LayerInfo
from lynx.testing import make_routing

pytestmark = [pytest.mark.kernel, pytest.mark.gpu]
NAMES = ("choice", "logits", "ids", "weights", "role", "phase")
SIZES = pytest.mark.parametrize("T", [1, 16, 64, 200])


def tensors(T: int, seed: int) -> list[torch.Tensor]:
    routing = make_routing(tokens=T, experts=128, top_k=8, seed=seed)
    return [getattr(routing, name).cuda() for name in NAMES]


@SIZES
def test_a_captured_graph_serves_other_batches(T: int) -> None:
    inputs = tensors(T, 0)
    info = LayerInfo("layer", 0, 128, 8, WeightRule())
    captured, eager = (LayerSelection(info, TopBudget(budget=20)) for _ in range(2))
    for selection in (captured, eager):
        selection.place(inputs[0].device)
        assert selection.why_not_fused == ""
    captured(Routing(*inputs, rule=info.rule))
    captured.counters.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = captured(Routing(*inputs, rule=info.rule))
    for seed in range(1, 5):
        for tensor, new in zip(inputs, tensors(T, seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        expected = eager(Routing(*inputs, rule=info.rule))
        assert torch.equal(result.ids, expected.ids)
        assert torch.equal(result.weights, expected.weights)
        assert result.plan is not None
        assert expected.plan is not None
        assert torch.equal(result.plan.buffer, expected.plan.buffer)
    assert captured.counters.read()[Phase.DECODE].steps == 4
    assert captured.counters.read() == eager.counters.read()


@SIZES
def test_a_hundred_repeats_give_the_same_bits(T: int) -> None:
    choice, logits, _, _, role, phase = tensors(T, 3)
    rule, numbers = RouteRule(by_demand=True), RouteSettings(budget=30.0).tensor(choice.device)
    runs = [
        route(choice, logits, role, phase, rule, numbers, Counters().on(choice.device), top_k=8) for _ in range(100)
    ]
    for run in runs[1:]:
        assert torch.equal(run.ids, runs[0].ids)
        assert torch.equal(run.weights, runs[0].weights)
        assert torch.equal(run.plan.buffer, runs[0].plan.buffer)
