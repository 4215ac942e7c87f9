"""From a strategy to the fused route kernel: which strategies one launch can execute, and how they are handed over."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lynx.counters import Counters
from lynx.errors import ConfigError
from lynx.keep import AnyOf, ByCoverage, ByDemand, ByMass, ByPool, ByRank, ByRatio, KeepRule
from lynx.kernels.backends import requested
from lynx.kernels.route import MAX_TOKENS, RouteRule, RouteSettings, route, why_not_route
from lynx.rerouting import Rerouted
from lynx.routing import Phase, Routing
from lynx.strategy import BoundStrategy, LayerInfo, SelectionStrategy


class NotFusable(Exception):
    """A strategy is more than the route kernel can do; the message says in what."""


@dataclass(slots=True)
class FusedRoute:
    """One layer's strategy as the route kernel runs it.

    Attributes:
        rule: What the kernel is compiled for.
        settings: The layer's numbers.
        num_experts: E.
        top_k: k.
        device: Where it was last placed, whether or not the kernel can run there.
        placed: The settings on that device; None where the kernel cannot run.
    """

    rule: RouteRule
    settings: RouteSettings
    num_experts: int
    top_k: int
    device: torch.device | None = None
    placed: Tensor | None = None

    def place(self, device: torch.device) -> str:
        """Put the settings on a device; return why the kernel does not run there, empty if it does."""
        self.device, self.placed = device, None
        reason = why_not_route(device, self.num_experts, self.top_k)
        if not reason and device.type == "cpu" and requested() != "triton":
            reason = "the interpreter is slower than torch (LYNX_KERNELS=triton runs it all the same)"
        if not reason:
            with torch.inference_mode(False):  # an inference tensor could not be used outside of inference mode
                self.placed = self.settings.tensor(device)
        return reason

    def takes(self, routing: Routing) -> bool:
        """Whether a batch is of a kind that the kernel takes; known without waiting for the device."""
        choice, logits, weights = routing.choice, routing.logits, routing.weights
        return (
            self.placed is not None
            and self.device == choice.device
            and choice.ndim == 2
            and 0 < choice.shape[0] <= MAX_TOKENS
            and (choice.shape[1], routing.top_k) == (self.num_experts, self.top_k)
            and not (torch.is_grad_enabled() and (logits.requires_grad or weights.requires_grad))
        )

    def __call__(self, routing: Routing, counters: Counters) -> Rerouted:
        """Select, re-route and count in one launch."""
        assert self.placed is not None
        done = route(
            routing.choice,
            routing.logits,
            routing.role,
            routing.phase,
            self.rule,
            self.placed,
            counters.on(routing.choice.device),
            top_k=self.top_k,
            ids=routing.ids,
            weights=routing.weights,
            priority=routing.priority if self.rule.by_demand or self.rule.by_coverage else None,  # others do not ask
        )
        return Rerouted(done.ids, done.weights, done.lost, done.own_ids, done.own_weights, done.plan)


def fuse(
    name: str, bound: BoundStrategy, info: LayerInfo, exact_phases: tuple[Phase, ...], min_tokens: int
) -> FusedRoute | str:
    """Hand a bound strategy to the route kernel, or say in a few words why it stays with torch.

    Args:
        name: The strategy's name, for the words.
        bound: The strategy, bound to the layer.
        info: The layer.
        exact_phases: Phases whose rows are left exact.
        min_tokens: A batch of fewer OPEN rows is left exact.

    Raises:
        ConfigError: ``LYNX_KERNELS`` names nothing that exists.
    """
    try:
        asked = requested()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if asked not in ("auto", "triton"):
        return f"LYNX_KERNELS={asked}"
    try:
        strategy = _sole(name, bound)
        rule, settings = _translate(strategy, info)
    except NotFusable as reason:
        return str(reason)
    on = {phase: float(phase not in exact_phases) for phase in Phase}
    settings = replace(settings, min_tokens=float(min_tokens), on_prefill=on[Phase.PREFILL], on_decode=on[Phase.DECODE])
    return FusedRoute(rule, settings, info.num_experts, info.top_k)


def _sole(name: str, bound: BoundStrategy) -> SelectionStrategy:
    """The one strategy with a keep rule that a bound strategy comes down to."""
    sole = getattr(bound, "sole", bound)
    if not isinstance(sole, SelectionStrategy):
        raise NotFusable(f"{name} is no single strategy with a keep rule")
    if type(sole).select is not SelectionStrategy.select or sole.rule() is None:
        raise NotFusable(f"{sole.name} selects in torch")
    return sole


def _translate(strategy: SelectionStrategy, info: LayerInfo) -> tuple[RouteRule, RouteSettings]:
    keep = strategy.rule()
    assert keep is not None
    parts = _floored(_parts(keep), strategy.floor)
    if any(isinstance(part, ByPool) for part in parts):
        raise NotFusable(f"{strategy.name} keeps by pooled mass, which the kernel does not")
    if {ByDemand, ByCoverage} <= {type(part) for part in parts}:
        raise NotFusable(f"{strategy.name} joins a budget with a share of the demand")
    if len({type(part) for part in parts}) < len(parts):
        raise NotFusable(f"{strategy.name} joins two rules of a kind")
    shares = {_is_shared(part) for part in parts}
    if len(shares) > 1:
        raise NotFusable(f"{strategy.name} joins rules that share with rules that do not")
    rule = RouteRule(
        score=info.rule.score,
        renormalise=info.rule.renormalise,
        repick=info.rule.repick,
        refill=strategy.refill == "re-pick",
        share=shares.pop(),
    )
    settings = RouteSettings(protect=float(strategy.protect), scale=info.rule.scale)
    for part in parts:
        match part:
            case ByRank():
                rule, settings = replace(rule, by_rank=True), replace(settings, rank=float(part.top))
            case ByRatio():
                rule, settings = replace(rule, by_ratio=True), replace(settings, ratio=part.ratio)
            case ByMass():
                rule, settings = replace(rule, by_mass=True), replace(settings, mass=part.reach)
            case ByDemand():
                rule = replace(rule, by_demand=True, utility=part.utility)
                budget = -1.0 if part.budget is None else float(part.budget)
                settings = replace(settings, budget=budget, drop=float(part.drop), demand_protect=float(part.protect))
            case ByCoverage():
                rule = replace(rule, by_coverage=True, utility=part.utility)
                settings = replace(settings, cover=part.reach, demand_protect=float(part.protect))
    return rule, settings


def _floored(parts: list[KeepRule], floor: float) -> list[KeepRule]:
    """The parts with a floor among them: a rule by mass of its own, or the one there is with more of it."""
    if floor <= 0.0:
        return parts
    masses = [part for part in parts if isinstance(part, ByMass)]
    if not masses:
        return [*parts, ByMass(floor, share=all(map(_is_shared, parts)))]
    return [replace(part, mass=max(part.mass, floor)) if part is masses[0] else part for part in parts]


def _is_shared(part: KeepRule) -> bool:
    """Whether the batch shares what a rule keeps; rules for the batch as a whole have nothing else."""
    return part.share if isinstance(part, ByRank | ByRatio | ByMass) else True


def _parts(rule: KeepRule) -> list[KeepRule]:
    """A rule's parts, unions taken apart."""
    return [part for each in rule.rules for part in _parts(each)] if isinstance(rule, AnyOf) else [rule]
