"""Plans: what each part promises, and the kernel against the readable form, integer for integer."""

import pytest
import torch
from cases import DEVICE, NO_INDEX, PATTERNS, make_pattern
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lynx.kernels import Plan, make_plan
from lynx.kernels.fused import launch

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned")]
INTEGERS = (torch.int64, torch.int32, torch.int16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(plan: Plan, ids: Tensor, weights: Tensor, E: int) -> None:
    """Hold a plan to its definition, slot by slot and row by row."""
    S = ids.numel()
    assert plan.buffer.dtype == torch.int32
    assert plan.buffer.is_contiguous()
    assert plan.buffer.shape == (Plan.size(E, S),) == (1 + E + E + 1 + S + S,)
    (count,), experts, offsets = plan.count.tolist(), plan.experts.tolist(), plan.offsets.tolist()
    slots, place = plan.slots.tolist(), plan.place.tolist()
    assert (len(experts), len(offsets), len(slots), len(place)) == (E, E + 1, S, S)
    wanted = [
        (e, s)
        for s, (e, w) in enumerate(zip(ids.reshape(-1).tolist(), weights.reshape(-1).tolist(), strict=True))
        if w != 0 and 0 <= e < E
    ]
    R = len(wanted)

    assert count == len({e for e, _ in wanted})
    assert experts[:count] == sorted({e for e, _ in wanted})
    assert experts[count:] == [-1] * (E - count)
    assert offsets[0] == 0
    assert offsets[count:] == [R] * (E + 1 - count)
    for a in range(count):
        assert slots[offsets[a] : offsets[a + 1]] == [s for e, s in wanted if e == experts[a]]
    assert slots[R:] == [-1] * (S - R)
    assert [s for s, row in enumerate(place) if row >= 0] == [s for _, s in wanted]
    assert all(place[s] == row for row, s in enumerate(slots[:R]))
    assert set(place) <= {-1, *range(R)}


def plan_by_kernel(ids: Tensor, weights: Tensor, E: int, tile: int = 8192) -> Plan:
    return Plan(launch.plan(ids, weights, E, {"tile": tile, "num_warps": 4}), E, ids.numel())


@settings(max_examples=80)
@given(
    pattern=st.sampled_from(PATTERNS),
    sizes=st.tuples(st.integers(0, 12), st.integers(1, 5), st.integers(1, 20)),
    dtypes=st.tuples(st.sampled_from(INTEGERS), st.sampled_from(FLOATS)),
    tile=st.sampled_from([16, 64, 8192]),
    seed=st.integers(0, 99),
)
def test_plans_are_what_they_promise(pattern, sizes, dtypes, tile, seed) -> None:
    T, k, E = sizes
    ids, weights = make_pattern(pattern, T, k, E, seed)
    ids, weights = ids.clamp(-(2**15), 2**15 - 1).to(dtypes[0]), weights.to(dtypes[1])
    readable = make_plan(ids, weights, E)
    check(readable, ids, weights, E)
    if T:
        assert torch.equal(plan_by_kernel(ids, weights, E, tile).buffer, readable.buffer)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("T", "k", "E", "tile"), [(256, 16, 512, 2**18), (64, 8, 128, 8192), (3, 2, 300, 8192), (1, 1, 1, 8192)]
)
def test_the_kernel_makes_large_plans_too(T: int, k: int, E: int, tile: int) -> None:
    ids, weights = make_pattern("foreign", T, k, E)
    assert torch.equal(plan_by_kernel(ids, weights, E, tile).buffer, make_plan(ids, weights, E).buffer)


@pytest.mark.parametrize("dtype", FLOATS)
def test_only_zero_is_zero(dtype: torch.dtype) -> None:
    """Minus zero is lost; the smallest number, infinities and NaN are run."""
    smallest = torch.finfo(dtype).smallest_normal
    weights = torch.tensor([[0.0, -0.0, smallest, torch.inf, torch.nan]], dtype=dtype, device=DEVICE)
    ids = torch.tensor([[3, 2, 1, 0, 1]], device=DEVICE)
    plan = plan_by_kernel(ids, weights, 4)
    assert plan.slots.tolist() == [3, 2, 4, -1, -1]
    assert torch.equal(plan.buffer, make_plan(ids, weights, 4).buffer)


def test_unsigned_ids_and_strides() -> None:
    ids, weights = make_pattern("skewed", 6, 2, 4)
    expected = make_plan(ids, weights, 4).buffer
    strided = [torch.stack([x, x], -1)[..., 0] for x in (ids.to(torch.uint8), weights)]
    assert torch.equal(launch.plan(*strided, 4), expected)
    assert torch.equal(make_plan(*strided, 4).buffer, expected)


def test_nothing_of_the_buffer_is_left_unwritten() -> None:
    ids, weights = make_pattern("all lost", 5, 2, 7)
    buffer = launch.plan(ids, weights, 7)
    assert not (buffer == NO_INDEX).any()


def test_make_plan_compiles_whole() -> None:
    ids, weights = make_pattern("foreign", 6, 3, 5)
    compiled = torch.compile(lambda i, w: make_plan(i, w, 5).buffer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids, weights), make_plan(ids, weights, 5).buffer)
    torch.compiler.reset()
