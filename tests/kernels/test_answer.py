"""The kernel that shares out lost slots, held to the core in torch: the same ids, weights, answers and counts."""

from dataclasses import replace

import pytest
import torch
from answer_cases import FIELDS, STEP, a_batch, assert_as_in_torch, bits, on_device, standins, with_host_slots
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx.errors import LynxWarning
from lynx.kernels import answer as room
from lynx.kernels import backends
from lynx.kernels.fused import launch_answer
from lynx.kernels.standins import MAX_TOKENS, MAX_TOP_K
from lynx.rerouting import reroute
from lynx.routing import Phase, Role, Routing, WeightRule
from lynx.selection import LayerSelection
from lynx.strategies.importance_threshold import ImportanceThreshold
from lynx.strategy import Keep, LayerInfo
from lynx.testing import make_routing
from lynx.testing.routings import specs

pytestmark = [
    pytest.mark.kernel,
    # Triton's interpreter computes in NumPy, which warns where a GPU gives inf or NaN
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned"),
]
MODES = ["blend", "stand-in"]


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Ask for the kernels, and list the calls that reach this one."""
    seen, plain = [], launch_answer.run

    def spy(own_ids, *rest):
        seen.append(own_ids.shape[0])
        return plain(own_ids, *rest)

    monkeypatch.setenv("LYNX_KERNELS", "triton")
    monkeypatch.setattr(launch_answer, "run", spy)
    return seen


@given(
    specs(max_tokens=18),
    st.sampled_from([(), (-1,), (-1, 99)]),
    st.sampled_from(MODES),
    st.booleans(),
    st.randoms(use_true_random=False),
    st.sampled_from([0.2, 0.5, 0.8]),
)
@settings(max_examples=120)
def test_as_in_torch(spec, host, mode, refill, random, share):
    routing = on_device(with_host_slots(spec.build(), host))
    active = torch.tensor([[random.random() < share for _ in range(spec.experts)]], device=DEVICE)
    known = torch.tensor([random.random() < 0.8 for _ in range(spec.experts)])
    plain = reroute(routing, Keep(active, refill))
    result = assert_as_in_torch(standins(spec.experts, mode, known), routing, plain)
    assert result.known_lost_ids is result.lost_ids
    assert ((result.lost_ids >= 0) & (result.lost_ids < spec.experts)).all()
    assert (result.ids is plain.ids) == (mode == "blend")


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", list(STEP))
@pytest.mark.parametrize("ids", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_any_dtypes(mode, weights, ids):
    routing, plain = a_batch(9, weights_dtype=weights, experts=128, top_k=8)
    routing = replace(routing, ids=routing.ids.to(ids))
    plain = replace(plain, ids=plain.ids.to(ids), own_ids=routing.ids)
    result = assert_as_in_torch(standins(128, mode), routing, plain)
    assert result.answered.any()


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 5, 17, MAX_TOKENS])
def test_any_number_of_tokens_in_tiles_of_any_size(monkeypatch, mode, tokens):
    phases, roles = [Phase.PREFILL, Phase.DECODE], [Role.OPEN, Role.OPEN, Role.PADDING]  # exact rows would wake all
    many = {"phases": (phases * tokens)[:tokens], "roles": (roles * tokens)[:tokens]}
    routing, plain = a_batch(tokens, seed=2, **many)
    made = standins(16, mode)
    whole = assert_as_in_torch(made, routing, plain)
    assert whole.answered.any()
    monkeypatch.setattr(launch_answer, "TILE", 16)
    tiled = assert_as_in_torch(made, routing, plain)
    for name in ("ids", "weights", "answered", "lost_ids"):
        assert torch.equal(getattr(whole, name), getattr(tiled, name))


def test_each_phase_has_its_own_sum_and_its_own_most():
    routing, plain = a_batch(12, seed=1, phases=[Phase.PREFILL, Phase.DECODE, Phase.DECODE] * 4)
    made = standins(16)
    routing.phase[made.answer(routing, plain).answered.sum(-1).argmax()] = 7  # of no phase
    counted = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
    result = made.answer_and_count(routing, plain, counted)
    share = routing.slot_mass.masked_fill(result.answered == 0, 0).sum(-1).double()
    rows = [routing.phase == phase for phase in Phase]
    wanted = [*(share[r].sum().item() for r in rows), *(share[r].max().item() for r in rows)]
    assert counted.flatten().tolist() == pytest.approx(wanted)
    assert len(set(counted.flatten().tolist())) == 4
    made.answer_and_count(routing, plain, counted)
    assert counted[0].tolist() == pytest.approx([2 * share[r].sum().item() for r in rows])
    assert counted[1].tolist() == pytest.approx([share[r].max().item() for r in rows])


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 4), (3, 0)])
def test_nothing_to_share_out(tokens, top_k):
    ids = torch.zeros(tokens, top_k, dtype=torch.int64, device=DEVICE)
    weights, lost = torch.zeros(tokens, top_k, device=DEVICE), torch.zeros(tokens, top_k, device=DEVICE).bool()
    rows = torch.zeros(tokens, 16, device=DEVICE), torch.ones(16, device=DEVICE).bool()
    phase, counted = torch.zeros(tokens, device=DEVICE).to(torch.int8), torch.ones(2, 2, device=DEVICE).double()
    done = room.answer(ids, weights, ids, weights, lost, *rows, phase, counted, 0.0)
    assert all(part.shape == ids.shape for part in done)
    assert (counted == 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_lost_nothing_keeps_its_bits(mode):
    """Whatever they stand for; a row beside it is answered for."""
    routing, plain = a_batch(6, seed=4, weights_dtype=torch.bfloat16)
    odd = torch.tensor([-0.0, torch.inf, torch.nan, -1.0], dtype=torch.bfloat16, device=DEVICE)
    for tensor in (routing.weights, plain.weights):
        tensor[0] = odd
    routing.choice[0] = torch.nan
    plain.lost[0] = False
    counted = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
    result = standins(16, mode).answer_and_count(routing, plain, counted)
    assert torch.equal(bits(result.weights[0]), bits(odd))
    assert not result.answered[0].any()
    assert result.answered.any()
    assert counted.isfinite().all()


def test_a_lost_slot_repeats_the_best_kept_expert_of_lowest_id():
    choice = torch.tensor([[1.0, 3.0, 3.0, 5.0, 2.0]], device=DEVICE)
    ids, weights = torch.tensor([[3, 2, 0, 1]], device=DEVICE), torch.tensor([[0.4, 0.2, 0.1, 0.3]], device=DEVICE)
    lost = torch.tensor([[True, False, False, False]], device=DEVICE)
    given = torch.tensor([[4, 2, 0, 1]], device=DEVICE), torch.full((1, 4), 0.25, device=DEVICE)
    rest = torch.ones(5, device=DEVICE).bool(), torch.ones(1, device=DEVICE).to(torch.int8)
    done = room.answer(ids, weights, *given, lost, choice, *rest, torch.zeros(2, 2, device=DEVICE).double(), 0.0)
    assert done.ids.tolist() == [[1, 2, 0, 1]]
    assert torch.equal(done.weights, weights.masked_fill(lost, 0))
    assert done.lost_ids.tolist() == [[3, 0, 0, 0]]


def test_what_is_no_expert_is_never_lost_and_never_read():
    """Also where a batch says that it is lost, or has more experts than there are stand-ins."""
    routing, plain = a_batch(4, seed=4)
    known = torch.ones(8, dtype=torch.bool, device=DEVICE)
    own_ids, lost = routing.ids.clone(), torch.zeros_like(plain.lost)
    own_ids[0, 0], own_ids[1, 0], own_ids[2, 0], own_ids[3] = 2**31 + 1, -5, 12, torch.arange(4)
    lost[:, 0] = True
    counted = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
    given = own_ids, routing.weights, plain.ids, plain.weights, lost
    done = room.answer(*given, routing.choice, known, routing.phase, counted, 0.3)
    assert done.lost_ids[:, 0].tolist() == [0, 0, 12, 0]
    assert (done.answered != 0).nonzero().tolist() == [[3, 0]]
    assert torch.equal(done.weights[:3], plain.weights[:3])


def selection(mode: str = "blend", experts: int = 16, placed: bool = True, **options) -> LayerSelection:
    info = LayerInfo("layer", 0, experts, 4, WeightRule())
    made = LayerSelection(info, ImportanceThreshold(ratio=0.6, **options), standins=standins(experts, mode))
    if placed:
        made.place(torch.device(DEVICE))
    return made


@pytest.mark.parametrize("mode", MODES)
def test_selection_takes_the_kernel_where_it_runs(monkeypatch, launched, mode):
    routing = on_device(make_routing(tokens=9, seed=6))
    fused = selection(mode)
    result = fused(routing)
    assert launched == [9]
    assert result.known_lost_ids is not None
    assert (result.plan is not None) == (mode == "blend")
    fused(on_device(make_routing(tokens=MAX_TOKENS + 44, seed=6)))
    fused(on_device(make_routing(tokens=9, seed=6, batch=(2,))))
    assert launched == [9]
    monkeypatch.setenv("LYNX_KERNELS", "grouped_mm")
    in_torch = selection(mode, placed=False)
    expected = in_torch(routing)
    assert launched == [9]
    assert expected.known_lost_ids is None
    assert torch.equal(result.lost_ids, expected.lost_ids)
    assert torch.equal(result.ids, expected.ids)
    torch.testing.assert_close(result.weights, expected.weights)


def test_a_kernel_that_fails_is_told_once_and_torch_goes_on(monkeypatch, caplog):
    def fail(*rest):
        raise RuntimeError("no compiler")

    routing = on_device(make_routing(tokens=9, seed=6))
    expected = selection()
    whole = expected(routing)
    monkeypatch.setattr(launch_answer, "run", fail)
    broken = selection()
    with pytest.warns(LynxWarning, match="kernel of stand-ins failed in layer 'layer', which goes on in torch"):
        result = broken(routing)
    assert torch.equal(result.ids, whole.ids)
    torch.testing.assert_close(result.weights, whole.weights)
    assert result.known_lost_ids is None
    assert not broken.why_not_fused  # selection is still one launch
    assert [record.message.split()[0] for record in caplog.records] == ["lynx.kernel_failed"]
    broken(routing)  # a second warning would be an error
    expected(routing)
    one, other = (made.counters.read()[Phase.DECODE] for made in (broken, expected))
    assert one.open_rows == other.open_rows == 18
    assert one.answered_mass == pytest.approx(other.answered_mass)


def test_want_of_memory_is_not_taken_for_a_fault(monkeypatch):
    def fail(*rest):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(launch_answer, "run", fail)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        selection()(on_device(make_routing(tokens=9)))


def test_what_the_kernel_does_not_take_is_said(monkeypatch):
    ids, weights = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    known = torch.ones(4, dtype=torch.bool, device=DEVICE)

    def why_not(ids, weights):
        reason = room.why_not_answer(ids, weights, weights)
        assert room.takes_answer(ids, weights, weights, known) == (reason == "")
        return reason

    assert why_not(ids, weights) == ""
    assert why_not(ids.expand(2, 3, 2), weights.expand(2, 3, 2)) == "the kernel takes one step at a time"
    assert "at most 256 tokens, not 300" in why_not(ids[:1].expand(300, 2), weights[:1].expand(300, 2))
    wide = MAX_TOP_K + 1
    assert "up to 32 slots per token, the layer has 33" in why_not(ids[:, :1].expand(3, wide), weights)
    assert "torch.float64" in why_not(ids, weights.double())
    assert "gradients are recorded" in why_not(ids, weights.clone().requires_grad_())
    assert not room.takes_answer(ids, weights, weights, known.to("meta"))
    monkeypatch.setenv("LYNX_KERNELS", "loop")
    assert not room.takes_answer(ids, weights, weights, known)
    monkeypatch.setenv("LYNX_KERNELS", "auto")
    assert room.takes_answer(ids, weights, weights, known) == (DEVICE == "cuda")
    monkeypatch.setenv("LYNX_KERNELS", "triton")
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert why_not(ids, weights) == "triton is not installed"


def test_gradients_are_left_to_torch(launched):
    routing = on_device(make_routing(tokens=9, seed=6))
    weights = routing.weights.clone().requires_grad_()
    made = selection()
    result = made(replace(routing, weights=weights))
    assert not launched
    (gradient,) = torch.autograd.grad(result.answered.sum(), weights)
    assert gradient.any()
    with torch.no_grad():
        made(replace(routing, weights=weights))
    assert launched == [9]


@pytest.mark.parametrize("wrong", range(1, 9))
def test_other_shapes_are_refused(wrong):
    routing, plain = a_batch(5)
    known, counted = torch.ones(16, device=DEVICE).bool(), torch.zeros(2, 2, device=DEVICE).double()
    rows = routing.choice, known, routing.phase, counted
    given = [routing.ids, routing.weights, plain.ids, plain.weights, plain.lost, *rows]
    if wrong == 6:  # stand-ins may be fewer than experts
        given[0] = given[0][0]
    else:
        given[wrong] = given[wrong][1:]
    with pytest.raises(ValueError, match=r"answer takes slots \(T, k\)"):
        room.answer(*given, 0.3)


def test_what_is_not_contiguous_is_read_as_it_is():
    routing, plain = a_batch(7, seed=3)
    turned = {name: getattr(routing, name).T.contiguous().T for name in ("choice", "ids", "weights")}
    moved = {name: getattr(plain, name).T.contiguous().T for name in ("ids", "weights", "lost")}
    odd = replace(routing, **turned)
    assert_as_in_torch(standins(16, "stand-in"), odd, replace(plain, **moved, own_ids=odd.ids, own_weights=odd.weights))


@pytest.mark.parametrize("mode", MODES)
def test_torch_compile_takes_it_whole_and_once_for_all_layers(mode):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    made, again = selection(mode), selection(mode)

    def share_out(own: LayerSelection, routing: Routing):
        result = own(routing)
        return result.ids, result.weights, result.answered, result.lost_ids

    routing = on_device(make_routing(tokens=9, seed=6))
    with torch.no_grad():
        for backend in (count, "aot_eager"):
            compiled = torch.compile(share_out, backend=backend, fullgraph=True)
            expected = share_out(again, routing)
            for got, wanted in zip(compiled(made, routing), expected, strict=True):
                assert torch.equal(got, wanted)
    assert len(graphs) == 1
    assert "lynx.answer" in graphs[0].code
    assert made.counters.read() == again.counters.read()
    torch.compiler.reset()


@pytest.mark.parametrize("re_picked", [0.3, 0.0])
def test_the_op_keeps_its_promises(re_picked):
    routing, plain = a_batch(5, weights_dtype=torch.bfloat16, ids_dtype=torch.int32)
    known, counted = torch.ones(16, device=DEVICE).bool(), torch.zeros(2, 2, device=DEVICE).double()
    given = routing.ids, routing.weights, plain.ids, plain.weights, plain.lost, routing.choice, known, routing.phase
    torch.library.opcheck(launch_answer.answer_op, (*given, counted, re_picked))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_captured_graph_serves_other_batches(mode):
    inputs = on_device(make_routing(tokens=16, seed=0))
    captured, eager = selection(mode), selection(mode)
    captured(inputs)
    captured.counters.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = captured(inputs)
    for seed in range(1, 5):
        new = on_device(make_routing(tokens=16, seed=seed))
        for name in FIELDS:
            getattr(inputs, name).copy_(getattr(new, name))
        graph.replay()
        expected = eager(new)
        assert expected.answered.any()
        for name in ("ids", "weights", "answered", "lost_ids"):
            assert torch.equal(getattr(result, name), getattr(expected, name))
    assert captured.counters.read() == eager.counters.read()
