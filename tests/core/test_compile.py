"""The hot path traces whole, never waits for the device, and has no shape that depends on data."""

import pytest
import torch
from support import assert_same, layer_of
from torch.utils._python_dispatch import TorchDispatchMode

import lynx
from lynx.plugins import registry
from lynx.routing import Phase, Role, Routing
from lynx.selection import LayerSelection
from lynx.testing import make_routing

EXAMPLES = {name: found.cls.example() for name, found in registry().strategies.items()}
EXAMPLES["phase-aware-both"] = lynx.make_strategy(
    {"name": "phase-aware", "prefill": {"name": "top-budget", "budget": 3}, "decode": {"name": "static-top", "top": 1}}
)
EXAMPLES["importance-threshold-mass"] = lynx.make_strategy("importance-threshold", mass=0.6)
FIELDS = ("ids", "weights", "lost", "lost_ids", "lost_weights")

# What reads a value on the host, or makes a tensor whose size is one.
WAITS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "bincount",
)


class NoWaiting(TorchDispatchMode):
    """Raises on operations that would wait for the device; index with a bool mask is nonzero in disguise."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        name = func._schema.name.removeprefix("aten::")
        assert name not in WAITS, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a mask as an index"
        return func(*args, **(kwargs or {}))


def batch(seed=0, tokens=6):
    roles = [Role.OPEN, Role.EXACT, Role.OPEN, Role.PADDING, Role.OPEN, Role.OPEN][:tokens]
    phases = [Phase.DECODE, Phase.DECODE, Phase.PREFILL, Phase.DECODE, Phase.DECODE, Phase.PREFILL][:tokens]
    return make_routing(tokens=tokens, experts=16, top_k=4, roles=roles, phases=phases, seed=seed)


def forward(selection, rule):
    """The hot path as an adapter calls it: tensors in, tensors out."""

    def run(choice, logits, ids, weights, role, phase):
        result = selection(Routing(choice, logits, ids, weights, role, phase, rule))
        return tuple(getattr(result, name) for name in FIELDS)

    return run


def tensors(routing):
    return tuple(getattr(routing, name) for name in ("choice", "logits", "ids", "weights", "role", "phase"))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", sorted({*EXAMPLES} - {"importance-threshold-mass"}))
def test_the_hot_path_traces_whole(name):
    """A strategy's keep, re-routing and counters, in one graph that serves every batch of its shape."""
    routing = batch()
    plain = LayerSelection(layer_of(routing), EXAMPLES[name])
    traced = LayerSelection(layer_of(routing), EXAMPLES[name])
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    traced(routing)  # as after warm-up: counters are there
    plain(routing)
    compiled = torch.compile(forward(traced, routing.rule), fullgraph=True, backend=backend)
    for seed in range(3):
        routing = batch(seed)
        expected = plain(routing)
        for got, field in zip(compiled(*tensors(routing)), FIELDS, strict=True):
            assert_same(got, getattr(expected, field))
    assert len(graphs) == 1
    assert traced.counters.read() == plain.counters.read()
    assert traced.counters.failures == 0


def test_the_first_batch_may_be_traced_too():
    routing = batch()
    selection = LayerSelection(layer_of(routing), EXAMPLES["batch-union"])
    compiled = torch.compile(forward(selection, routing.rule), fullgraph=True, backend="eager")
    compiled(*tensors(routing))
    assert selection.counters.read()[Phase.DECODE].steps == 1


@pytest.mark.parametrize("batch_dims", [(), (3,)], ids=["batch", "batches"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_waits_for_the_device(name, batch_dims):
    roles = [Role.OPEN, Role.EXACT, Role.OPEN, Role.PADDING]
    phases = [Phase.DECODE, Phase.DECODE, Phase.PREFILL, Phase.DECODE]
    routing = make_routing(tokens=4, experts=16, top_k=4, roles=roles, phases=phases, batch=batch_dims, priority=True)
    selection = LayerSelection(layer_of(routing), EXAMPLES[name])
    with NoWaiting() as mode:
        selection(routing)
        selection.observe(routing)
    assert mode.seen > 50


def test_the_mode_sees_what_waits():
    """The test above can fail."""
    for wait in (
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.unique(),
    ):
        with pytest.raises(AssertionError), NoWaiting():
            wait(torch.ones(3))


@pytest.mark.parametrize("name", EXAMPLES)
def test_shapes_do_not_depend_on_data(name):
    """On fake tensors there is no data to depend on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    routing = batch()
    selection = LayerSelection(layer_of(routing), EXAMPLES[name])
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in tensors(routing)]
        out = forward(selection, routing.rule)(*fake)
    assert selection.counters.failures == 0
    assert [(tuple(t.shape), t.dtype) for t in out] == [
        ((6, 4), torch.int64),
        ((6, 4), torch.float32),
        ((6, 4), torch.bool),
        ((6, 4), torch.int64),
        ((6, 4), torch.float32),
    ]


def test_counters_may_be_made_in_inference_mode():
    routing = batch()
    selection = LayerSelection(layer_of(routing), EXAMPLES["batch-union"])
    with torch.inference_mode():
        selection(routing)
    selection(routing)
    assert selection.counters.read()[Phase.DECODE].steps == 2
