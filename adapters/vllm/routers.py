"""Routers with a place for a hook, and what is known of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lynx.adapters.rules import Answers, ChoiceRule, choice_rule, weight_rule
from lynx.errors import UnsupportedModelError
from lynx.routing import WeightRule

ROUTING = ("self", "hidden_states", "router_logits", "indices_type", "input_ids")
"""The arguments of `_compute_routing` that are known; a router with others is not taken."""
_ROWS = 64
_NO_HOOK = -1


def make_room(router: Any) -> None:
    """Turn a router into one that hands its decision to a hook, if one is set.

    A subclass is put in the place of its class: a second base would not fit the object.

    Raises:
        UnsupportedModelError: It does not route as the routers that are known.
    """
    kind: Any = type(router)
    given = tuple(inspect.signature(getattr(kind, "_compute_routing", lambda: None)).parameters)
    if given != ROUTING:
        raise UnsupportedModelError(
            f"vLLM's {kind.__name__} routes by _compute_routing({', '.join(given[1:])}), not by "
            f"({', '.join(ROUTING[1:])}): this vLLM is not known; the vLLM page of the docs lists the versions tried."
        )
    router.__class__ = _subclass(kind)
    router.lynx_number, router.lynx_seen, router.lynx_experts = _NO_HOOK, False, ""


def has_room(router: Any) -> bool:
    """Whether `make_room` has seen a router."""
    return hasattr(router, "lynx_number")


def set_hook(router: Any, number: int = _NO_HOOK) -> None:
    """Set the number of a router's hook; without one the router is as vLLM made it."""
    router.lynx_number = number


def see(model: nn.Module) -> None:
    """Note of all routers of a model that it was seen when it had been loaded."""
    for module in model.modules():
        router: Any = getattr(module, "router", None)
        if has_room(router):
            router.lynx_seen = True


def _check_seen(router: Any) -> None:
    """Raise in the first step of a model that was loaded past Lynx: it would never select."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if is_forward_context_available() and get_forward_context().attn_metadata is not None:
        raise UnsupportedModelError(
            "Lynx is configured, but this model was loaded in a way that it does not know; use another --load-format "
            "(auto, for instance), or take the configuration of Lynx out."
        )


@cache
def _subclass(kind: type[Any]) -> type[Any]:
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType

    def _compute_routing(
        self: Any,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        weights, ids = kind._compute_routing(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        if self.lynx_number == _NO_HOOK:
            if not self.lynx_seen:
                _check_seen(self)
            return weights, ids
        selected: tuple[Tensor, Tensor] = torch.ops.lynx.vllm_select(router_logits, weights, ids, self.lynx_number)
        return selected

    # What kernels are told that would route by themselves: this is not a way of routing that they know.
    custom = property(lambda self: RoutingMethodType.Custom)
    body = {
        "_compute_routing": _compute_routing,
        "routing_method_type": custom,
        "supports_monolithic_kernels": property(lambda self: False),
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), body)


@dataclass(frozen=True, slots=True)
class RouterRules:
    """What is known of a router.

    Attributes:
        choice: What it ranks experts by.
        weights: How it weighs them; ``repick`` is False where no known rule fits.
        notes: What a user should know.
    """

    choice: ChoiceRule
    weights: WeightRule
    notes: tuple[str, ...]


def find_rules(router: Any, num_experts: int, hidden_size: int, device: torch.device) -> RouterRules:
    """Ask a router for its decision on random logits, and find the rules that give the same.

    Args:
        router: With room for a hook, or not.
        num_experts: ``E``, the width of its logits.
        hidden_size: ``H``.
        device: Where it routes.
    """
    E = num_experts
    generator = torch.Generator().manual_seed(0)
    # of standard deviation 2: wide enough to tell rules apart, narrow enough that no score saturates
    logits = (torch.randn(_ROWS, E, generator=generator) * 2).to(device)
    bias = getattr(router, "e_score_correction_bias", None)
    bias = None if bias is None else bias.detach().float().to(device)
    with torch.no_grad():
        hidden = torch.zeros(_ROWS, hidden_size, device=device)
        weights, ids = router._compute_routing(hidden, logits.clone(), None, input_ids=None)
    k = min(router.top_k, ids.shape[1])  # fused shared experts have slots of their own behind
    found = Answers(logits, weights[:, :k].float(), ids[:, :k].long(), bias)
    if not bool(((found.ids >= 0) & (found.ids < E)).all()):
        return RouterRules(ChoiceRule(), WeightRule(renormalise=False, repick=False), ("it gives out other ids",))
    rule = weight_rule(found)
    groups, kept = (int(getattr(router, name, None) or 1) for name in ("num_expert_group", "topk_group"))
    name = None if bias is None else "e_score_correction_bias"
    choice = choice_rule(found, rule.score if rule is not None else "softmax", name, groups, kept)
    notes = []
    if choice is None:
        notes.append("what the router ranks experts by is not known; tokens only keep or lose their own experts")
    if rule is None:
        notes.append("no known weight rule fits; tokens only keep or lose their own experts")
    return RouterRules(
        choice=choice or ChoiceRule(),
        weights=replace(rule or WeightRule(renormalise=False), repick=not notes),
        notes=tuple(notes),
    )
