"""The stand-ins' kernels in any shape, dtype and launch, held to nested sums in float64."""

import pytest
import torch
from cases import DEVICE, TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st
from standin_cases import Case, magnitude, make_case
from torch import Tensor

from lynx.kernels import StandInWeights, add_standins, backends, reference_standins
from lynx.kernels.fused import launch_standins
from lynx.kernels.standins import MAX_TOP_K, why_not_standins

pytestmark = [
    pytest.mark.kernel,
    # Triton's interpreter computes in NumPy, which warns where a GPU gives inf or NaN
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned"),
]
DTYPES = list(TOLERANCE)


def assert_adds_what_the_reference_adds(got: Tensor, case: Case) -> None:
    output = case[0]
    assert (got.dtype, got.shape) == (output.dtype, output.shape)
    # products are in float32 from what was read: only the dtype of the result rounds
    error = (got.double() - reference_standins(*case)).abs().max().item() if got.numel() else 0.0
    assert error <= TOLERANCE[output.dtype] * magnitude(case)
    kept = ~(case[3] != 0).any(-1)
    assert torch.equal(bits(got[kept]), bits(output[kept]))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def add_with_kernels(output: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, own: StandInWeights) -> Tensor:
    return launch_standins.run(output, hidden, ids, weights, own.inner, own.outer, own.bias)


@pytest.fixture
def triton(monkeypatch):
    """Ask for the kernels, and list the calls that reach them."""
    seen, plain = [], launch_standins.run

    def spy(output, *rest):
        seen.append(output.shape[0])
        return plain(output, *rest)

    monkeypatch.setenv("LYNX_KERNELS", "triton")
    monkeypatch.setattr(launch_standins, "run", spy)
    return seen


@settings(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 18), st.integers(1, 4), st.integers(4, 9), st.integers(1, 70), st.integers(0, 11)),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 4),
    lost=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    tiles=st.tuples(*[st.sampled_from([16, 64, 1024])] * 2),
    index=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]),
    seed=st.integers(0, 99),
)
def test_matches_the_reference(sizes, dtypes, lost, tiles, index, seed) -> None:
    case = make_case(*sizes, dtypes, lost, seed)
    output, hidden, ids, weights, standins = case
    ids = ids.to(index)
    inner = launch_standins.inner(hidden, ids, weights, standins.inner, {"tile": tiles[0], "num_warps": 2})
    last = {"tile": tiles[1], "num_warps": 2}
    got = launch_standins.outer(output, ids, weights, inner, standins.outer, standins.bias, last)
    assert_adds_what_the_reference_adds(got, case)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_any_dtypes_by_the_public_way(triton: list[int], dtype: torch.dtype, given: torch.dtype) -> None:
    """Stand-ins of one dtype, hidden states and output of another."""
    case = make_case(17, 3, 8, 72, 6, (given, given, torch.float32, dtype))
    assert_adds_what_the_reference_adds(add_standins(*case), case)
    assert triton == [17]


@pytest.mark.sanitize
@pytest.mark.parametrize(("E", "k", "H", "r"), [(128, 8, 2048, 8), (128, 4, 2880, 16), (8, 2, 40, 64)])
def test_shapes_of_models(triton: list[int], E: int, k: int, H: int, r: int) -> None:
    case = make_case(3, k, E, H, r)
    assert_adds_what_the_reference_adds(add_standins(*case), case)
    assert triton == [3]


@pytest.mark.parametrize(("T", "k", "r"), [(0, 2, 4), (1, 2, 4), (5, 0, 4), (5, 2, 0), (256, 1, 2)])
def test_sizes_at_the_edges(triton: list[int], T: int, k: int, r: int) -> None:
    case = make_case(T, k, 4, 24, r)
    assert_adds_what_the_reference_adds(add_standins(*case), case)
    assert triton == [T]


@pytest.mark.parametrize("lost", [0.0, 1.0])
def test_nothing_lost_and_everything_lost(triton: list[int], lost: float) -> None:
    case = make_case(9, 2, 4, 24, 3, (torch.bfloat16,) * 4, lost)
    case[0][0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    got = add_standins(*case)
    if lost:
        assert (got[1:] != case[0][1:]).any(-1).all()
        assert got.isfinite()[1:].all()
    else:
        assert torch.equal(bits(got), bits(case[0]))
    assert got.data_ptr() != case[0].data_ptr()


def test_a_slot_without_weight_is_not_read(triton: list[int]) -> None:
    """Whatever the token, its stand-in and its expert hold."""
    output, hidden, ids, weights, standins = make_case(4, 2, 6, 24, 3)
    ids[:2], weights[:2] = torch.tensor([5, 4], device=DEVICE), 0.0
    ids[2:], weights[2:] = torch.tensor([1, 5], device=DEVICE), torch.tensor([0.7, 0.0], device=DEVICE)
    expected = add_standins(output, hidden, ids, weights, standins)
    for part in (standins.inner, standins.outer, standins.bias):
        part[4:] = torch.nan
    hidden[0], hidden[1] = torch.inf, torch.nan
    ids[2:, 1] = 2**31
    got = add_standins(output, hidden, ids, weights, standins)
    assert torch.equal(got, expected)
    assert got.isfinite().all()
    assert (got[2:] != output[2:]).any()


def test_an_id_that_is_no_expert_is_answered_by_none(triton: list[int]) -> None:
    """Nothing outside of the stand-ins is read, whatever a host hands over."""
    output, hidden, ids, weights, around = make_case(3, 2, 8, 24, 3, lost=1.0)
    standins = StandInWeights(around.inner[1:7], around.outer[1:7], around.bias[1:7])
    ids[0], ids[1, 1] = torch.tensor([-1, 6], device=DEVICE), -1
    ids[1, 0], ids[2] = 2, torch.tensor([0, 5], device=DEVICE)
    got = add_standins(output, hidden, ids, weights, standins)
    assert torch.equal(got[0], output[0])
    weights[1, 1], weights[0], ids[0], ids[1, 1] = 0.0, 0.0, 0, 0
    assert_adds_what_the_reference_adds(got, (output, hidden, ids, weights, standins))


def test_rows_of_slots_that_are_not_lost_are_not_written() -> None:
    _, hidden, ids, weights, standins = make_case(4, 3, 6, 24, 5)
    rows = launch_standins.inner(hidden, ids, weights, standins.inner).view(4, 3, 5)
    assert torch.equal(rows.isfinite(), (weights != 0)[..., None].expand_as(rows))
    assert 0 < int((weights != 0).sum()) < 12


def test_nan_stays_with_its_token(triton: list[int]) -> None:
    output, hidden, ids, weights, standins = make_case(4, 2, 6, 24, 3, lost=1.0)
    expected = add_standins(output, hidden, ids, weights, standins)
    hidden[1, 3], weights[2, 0] = torch.nan, torch.nan
    got = add_standins(output, hidden, ids, weights, standins)
    assert got[1:3].isnan().all()
    assert torch.equal(got[[0, 3]], expected[[0, 3]])


@pytest.mark.sanitize
def test_no_repeat_and_no_neighbour_changes_a_bit() -> None:
    output, hidden, ids, weights, standins = make_case(6, 3, 8, 100, 5)

    def run(rows: slice) -> Tensor:
        return add_with_kernels(output[rows], hidden[rows], ids[rows], weights[rows], standins)

    first = run(slice(None))
    assert torch.equal(run(slice(None)), first)
    assert torch.equal(run(slice(2, 4)), first[2:4])


def test_stand_ins_may_be_a_part_of_others_and_inputs_lie_any_way(triton: list[int]) -> None:
    case = make_case(6, 2, 5, 24, 8)
    output, hidden, ids, weights, standins = case
    part = StandInWeights(standins.inner[:, :3], standins.outer[:, 2:5], standins.bias)
    whole = StandInWeights(part.inner.contiguous(), part.outer.contiguous(), part.bias)
    turned = StandInWeights(
        whole.inner.mT.contiguous().mT, whole.outer.mT.contiguous().mT, torch.stack([part.bias] * 2, -1)[..., 0]
    )
    expected = add_standins(output, hidden, ids, weights, whole)
    assert_adds_what_the_reference_adds(expected, (output, hidden, ids, weights, whole))
    strided = [torch.stack([x, x], -1)[..., 0] for x in (output, hidden, ids, weights)]
    for own in (part, turned):
        assert not own.inner.is_contiguous()
        assert torch.equal(add_standins(*strided, own), expected)


@pytest.mark.parametrize("word", ["auto", "loop", "grouped_mm", "reference"])
def test_other_words_leave_it_to_torch(triton: list[int], monkeypatch, word: str) -> None:
    case = make_case(4, 2, 6, 24, 3)
    monkeypatch.setenv("LYNX_KERNELS", word)
    got = add_standins(*case)
    torch.testing.assert_close(got.double(), reference_standins(*case), rtol=1e-4, atol=1e-4)
    assert triton == ([4] if DEVICE == "cuda" and word == "auto" else [])


@pytest.mark.parametrize("T", [257, 300])
def test_larger_batches_are_left_to_torch(triton: list[int], T: int) -> None:
    case = make_case(T, 2, 6, 24, 3)
    torch.testing.assert_close(add_standins(*case).double(), reference_standins(*case), rtol=1e-4, atol=1e-4)
    assert not triton
    assert why_not_standins(case[4], T) == f"the kernels are for at most 256 tokens, not {T}"


def test_what_the_kernels_do_not_take_is_left_to_torch(triton: list[int]) -> None:
    output, hidden, ids, weights, standins = make_case(2, MAX_TOP_K + 1, 40, 24, 3)
    wide = standins.to(hidden.double())
    many, few = (output, hidden, ids, weights), (output, hidden, ids[:, :2], weights[:, :2])
    add_standins(*many, standins)
    add_standins(*few, wide)
    add_standins(output.double(), *few[1:], standins)
    assert not triton
    assert "torch.float64" in why_not_standins(wide)
    add_standins(*few, standins)
    assert triton == [2]


@pytest.mark.parametrize("wanted", ["output", "hidden", "weights", "inner", "outer", "bias"])
def test_gradients_are_left_to_torch(triton: list[int], wanted: str) -> None:
    case = make_case(3, 2, 5, 24, 3)
    names = dict(zip(("output", "hidden", "ids", "weights"), case, strict=False))
    variable = names[wanted] if wanted in names else getattr(case[4], wanted)
    variable.requires_grad_()
    (gradient,) = torch.autograd.grad(add_standins(*case).sum(), variable)
    assert gradient.abs().sum() > 0
    assert not triton
    with torch.no_grad():
        add_standins(*case)
    assert triton == [3]


def test_where_triton_does_not_run_it_is_refused_if_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    case = make_case(3, 2, 5, 24, 3)
    monkeypatch.setenv("LYNX_KERNELS", "auto")
    add_standins(*case)
    assert why_not_standins(case[4]) == "triton is not installed"
    monkeypatch.setenv("LYNX_KERNELS", "triton")
    with pytest.raises(ValueError, match="LYNX_KERNELS='triton' cannot run these stand-ins: triton is not installed"):
        add_standins(*case)
    monkeypatch.setenv("LYNX_KERNELS", "cuda")
    with pytest.raises(ValueError, match="Unknown LYNX_KERNELS='cuda'"):
        add_standins(*case)


def test_a_device_on_which_nothing_launches_is_tried_once(triton: list[int], monkeypatch) -> None:
    tried = []
    monkeypatch.setattr(backends, "_trials", {})
    monkeypatch.setattr(backends, "_first_launch", lambda device: tried.append(device) or "a first launch failed")
    case = make_case(3, 2, 5, 24, 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="a first launch failed"):
            add_standins(*case)
    assert len(tried) == 1
    assert not triton


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_other_shapes_are_refused(triton: list[int], wrong: int) -> None:
    case = list(make_case(3, 2, 5, 24, 3))
    case[wrong] = case[wrong][:, :1]
    with pytest.raises(ValueError, match=r"take output and hidden states \(3, 24\) for ids \(3, 2\)"):
        add_standins(*case)


def test_torch_compile_takes_it_whole_and_once_for_all_layers(triton: list[int]) -> None:
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layers = [make_case(5, 3, 6, 24, 4, seed=seed) for seed in range(3)]
    with torch.no_grad():
        compiled = torch.compile(add_standins, backend=count, fullgraph=True)
        for case in layers:
            assert torch.equal(compiled(*case), add_standins(*case))
        assert len(graphs) == 1
        assert "lynx.standins" in graphs[0].code
        whole = torch.compile(add_standins, backend="aot_eager", fullgraph=True)
        assert torch.equal(whole(*layers[0]), add_standins(*layers[0]))
    torch.compiler.reset()


def test_the_op_keeps_its_promises() -> None:
    output, hidden, ids, weights, standins = make_case(5, 3, 6, 24, 4, (torch.bfloat16,) * 4)
    parts = (standins.inner, standins.outer, standins.bias)
    torch.library.opcheck(launch_standins.standins_op, (output, hidden, ids, weights, *parts))
