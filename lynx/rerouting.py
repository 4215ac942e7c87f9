"""Re-routing: every token gets its best experts among those that stay active.

This is where the core's guarantees are made, whatever a strategy returned. The functions are plain tensor code of
static shape: no host synchronisation, nothing that a CUDA graph or ``torch.compile`` could not own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lynx.kernels.plan import Plan
from lynx.routing import Role, Routing, WeightRule, log_score_of
from lynx.strategy import Keep


@dataclass(frozen=True, slots=True)
class Rerouted:
    """A batch's routing after selection.

    Attributes:
        ids: ``(T, k)``, dtype of the host's ids. Empty slots repeat the row's best kept expert.
        weights: ``(T, k)``, dtype of the host's weights. Empty slots have weight 0.
        lost: ``(T, k)`` bool: own slots left out, re-picked or not.
        own_ids: ``(T, k)``: the router's own ids, as it gave them.
        own_weights: ``(T, k)``: the router's own weights.
        plan: The execution plan of the new ids and weights (see :class:`lynx.kernels.Plan`), where the fused kernel
            made one beside them.
        answered: ``(T, k)`` float32: with stand-ins, the weight of each lost slot's, 0 where there is none.
        known_lost_ids: What `lost_ids` gives, where a kernel wrote it down beside the rest.
    """

    ids: Tensor
    weights: Tensor
    lost: Tensor
    own_ids: Tensor
    own_weights: Tensor
    plan: Plan | None = None
    answered: Tensor | None = None
    known_lost_ids: Tensor | None = None

    @property
    def lost_ids(self) -> Tensor:
        """``(T, k)``: the expert of every lost slot, 0 where nothing was lost."""
        if self.known_lost_ids is not None:
            return self.known_lost_ids
        return self.own_ids.masked_fill(~self.lost, 0)

    @property
    def lost_weights(self) -> Tensor:
        """``(T, k)``: the original weight of every lost slot, 0 where nothing was lost."""
        return self.own_weights.masked_fill(~self.lost, 0.0)


def reroute(routing: Routing, keep: Keep) -> Rerouted:
    """Move OPEN tokens off experts that are not kept.

    A row that loses nothing gets its original ids and weights back, bit for bit; so do EXACT and PADDING rows.

    Args:
        routing: The model's own decision.
        keep: What stays active. Experts woken by EXACT rows are added here.

    Returns:
        New ids and weights, and what each token lost.
    """
    ids = routing.slot_ids
    allowed = keep.active | routing.woken.unsqueeze(-2)
    allowed = allowed.expand(routing.choice.shape)
    open_slots = routing.open_rows.unsqueeze(-1) & routing.routed
    lost = open_slots & ~allowed.gather(-1, ids)
    fresh, filled = _candidates(routing, allowed, lost, keep.refill)

    rank = routing.slot_rank
    # A row that would be left without any expert keeps its own best one.
    stranded = (lost | ~routing.routed).all(-1, keepdim=True) & ~filled.any(-1, keepdim=True)
    lost = lost & ~(stranded & (rank == 0))
    filled = filled & lost

    kept_rank = rank.masked_fill(lost | ~routing.routed, routing.num_experts)
    best_kept = ids.gather(-1, kept_rank.argmin(-1, keepdim=True))
    kept_any = (kept_rank < routing.num_experts).any(-1, keepdim=True)
    # fresh candidates are in order of choice, so the first lost slot holds the best of them
    best = torch.where(kept_any, best_kept, fresh.gather(-1, lost.int().argmax(-1, keepdim=True)))

    new_ids = torch.where(lost, torch.where(filled, fresh, best), routing.ids.long())
    new_weights = _combine_weights(routing, new_ids, lost, filled)

    sound = torch.isfinite(new_weights).all(-1, keepdim=True)
    lost = lost & sound
    changed = lost.any(-1, keepdim=True)
    return Rerouted(
        ids=torch.where(changed, new_ids.to(routing.ids.dtype), routing.ids),
        weights=torch.where(changed, new_weights.to(routing.weights.dtype), routing.weights),
        lost=lost,
        own_ids=routing.ids,
        own_weights=routing.weights,
    )


def stacked(steps: Sequence[Rerouted], shape: torch.Size) -> Rerouted:
    """Put steps together that were taken one after the other, with leading dimensions of ``shape``."""

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).reshape(*shape, *parts[0].shape)

    answered = [step.answered for step in steps if step.answered is not None]
    return Rerouted(
        joined([step.ids for step in steps]),
        joined([step.weights for step in steps]),
        joined([step.lost for step in steps]),
        joined([step.own_ids for step in steps]),
        joined([step.own_weights for step in steps]),
        answered=joined(answered) if len(answered) == len(steps) else None,
    )


def own_top_k(choice: Tensor, logits: Tensor, top_k: int, rule: WeightRule) -> tuple[Tensor, Tensor]:
    """Decide as a router does: each token's best experts by ``choice``, ties by lowest id.

    Args:
        choice: ``(T, E)`` float32, ``-inf`` is forbidden.
        logits: ``(T, E)`` float32.
        top_k: k.
        rule: How weights follow from logits.

    Returns:
        ``(T, k)`` int64 ids, best first, and ``(T, k)`` float32 weights.
    """
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[..., :top_k]
    scores = log_score_of(rule, logits).gather(-1, ids)
    renormalise = rule.renormalise or rule.score == "softmax_over_chosen"
    return ids, (torch.softmax(scores, dim=-1) if renormalise else scores.exp()) * rule.scale


def unsound_rows(routing: Routing) -> Tensor:
    """``(T,)`` bool: rows whose scores are NaN or +inf, or whose weights are not finite."""
    scores = (routing.choice < torch.inf).all(-1) & (routing.logits < torch.inf).all(-1)
    return ~(scores & torch.isfinite(routing.weights).all(-1))


def leave_exact(routing: Routing, rows: Tensor) -> Tensor:
    """Return ``role`` with the OPEN rows among ``rows`` ``(T,)`` turned EXACT."""
    exact = torch.full_like(routing.role, int(Role.EXACT))
    return torch.where(rows & routing.open_rows, exact, routing.role)


def _candidates(routing: Routing, allowed: Tensor, lost: Tensor, refill: bool | Tensor) -> tuple[Tensor, Tensor]:
    """Find each lost slot's replacement.

    Returns:
        ``(T, k)`` int64 expert ids in order of choice along the lost slots, and ``(T, k)`` bool where one exists.
    """
    if not routing.rule.repick or refill is False:
        return routing.slot_ids, torch.zeros_like(lost)
    own = routing.spread(torch.ones_like(lost))
    choice = routing.choice.masked_fill(~allowed | own, -torch.inf)
    best = torch.sort(choice, dim=-1, descending=True, stable=True)  # stable: ties go to the lowest id
    nth = (lost.long().cumsum(-1) - 1).clamp_min(0)
    filled = lost & (best.values.gather(-1, nth) > -torch.inf)
    if isinstance(refill, Tensor):
        filled = filled & refill
    return best.indices.gather(-1, nth), filled


def _combine_weights(routing: Routing, new_ids: Tensor, lost: Tensor, filled: Tensor) -> Tensor:
    """Weigh the chosen experts by the model's own rule; ``(T, k)`` float32, 0 for empty slots."""
    rule = routing.rule
    chosen = routing.routed & (~lost | filled)
    own = routing.weights.float()
    renormalise = rule.renormalise or rule.score == "softmax_over_chosen"
    if not rule.repick:
        kept = own.masked_fill(~chosen, 0.0)
        if renormalise:
            kept = kept / kept.sum(-1, keepdim=True) * rule.scale
        return torch.where(routing.routed, kept, own)
    gather_ids = new_ids.masked_fill(~routing.routed, 0)
    log_scores = log_score_of(rule, routing.logits).gather(-1, gather_ids)
    if renormalise:
        # A softmax over log scores is the renormalised score; dividing probabilities would underflow for a token
        # that is far from every kept expert.
        log_scores = log_scores.masked_fill(~chosen, -torch.inf)
        weights = torch.softmax(log_scores, dim=-1) * rule.scale
    else:
        weights = torch.where(lost, log_scores.exp() * rule.scale, own)
    return torch.where(chosen, weights, torch.where(routing.routed, 0.0, own))
