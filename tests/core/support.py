"""Small helpers of these tests."""

from dataclasses import replace

import torch

from lynx.routing import Phase, Role, Routing, WeightRule
from lynx.strategy import LayerInfo
from lynx.testing.transforms import take_rows


def bits(tensor):
    """Floats as integers, so that NaN equals NaN and 0 does not equal -0."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same(one, other):
    """Equal in every bit."""
    assert one.dtype == other.dtype
    assert torch.equal(bits(one), bits(other))


def with_host_slots(routing, ids):
    """Add slots that belong to the host, such as fused shared experts: the first in front, the second behind."""
    shape = (*routing.ids.shape[:-1], 1)
    columns = [torch.full(shape, i, dtype=routing.ids.dtype) for i in ids]
    weights = [torch.full(shape, 0.5, dtype=routing.weights.dtype) for _ in ids]
    return replace(
        routing,
        ids=torch.cat([*columns[:1], routing.ids, *columns[1:]], dim=-1),
        weights=torch.cat([*weights[:1], routing.weights, *weights[1:]], dim=-1),
    )


def at(routing, index):
    """Take one of the independent batches, or rows."""
    return take_rows(routing, index)


def routing_of(choice, ids, weights, rule=None, role=None, phase=None):
    """A routing from nested lists whose choice scores are its logits; all rows OPEN and decode by default."""
    choice = torch.tensor(choice)
    rows = choice.shape[0]
    return Routing(
        choice=choice,
        logits=choice.clone(),
        ids=torch.tensor(ids),
        weights=torch.tensor(weights),
        role=torch.tensor([int(r) for r in role or [Role.OPEN] * rows], dtype=torch.int8),
        phase=torch.tensor([int(p) for p in phase or [Phase.DECODE] * rows], dtype=torch.int8),
        rule=rule or WeightRule(),
    )


def layer_of(routing, index=0, num_layers=4, expert_bytes=0):
    """The layer that a routing could come from."""
    return LayerInfo("layer", index, routing.num_experts, routing.top_k, routing.rule, expert_bytes, num_layers)


def members(mask):
    """A ``(E,)`` mask as a set."""
    return {e for e, on in enumerate(mask.tolist()) if on}
