"""Both ways of running experts by library products, held to nested sums in float64."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, assert_close_to_reference, make_batch, make_experts, squared_relu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lynx.kernels import Backend, ExpertWeights, backends, choose_backend, grouped, reference_experts, run_experts

BACKENDS: tuple[Backend, ...] = ("loop", "grouped_mm")
LAYOUTS = ("gated", "no gate", "transposed", "normed")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["loop", "loop, all in oneDNN", "grouped_mm"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    if "oneDNN" in request.param:
        monkeypatch.setattr(grouped, "_ONEDNN_MIN_ELEMENTS", 0)
    return "grouped_mm" if request.param == "grouped_mm" else "loop"


@settings(max_examples=150, deadline=None)
@given(
    backend=st.sampled_from(BACKENDS),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    T=st.integers(0, 9),
    E=st.integers(1, 9),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    lost=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    data=st.data(),
)
def test_matches_the_reference(
    backend: Backend,
    layout: str,
    dtype: torch.dtype,
    T: int,
    E: int,
    sizes: tuple[int, int],
    lost: float,
    data: st.DataObject,
) -> None:
    k, seed = data.draw(st.integers(1, E), label="k"), data.draw(st.integers(0, 99), label="seed")
    H, I = (8 * size for size in sizes)  # grouped_mm wants multiples of 16 bytes  # noqa: E741
    experts = make_experts(layout, E, H, I, dtype, seed)
    hidden, ids, weights = make_batch(T, k, E, H, dtype, lost, seed)
    assert_close_to_reference(run_experts(hidden, ids, weights, experts, backend), hidden, ids, weights, experts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_sizes_run_under_auto(layout: str) -> None:
    experts = make_experts(layout, E=5, H=7, I=3)
    batch = make_batch(4, 2, 5, 7, lost=0.3)
    assert_close_to_reference(run_experts(*batch, experts), *batch, experts)


@pytest.mark.parametrize("T", [1, 3, 17])
def test_large_weights_match_the_reference(T: int) -> None:
    # large enough for the product that reads a weight where it lies
    experts = make_experts("gated", E=2, H=1024, I=1024)
    batch = make_batch(T, 2, 2, 1024)
    assert_close_to_reference(run_experts(*batch, experts, "loop"), *batch, experts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expert_with_only_lost_slots_is_never_read(backend: Backend, layout: str) -> None:
    experts = make_experts(layout, E=6, H=16, I=8)
    hidden, ids, weights = make_batch(5, 3, 6, 16)
    poisoned = 2
    weights = weights.masked_fill(ids == poisoned, 0)
    expected = run_experts(hidden, ids, weights, experts, backend)
    for tensor in (experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias):
        if tensor is not None:
            tensor[poisoned] = torch.nan
    assert (ids == poisoned).any()
    assert torch.equal(run_experts(hidden, ids, weights, experts, backend), expected)


def test_uninitialised_rows_never_reach_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make_experts("transposed", E=6, H=16, I=8)
    batch = make_batch(5, 3, 6, 16, lost=0.5)
    expected = run_experts(*batch, experts, "grouped_mm")
    plain: Callable[..., Tensor] = F.grouped_mm

    def poisoned(rows: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
        out = plain(rows, matrices, offs=offs)
        out[int(offs[-1]) :] = torch.nan
        return out

    monkeypatch.setattr(F, "grouped_mm", poisoned)
    assert torch.equal(run_experts(*batch, experts, "grouped_mm"), expected)


def test_the_loop_computes_nothing_for_lost_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_seen = []
    plain = grouped._mm

    def spy(rows: Tensor, matrix: Tensor) -> Tensor:
        rows_seen.append(rows.shape[0])
        return plain(rows, matrix)

    monkeypatch.setattr(grouped, "_mm", spy)
    hidden, ids, weights = make_batch(8, 4, 12, 16, lost=0.7)
    run_experts(hidden, ids, weights, make_experts("gated", E=12, H=16, I=8), "loop")
    rows_of_active = torch.bincount(ids[weights != 0]).cpu()
    assert rows_seen == rows_of_active[rows_of_active > 0].tolist() * 2


def test_slots_are_combined_in_float32(backend: Backend) -> None:
    # Two products that differ by 2**-14, which bfloat16 would round to the same number.
    eye = torch.eye(8, dtype=torch.bfloat16, device=DEVICE)
    experts = ExpertWeights(torch.stack([eye, eye]), torch.stack([(1 + 2**-7) * eye, (1 + 2**-6) * eye]), torch.clone)
    hidden = torch.ones(1, 8, dtype=torch.bfloat16, device=DEVICE)
    weights = torch.tensor([[1 + 2**-7, -1]], dtype=torch.bfloat16, device=DEVICE)
    output = run_experts(hidden, torch.tensor([[0, 1]], device=DEVICE), weights, experts, backend)
    assert torch.equal(output, torch.full_like(output, 2**-14))


def test_repeating_the_best_kept_expert_at_weight_zero_changes_nothing(backend: Backend) -> None:
    experts = make_experts("gated", E=6, H=16, I=8)
    hidden, ids, weights = make_batch(5, 2, 6, 16)
    expected = run_experts(hidden, ids, weights, experts, backend)
    padded_ids = torch.cat([ids, ids[:, :1], ids[:, :1]], dim=1)
    padded_weights = torch.cat([weights, torch.zeros_like(weights)], dim=1)
    torch.testing.assert_close(
        run_experts(hidden, padded_ids, padded_weights, experts, backend), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("stray", [-1, 6, 7, 2**31 - 1])
def test_ids_out_of_range_contribute_nothing(backend: Backend, stray: int) -> None:
    experts = make_experts("transposed", E=6, H=16, I=8)
    hidden, ids, weights = make_batch(5, 3, 6, 16)
    ids[1:, 1] = stray
    expected = run_experts(hidden, ids.clamp(0, 5), weights.masked_fill(ids == stray, 0), experts, backend)
    assert torch.equal(run_experts(hidden, ids, weights, experts, backend), expected)
    assert_close_to_reference(expected, hidden, ids, weights, experts)


@pytest.mark.parametrize("T", [0, 1])
def test_few_rows(backend: Backend, T: int) -> None:
    experts = make_experts("gated", E=4, H=16, I=8)
    batch = make_batch(T, 2, 4, 16)
    assert_close_to_reference(run_experts(*batch, experts, backend), *batch, experts)


def test_a_single_active_expert(backend: Backend) -> None:
    experts = make_experts("gated", E=4, H=16, I=8)
    hidden, ids, weights = make_batch(6, 2, 4, 16)
    ids[:], weights[:, 1:] = 3, 0
    assert_close_to_reference(run_experts(hidden, ids, weights, experts, backend), hidden, ids, weights, experts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_active_expert_gives_zeros(backend: Backend, layout: str) -> None:
    experts = make_experts(layout, E=4, H=16, I=8)
    hidden, ids, weights = make_batch(6, 2, 4, 16)
    assert not run_experts(hidden, ids, torch.zeros_like(weights), experts, backend).any()


def test_equal_inputs_give_equal_bits_and_stay_as_they_were(backend: Backend) -> None:
    experts = make_experts("transposed", E=8, H=32, I=16)
    batch = make_batch(16, 4, 8, 32, lost=0.3)
    tensors = [*batch, experts.gate_up, experts.down]
    before = [tensor.clone() for tensor in tensors]
    first = run_experts(*batch, experts, backend)
    assert all(torch.equal(first, run_experts(*batch, experts, backend)) for _ in range(3))
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


def test_int32_ids_and_strided_hidden_states_give_equal_bits(backend: Backend) -> None:
    experts = make_experts("gated", E=4, H=16, I=8)
    hidden, ids, weights = make_batch(6, 2, 4, 16)
    expected = run_experts(hidden, ids, weights, experts, backend)
    strided = torch.stack([hidden, hidden], dim=-1)[..., 0]
    assert torch.equal(run_experts(strided, ids.int(), weights, experts, backend), expected)


def test_output_has_the_dtype_of_hidden(backend: Backend) -> None:
    experts = make_experts("gated", E=4, H=16, I=8, dtype=torch.bfloat16)
    hidden, ids, weights = make_batch(6, 2, 4, 16)
    assert_close_to_reference(run_experts(hidden, ids, weights, experts, backend), hidden, ids, weights, experts)


def test_the_loop_has_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_ONEDNN_MIN_ELEMENTS", 0)
    experts = make_experts("gated", E=4, H=16, I=8)
    hidden, ids, weights = make_batch(6, 2, 4, 16, lost=0.3)
    hidden.requires_grad_()
    (expected,) = torch.autograd.grad(reference_experts(hidden, ids, weights, experts).sum(), hidden)
    (gradient,) = torch.autograd.grad(run_experts(hidden, ids, weights, experts, "loop").sum(), hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_torch_compile_takes_bfloat16_whole() -> None:
    experts = make_experts("gated", E=4, H=16, I=8, dtype=torch.bfloat16)
    batch = make_batch(6, 2, 4, 16, dtype=torch.bfloat16, lost=0.3)
    compiled = torch.compile(run_experts, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*batch, experts), run_experts(*batch, experts, "grouped_mm"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_captured_graph_serves_other_routings() -> None:
    experts = make_experts("gated", E=8, H=64, I=32, dtype=torch.bfloat16)
    if choose_backend(experts).backend != "grouped_mm" or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("grouped_mm waits for the device here")
    batch = make_batch(16, 4, 8, 64, torch.bfloat16)
    run_experts(*batch, experts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run_experts(*batch, experts)
    for seed in range(3):
        for tensor, new in zip(batch, make_batch(16, 4, 8, 64, torch.bfloat16, lost=0.4, seed=seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        assert torch.equal(output, run_experts(*batch, experts))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown backend='fast'. Known: auto, grouped_mm, loop, reference, triton"):
        run_experts(*make_batch(2, 1, 2, 8), make_experts("gated", 2, 8, 8), "fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "capability", "backend", "reason"),
    [
        ("cpu", torch.float32, (4, 16, 8), (0, 0), "loop", "CPU"),
        ("mps", torch.float32, (4, 16, 8), (0, 0), "loop", "mps"),
        ("cuda", torch.bfloat16, (4, 16, 8), (7, 5), "loop", "8.0"),
        ("cuda", torch.bfloat16, (4, 16, 4), (9, 0), "loop", "16 bytes"),
        ("cuda", torch.bfloat16, (4, 16, 8), (8, 0), "grouped_mm", "general"),
        ("cuda", torch.float32, (4, 16, 8), (9, 0), "grouped_mm", "general"),
        ("cuda", torch.bfloat16, (4, 16, 8), (9, 0), "grouped_mm", "static"),
    ],
)
def test_the_choice_says_why(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    capability: tuple[int, int],
    backend: str,
    reason: str,
) -> None:
    monkeypatch.setattr(backends, "capability_of", lambda device: capability)
    weight = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=shape, element_size=lambda: dtype.itemsize)
    choice = choose_backend(ExpertWeights(weight, weight, squared_relu))  # type: ignore[arg-type]
    assert choice.backend == backend
    assert reason in choice.reason
