"""Batches that lost slots, stand-ins for them, and the comparison with torch of the kernel that shares them out."""

from dataclasses import replace

import torch
from cases import DEVICE

from lynx.counters import Counters
from lynx.rerouting import Rerouted, reroute
from lynx.routing import Routing
from lynx.standins import LayerStandIns
from lynx.standins_file import StandInLayer
from lynx.strategy import Keep
from lynx.testing import make_routing

FIELDS = ("choice", "logits", "ids", "weights", "role", "phase")
# On CPUs half precision is rounded towards zero by Triton's interpreter.
STEP = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def standins(experts: int, mode: str = "blend", known=None) -> LayerStandIns:
    ones, rows = torch.ones(experts, 2, 4), torch.ones(experts, 4)
    known = torch.ones(experts).bool() if known is None else known
    made = LayerStandIns(StandInLayer("layer", 0, "", ones, ones, rows, rows, known), mode)
    made.place(torch.device(DEVICE))
    return made


def on_device(routing: Routing) -> Routing:
    return replace(routing, **{name: getattr(routing, name).to(DEVICE) for name in FIELDS}, priority=None)


def with_host_slots(routing: Routing, ids) -> Routing:
    """Put a slot of the host's own in front, and another behind."""
    weights = routing.weights[:, :1] * 1.37  # of no number that could be divided in two and put together again
    columns = [torch.full_like(routing.ids[:, :1], i) for i in ids]
    front, behind = columns[:1], columns[1:]
    return replace(
        routing,
        ids=torch.cat([*front, routing.ids, *behind], -1),
        weights=torch.cat([*[weights] * len(front), routing.weights, *[weights] * len(behind)], -1),
    )


def a_batch(tokens: int, seed: int = 0, experts: int = 16, share: float = 0.5, **options) -> tuple[Routing, Rerouted]:
    """A batch, and what became of it where a share of the experts is kept."""
    routing = on_device(make_routing(tokens=tokens, experts=experts, seed=seed, **options))
    generator = torch.Generator().manual_seed(seed)
    active = (torch.rand(1, experts, generator=generator) < share).to(DEVICE)
    return routing, reroute(routing, Keep(active, True))


def bits(tensor):
    size = tensor.element_size()
    return tensor.view({2: torch.int16, 4: torch.int32}[size]) if tensor.is_floating_point() else tensor


def assert_as_in_torch(made: LayerStandIns, routing: Routing, plain: Rerouted) -> Rerouted:
    """Share out by both ways, from the same counts; both have counted as much."""
    counters, counted = Counters(), torch.tensor([[2.0, 0.25], [0.5, 0.25]], dtype=torch.float64, device=DEVICE)
    counters.answered_on(routing.ids.device).copy_(counted)
    expected = made.answer(routing, plain)
    counters.add_answered(routing, expected)
    result = made.answer_and_count(routing, plain, counted)
    for name in ("ids", "answered", "lost_ids"):
        got, wanted = getattr(result, name), getattr(expected, name)
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(bits(got), bits(wanted))
    assert result.weights.dtype == expected.weights.dtype
    off = STEP[result.weights.dtype]
    torch.testing.assert_close(result.weights, expected.weights, rtol=off, atol=2**-24 if off else 0, equal_nan=True)
    left = ~(expected.answered != 0).any(-1)
    answers = made.known[expected.lost_ids.long()] | ~expected.lost
    rows = expected.lost.any(-1) & (routing.routed & ~expected.lost).any(-1) & answers.all(-1)
    assert not (rows & left & (routing.weights.masked_fill(~expected.lost, 0) > 0).any(-1)).any()
    assert torch.equal(bits(result.weights[~rows]), bits(plain.weights[~rows]))
    assert torch.equal(result.ids[~rows], plain.ids[~rows])
    torch.testing.assert_close(counted, counters.answered_on(routing.ids.device), rtol=1e-6, atol=1e-7)
    return result
