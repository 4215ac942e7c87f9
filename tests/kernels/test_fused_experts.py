"""The experts' kernels in any layout, routing and launch, held to nested sums in float64."""

import mmap
from dataclasses import replace

import pytest
import torch
from cases import (
    DEVICE,
    PATTERNS,
    TOLERANCE,
    assert_close_to_reference,
    make_batch,
    make_experts,
    make_fusable,
    make_pattern,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lynx.kernels import ExpertWeights, make_plan, run_experts
from lynx.kernels.fused import launch, layer
from lynx.kernels.gates import GATES
from lynx.kernels.tune import Settings

pytestmark = [
    pytest.mark.kernel,
    # Triton's interpreter computes in NumPy, which warns where a GPU gives inf or NaN
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned"),
]
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; Python has the name from 3.13 on
GATE_NAMES = (*sorted(GATES), None)
PROJECTION = {
    "block_m": 16,
    "block_n": 16,
    "block_k": 16,
    "num_warps": 4,
    "num_stages": 2,
    "programs_per_processor": 3,
}
COMBINE = {"block_h": 64, "num_warps": 4}
projections = st.fixed_dictionaries(
    {
        "block_m": st.sampled_from([16, 32, 64, 128]),
        "block_n": st.sampled_from([16, 32]),
        "block_k": st.sampled_from([16, 32, 64]),
        "num_warps": st.sampled_from([1, 2, 4, 8]),
        "num_stages": st.integers(1, 4),
        "programs_per_processor": st.integers(1, 9),
    }
)


def run(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    up: Settings = PROJECTION,
    down: Settings = PROJECTION,
    combine: Settings = COMBINE,
) -> Tensor:
    """What `run_experts` does, with given settings for each launch."""
    plan, (_, k) = make_plan(ids, weights, experts.num_experts).buffer, ids.shape
    rows, layout = hidden.to(experts.gate_up.dtype), experts.transposed
    inner = launch.gate_up(rows, plan, k, experts.gate_up, experts.gate_up_bias, layout, experts.gate, up)
    if experts.gate is None:
        inner = experts.activation(inner)
    outer = launch.down(inner, plan, weights, experts.down, experts.down_bias, layout, down)
    return launch.combine(outer, plan, experts.num_experts, k, hidden.dtype, combine)


# T, k, E, H, I: all kinds of sizes and, with more slots than experts, enough rows to fill the highest tile and another
ANY = st.tuples(st.integers(1, 36), st.integers(1, 3), st.integers(1, 5), st.integers(1, 50), st.integers(1, 36))
FULL = st.tuples(st.integers(28, 36), st.just(8), st.integers(1, 2), st.integers(1, 20), st.integers(1, 20))


@settings(max_examples=70)
@given(
    gate=st.sampled_from(GATE_NAMES),
    flags=st.tuples(st.booleans(), st.booleans()),
    dtypes=st.tuples(*[st.sampled_from(list(TOLERANCE))] * 3),
    pattern=st.sampled_from(PATTERNS),
    sizes=ANY | ANY | FULL,
    scale=st.sampled_from([1.0, 1.0, 30.0, 0.0]),
    up=projections,
    down=projections,
    block_h=st.sampled_from([16, 32, 128]),
    seed=st.integers(0, 99),
)
def test_matches_the_reference(gate, flags, dtypes, pattern, sizes, scale, up, down, block_h, seed) -> None:
    T, k, E, H, I = sizes  # noqa: E741
    if torch.float16 in dtypes:  # the square of 256 is infinite there
        scale = min(scale, 10.0)
    experts = make_fusable(gate, *flags, E, H, I, dtypes[0], seed)
    hidden = (torch.randn(T, H, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtypes[1])
    ids, weights = make_pattern(pattern, T, k, E, seed)
    weights = weights.to(dtypes[2])
    output = run(hidden, ids, weights, experts, up, down, {"block_h": block_h, "num_warps": 2})
    coarser = max(dtypes[:2], key=TOLERANCE.__getitem__)  # hidden states as read and written, weights as multiplied
    assert_close_to_reference(output, hidden, ids, weights, experts, TOLERANCE[coarser])


@pytest.mark.sanitize
@pytest.mark.parametrize("gate", GATE_NAMES)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_layout_and_gate_by_the_public_way(gate: str | None, transposed: bool) -> None:
    experts = make_fusable(gate, transposed, True, E=5, H=24, I=20)
    hidden, ids, weights = make_batch(6, 3, 5, 24, lost=0.3)
    hidden *= 5  # far enough for the clamps
    output = run_experts(hidden, ids, weights, experts, "triton")
    assert_close_to_reference(output, hidden, ids, weights, experts)


@pytest.mark.sanitize
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_the_public_way(dtype: torch.dtype, transposed: bool) -> None:
    experts = make_fusable("swiglu", transposed, True, E=5, H=72, I=40, dtype=dtype)
    hidden, ids, weights = make_batch(40, 3, 5, 72, dtype, lost=0.3)
    output = run_experts(hidden, ids, weights, experts, "triton")
    assert_close_to_reference(output, hidden, ids, weights, experts)


@pytest.mark.sanitize
@pytest.mark.parametrize(("gate", "transposed"), [("swiglu", False), ("gpt_oss", True), (None, False)])
def test_no_grid_and_no_repeat_changes_a_bit(gate: str | None, transposed: bool) -> None:
    experts = make_fusable(gate, transposed, True, E=4, H=40, I=36)
    ids, weights = make_pattern("one hot", 20, 2, 4)
    hidden = torch.randn(20, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    first = run(hidden, ids, weights, experts)
    for programs in (1, 2, 1000, 1000):
        grid = {**PROJECTION, "programs_per_processor": programs}
        assert torch.equal(run(hidden, ids, weights, experts, grid, grid), first)
    assert torch.equal(run(hidden, ids, weights, experts, combine={"block_h": 16, "num_warps": 1}), first)


def test_rows_past_the_plan_stay_as_they_were() -> None:
    """The kernels write each row that is run and no other, whatever the tile."""
    experts = make_fusable("swiglu", False, False, E=3, H=20, I=18)
    ids, weights = make_pattern("skewed", 7, 2, 3)
    plan = make_plan(ids, weights, 3)
    rows = int((weights != 0).sum())
    hidden = torch.randn(7, 20, device=DEVICE)
    inner = launch.gate_up(hidden, plan.buffer, 2, experts.gate_up, None, False, "swiglu", PROJECTION)
    outer = launch.down(inner, plan.buffer, weights, experts.down, None, False, PROJECTION)
    assert 0 < rows < 14
    for out in (inner, outer):
        assert out[:rows].isfinite().all()
        assert out[rows:].isnan().all()


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_with_only_lost_slots_is_never_read(transposed: bool) -> None:
    experts = make_fusable("swiglu", transposed, True, E=6, H=16, I=8)
    hidden, ids, weights = make_batch(5, 3, 6, 16)
    lonely = 2
    weights = weights.masked_fill(ids == lonely, 0)
    assert (ids == lonely).any()
    expected = run_experts(hidden, ids, weights, experts, "triton")
    for tensor in (experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias):
        assert tensor is not None
        tensor[lonely] = torch.nan
    assert torch.equal(run_experts(hidden, ids, weights, experts, "triton"), expected)


@pytest.mark.parametrize("gate", GATE_NAMES)
def test_nan_stays_with_its_token(gate: str | None) -> None:
    """Neighbours in a tile are not touched by it, and no clamp or maximum hides it."""
    experts = make_fusable(gate, False, False, E=2, H=16, I=8)
    hidden, ids, weights = make_batch(5, 2, 2, 16)
    expected = run_experts(hidden, ids, weights, experts, "triton")
    hidden[3, 5] = torch.nan
    output = run_experts(hidden, ids, weights, experts, "triton")
    assert output[3].isnan().all()
    others = [0, 1, 2, 4]
    assert torch.equal(output[others], expected[others])


def test_a_slot_of_nan_weight_is_run() -> None:
    experts = make_fusable("swiglu", False, False, E=4, H=16, I=8)
    hidden, ids, weights = make_batch(3, 2, 4, 16)
    weights[1, 0] = torch.nan
    assert run_experts(hidden, ids, weights, experts, "triton")[:, 0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("T", "k"), [(0, 2), (3, 0)])
def test_no_slots_give_zeros(T: int, k: int) -> None:
    experts = make_fusable("swiglu", False, False, E=4, H=16, I=8)
    hidden, ids = torch.ones(T, 16, device=DEVICE), torch.zeros(T, k, dtype=torch.long, device=DEVICE)
    output = run_experts(hidden, ids, torch.ones(T, k, device=DEVICE), experts, "triton")
    assert torch.equal(output, torch.zeros_like(hidden))


def test_all_slots_lost_give_zeros() -> None:
    experts = make_fusable("gpt_oss", True, True, E=4, H=16, I=8)
    hidden, ids, weights = make_batch(6, 2, 4, 16)
    assert torch.equal(run_experts(hidden, ids, torch.zeros_like(weights), experts, "triton"), torch.zeros_like(hidden))


def test_slots_are_summed_in_order_in_float32() -> None:
    """1 + 2**-24 + 2**-24 is 1 from the left in float32 and more than 1 from the right."""
    eye = torch.eye(16, device=DEVICE)
    experts = ExpertWeights(torch.stack([eye] * 3), torch.stack([eye] * 3), torch.clone)
    ids = torch.tensor([[2, 0, 1], [0, 2, 1]], device=DEVICE)
    weights = torch.tensor([[1, 2**-24, 2**-24], [2**-24, 2**-24, 1]], device=DEVICE)
    output = run_experts(torch.ones(2, 16, device=DEVICE), ids, weights, experts, "triton")
    assert (output[0] == 1).all()
    assert (output[1] == 1 + 2**-23).all()


def test_a_plan_given_is_the_plan_used() -> None:
    experts = make_fusable("swiglu", False, False, E=6, H=16, I=8)
    hidden, ids, weights = make_batch(5, 3, 6, 16, lost=0.3)
    pruned = weights.masked_fill(ids == ids[0, 0], 0)
    plan = make_plan(ids, pruned, 6)
    expected = run_experts(hidden, ids, pruned, experts, "triton")
    assert torch.equal(run_experts(hidden, ids, weights, experts, "triton", plan), expected)


@pytest.mark.parametrize("backend", ["triton", "loop", "auto"])
@pytest.mark.parametrize(("E", "T"), [(5, 5), (8, 5), (6, 4)])
def test_a_plan_of_other_sizes_is_refused(backend: str, E: int, T: int) -> None:
    experts = make_fusable("swiglu", False, False, E=6, H=16, I=8)
    hidden, ids, weights = make_batch(5, 3, 6, 16)
    plan = make_plan(ids[:T], weights[:T], E)
    told = f"The plan is for {E} experts and {3 * T} slots, these are 6 experts and 15 slots"
    with pytest.raises(ValueError, match=told):
        run_experts(hidden, ids, weights, experts, backend, plan)


def test_weights_may_lie_apart_and_inputs_any_way() -> None:
    """Experts with space between them, hidden states and routing with strides: the same bits."""
    experts = make_fusable("swiglu", False, True, E=4, H=16, I=8)
    hidden, ids, weights = make_batch(6, 2, 4, 16)
    expected = run_experts(hidden, ids, weights, experts, "triton")
    apart = replace(
        experts,
        gate_up=torch.stack([experts.gate_up, experts.gate_up * torch.nan], 1)[:, 0],
        down=torch.stack([experts.down, experts.down * torch.nan], 1)[:, 0],
        gate_up_bias=torch.stack([experts.gate_up_bias] * 2, -1)[..., 0],
        down_bias=torch.stack([experts.down_bias] * 2, -1)[..., 0],
    )
    strided = [torch.stack([x, x], -1)[..., 0] for x in (hidden, ids.int(), weights)]
    assert not any(x.is_contiguous() for x in (apart.gate_up, apart.down, *strided))
    assert torch.equal(run_experts(*strided, apart, "triton"), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_of_experts_pass_two_to_the_31(transposed: bool) -> None:
    """The last of three experts lies 2**31 elements behind the first; between them is nothing that takes memory.

    There is as much before the first, so that an offset that overflows reads zeros and does not end the process.
    """
    distance, H, I = 2**30, 16, 8  # noqa: E741
    small = make_fusable("swiglu", transposed, False, 3, H, I, torch.float16)

    def spread(weight: Tensor) -> Tensor:
        length = 2**32 + weight[0].numel()
        if DEVICE == "cuda":
            storage = torch.empty(length, dtype=torch.float16, device=DEVICE)
        else:
            pages = mmap.mmap(-1, 2 * length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
            storage = torch.frombuffer(pages, dtype=torch.float16)
        wide = storage.as_strided(weight.shape, (distance, *weight.stride()[1:]), 2**31)
        return wide.copy_(weight)

    batch = make_batch(4, 3, 3, H)
    up_wide, down_wide = replace(small, gate_up=spread(small.gate_up)), replace(small, down=spread(small.down))
    expected = run_experts(*batch, small, "triton")
    assert torch.equal(run_experts(*batch, up_wide, "triton"), expected)
    assert torch.equal(run_experts(*batch, down_wide, "triton"), expected)


@pytest.mark.parametrize("gate", ["swiglu", None])
@pytest.mark.parametrize("given_plan", [False, True])
def test_torch_compile_takes_it_whole(gate: str | None, given_plan: bool) -> None:
    experts = replace(make_experts("gated", 6, 24, 20, torch.bfloat16), gate=gate)
    batch = make_batch(5, 3, 6, 24, torch.bfloat16, lost=0.3)

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        plan = make_plan(ids, weights, 6) if given_plan else None
        return run_experts(hidden, ids, weights, experts, "triton", plan)

    with torch.no_grad():
        compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*batch), forward(*batch))
    torch.compiler.reset()


def test_one_compiled_graph_serves_all_layers() -> None:
    layers = [make_fusable("swiglu", False, False, 6, 24, 20, seed=seed) for seed in range(3)]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    batch = make_batch(5, 3, 6, 24)
    with torch.no_grad():
        compiled = torch.compile(run_experts, backend=count, fullgraph=True)
        for experts in layers:
            assert torch.equal(compiled(*batch, experts, "triton"), run_experts(*batch, experts, "triton"))
    assert len(graphs) == 1
    torch.compiler.reset()


def test_the_ops_keep_their_promises() -> None:
    hidden, ids, weights = make_batch(5, 3, 6, 24, lost=0.3)
    experts = make_fusable("gpt_oss", True, True, 6, 24, 20)
    plan = make_plan(ids, weights, 6).buffer
    up = (hidden, plan, 3, experts.gate_up, experts.gate_up_bias, True)
    inner = launch.gate_up(*up, "gpt_oss").nan_to_num()  # opcheck compares results, uninitialised rows included
    full = make_plan(ids, torch.ones_like(weights), 6).buffer
    torch.library.opcheck(layer.plan_op, (ids, weights, 6))
    for gate in ("gpt_oss", None):
        torch.library.opcheck(layer.gate_up_op, (hidden, full, *up[2:], gate))
    down = (inner, plan, weights, experts.down, experts.down_bias, True, torch.bfloat16)
    torch.library.opcheck(layer.down_op, down)
