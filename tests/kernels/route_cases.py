"""Batches, strategies and the comparison with the core that the tests of the route kernel share."""

import dataclasses

import pytest
import torch
from cases import DEVICE, launched_with, poisoned_empty
from hypothesis import strategies as st

import lynx.kernels.fused.launch as experts_launch
from lynx.fusion import FusedRoute
from lynx.keep import AnyOf, ByDemand, ByMass, ByRank, ByRatio
from lynx.kernels import make_plan
from lynx.kernels import route as route_file
from lynx.routing import Phase, Role, Routing
from lynx.selection import LayerSelection
from lynx.strategies.batch_union import BatchUnion
from lynx.strategies.coverage import Coverage
from lynx.strategies.exact import Exact
from lynx.strategies.importance_threshold import ImportanceThreshold
from lynx.strategies.popularity import Popularity
from lynx.strategies.static_top import StaticTop
from lynx.strategies.top_budget import TopBudget
from lynx.strategy import LayerInfo, SelectionStrategy
from lynx.testing.routings import ROUTERS, make_routing

POISON = {torch.int32: -(2**31), torch.int64: -(2**63)}


class Joined(SelectionStrategy):
    """A union of all kinds of rules."""

    name: str = "joined"
    top: int = 1
    ratio: float = 0.9
    mass: float = 0.2
    budget: int = 3

    def rule(self):
        return AnyOf((ByRank(self.top), AnyOf((ByRatio(self.ratio), ByMass(self.mass))), ByDemand(self.budget)))


class Alone(SelectionStrategy):
    """Every token by its own mass, with what exact rows have woken as the only refill."""

    name: str = "alone"
    mass: float = 0.5

    def rule(self):
        return ByMass(self.mass, share=False)


class Steep(SelectionStrategy):
    """Every token by its own best weight."""

    name: str = "steep"
    ratio: float = 0.9

    def rule(self):
        return ByRatio(self.ratio, share=False)


def strategies(E: int, k: int) -> st.SearchStrategy[SelectionStrategy]:
    """All of them, with options at which most batches lose something."""
    protect = st.integers(0, min(k, 2))
    refill = st.sampled_from(["re-pick", "re-pick", "none"])
    floor = st.sampled_from([0.0, 0.0, 0.0, 0.3, 0.7])
    few, share = st.integers(1, max(1, k // 2)), st.floats(0, 1, width=32)
    return st.one_of(
        st.builds(BatchUnion, top=few, protect=protect, refill=refill, floor=floor),
        st.builds(ImportanceThreshold, ratio=share, protect=protect, refill=refill, floor=floor),
        st.builds(ImportanceThreshold, mass=st.floats(0.01, 1), protect=protect, refill=refill, floor=floor),
        st.builds(
            TopBudget,
            budget=st.integers(1, max(1, E // 3)),
            utility=st.sampled_from(["own-mass", "normalised-own-mass", "count"]),
            protect=protect,
            refill=refill,
            floor=floor,
        ),
        st.builds(
            Coverage,
            share=st.one_of(share, st.sampled_from([0.0, 0.5, 1.0])),
            utility=st.sampled_from(["own-mass", "normalised-own-mass", "count"]),
            protect=protect,
            refill=refill,
            floor=floor,
        ),
        st.builds(Popularity, drop=st.integers(E // 4, E), protect=protect, refill=refill, floor=floor),
        st.builds(StaticTop, top=few, protect=protect, refill=refill, floor=floor),
        st.builds(Steep, ratio=share, protect=protect, refill=refill, floor=floor),
        st.builds(Alone, mass=st.floats(0.01, 1), protect=protect, refill=refill, floor=floor),
        st.builds(Joined, top=few, budget=st.integers(1, max(1, E // 3)), protect=protect, refill=refill, floor=floor),
        st.just(Exact()),
    )


def to_device(routing: Routing) -> Routing:
    moved = {
        field.name: value.to(DEVICE) if isinstance(value := getattr(routing, field.name), torch.Tensor) else value
        for field in dataclasses.fields(routing)
        if field.init
    }
    return Routing(**moved)


def info_of(routing: Routing) -> LayerInfo:
    return LayerInfo("layer", 0, routing.num_experts, routing.top_k, routing.rule)


def both(strategy, routing, min_tokens=2, launches=None, monkeypatch=None):
    """One batch through torch and through the kernel, with the counters of each."""
    info = info_of(routing)
    plain, fused = (LayerSelection(info, strategy, min_tokens) for _ in range(2))
    plain.fused = None
    assert isinstance(fused.fused, FusedRoute), fused.why_not_fused
    fused.place(torch.device(DEVICE))
    expected = plain(routing)
    with poisoned(), launched_with(launches or {}):
        result = fused(routing)
    assert fused.fused is not None, fused.why_not_fused
    assert result.plan is not None
    return expected, result, plain.counters.read(), fused.counters.read()


class poisoned:
    """Fill every output and scratch buffer with values that must be overwritten."""

    def __enter__(self):
        self.before = route_file._outputs
        self.empty, experts_launch.empty = experts_launch.empty, poisoned_empty

        def outputs(*arguments):
            made = self.before(*arguments)
            for tensor in made:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
                else:
                    tensor.fill_(True if tensor.dtype == torch.bool else POISON.get(tensor.dtype, 77))
            return made

        route_file._outputs = outputs

    def __exit__(self, *error):
        route_file._outputs = self.before
        experts_launch.empty = self.empty


def assert_equal_results(routing, expected, result):
    assert torch.equal(result.ids, expected.ids), (result.ids, expected.ids)
    assert torch.equal(result.lost, expected.lost)
    assert torch.equal(result.lost_ids, expected.lost_ids)
    assert torch.equal(result.lost_weights, expected.lost_weights)
    assert result.ids.dtype == routing.ids.dtype
    assert result.weights.dtype == routing.weights.dtype
    # the interpreter cuts where a GPU rounds: one unit in the last place more
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[routing.weights.dtype]
    scale = max(abs(routing.rule.scale), 1.0)
    torch.testing.assert_close(result.weights, expected.weights, rtol=rounding, atol=rounding * scale, equal_nan=True)
    untouched = ~expected.lost.any(-1)
    assert torch.equal(result.weights[untouched].nan_to_num(7), routing.weights[untouched].nan_to_num(7))


def assert_equal_counts(expected, found):
    for phase in Phase:
        mine, theirs = dataclasses.asdict(found[phase]), dataclasses.asdict(expected[phase])
        for name in ("kept_mass", "kept_mass_worst"):
            assert mine.pop(name) == pytest.approx(theirs.pop(name), abs=2e-6 * max(1, mine["open_rows"]))
        assert mine == theirs


def assert_plan(result, num_experts):
    expected = make_plan(result.ids, result.weights, num_experts)
    assert torch.equal(result.plan.buffer, expected.buffer)


@st.composite
def batches(draw):
    E, k = draw(st.sampled_from([(16, 4), (33, 5), (64, 8), (24, 6), (40, 16), (8, 2), (6, 3), (4, 4), (4, 1)]))
    T = draw(st.sampled_from([7, 20, 12, 9, 16, 5, 3, 2, 1]))
    router = draw(st.sampled_from(ROUTERS))
    role = st.sampled_from([Role.OPEN, Role.OPEN, Role.OPEN, Role.OPEN, Role.EXACT, Role.PADDING])
    phase = st.sampled_from([Phase.DECODE, Phase.DECODE, Phase.DECODE, Phase.PREFILL])
    roles = draw(st.one_of(st.none(), st.lists(role, min_size=T, max_size=T)))
    phases = draw(st.one_of(st.none(), st.lists(phase, min_size=T, max_size=T)))
    routing = make_routing(
        router,
        tokens=T,
        experts=E,
        top_k=k,
        seed=draw(st.integers(0, 10**6)),
        renormalise=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        repick=draw(st.sampled_from([True, True, True, False])),
        roles=roles,
        phases=phases,
        priority=draw(st.booleans()),
        skew=draw(st.sampled_from([0.0, 1.0, 4.0])),
        ties=draw(st.booleans()),
        shuffle=draw(st.booleans()),
        weights_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        ids_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
    )
    return routing, draw(strategies(E, k))


def make(rule=None, **changes):
    """A batch of 12 rows over 16 experts whose fields can be changed."""
    routing = make_routing("softmax", **({"tokens": 12, "experts": 16, "top_k": 4, "seed": 3} | changes))
    return to_device(dataclasses.replace(routing, rule=rule or routing.rule))


def check(strategy, routing, launches=None, min_tokens=2):
    """The kernel agrees with the core in everything it leaves behind."""
    expected, result, wanted, found = both(strategy, routing, min_tokens, launches)
    assert_equal_results(routing, expected, result)
    assert_equal_counts(wanted, found)
    assert_plan(result, routing.num_experts)
    return expected, result, found
