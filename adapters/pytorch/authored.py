"""Blocks whose authors have split the forward for Lynx: see :class:`lynx.MoELayer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lynx.adapters.pytorch.reading import Unreadable
from lynx.kernels import Plan
from lynx.rerouting import own_top_k
from lynx.routing import Routing, WeightRule


@dataclass(frozen=True, slots=True)
class AuthoredReading:
    """What an author has said of a block.

    Attributes:
        num_experts: ``E``.
        top_k: ``k``.
        rule: How weights follow from logits.
        hidden_size: ``H``.
    """

    num_experts: int
    top_k: int
    rule: WeightRule
    hidden_size: int

    def route(self, block: Any, hidden: Tensor) -> Routing:
        """See :class:`lynx.adapters.pytorch.block.Reading`."""
        decided = block.route(hidden.reshape(-1, hidden.shape[-1]))
        if isinstance(decided, Routing):
            return decided
        logits = decided.float()
        ids, weights = own_top_k(logits, logits, self.top_k, self.rule)
        return Routing.of(logits, ids, weights, self.rule)

    def run(self, block: Any, hidden: Tensor, ids: Tensor, weights: Tensor, plan: Plan | None) -> Tensor:
        """See :class:`lynx.adapters.pytorch.block.Reading`."""
        routed: Tensor = block.run(hidden, ids, weights)
        return routed

    def finish(self, block: Any, hidden: Tensor, routed: Tensor, logits: Tensor) -> Any:
        """See :class:`lynx.adapters.pytorch.block.Reading`."""
        return routed.reshape(hidden.shape)


def read_authored(block: Any) -> AuthoredReading:
    """Ask a block's methods.

    Raises:
        Unreadable: They do not give what they should.
    """
    width = getattr(block, "hidden_size", None)
    if not isinstance(width, int):
        widths = [module.in_features for module in block.modules() if isinstance(module, nn.Linear)]
        if not widths:
            raise Unreadable(0, "it has no attribute hidden_size")
        width = widths[0]
    like = next((p for p in block.parameters() if p.is_floating_point()), torch.zeros(()))
    try:
        with torch.no_grad():
            decided = block.route(torch.zeros(4, width, dtype=like.dtype, device=like.device))
    except Exception as fault:  # whatever an author's code raises
        raise Unreadable(0, f"route() failed: {type(fault).__name__}: {fault}") from fault
    if isinstance(decided, Routing):
        return AuthoredReading(decided.num_experts, decided.top_k, decided.rule, width)
    if not isinstance(decided, Tensor) or decided.ndim != 2 or decided.shape[0] != 4:
        raise Unreadable(0, "route() returns neither logits (T, E) nor a lynx.Routing")
    top_k, rule = getattr(block, "top_k", None), getattr(block, "rule", None)
    if not isinstance(top_k, int):
        raise Unreadable(0, "route() returns logits, so the block needs an attribute top_k")
    return AuthoredReading(decided.shape[-1], top_k, rule if isinstance(rule, WeightRule) else WeightRule(), width)
