"""One MoE layer's routing decision for one batch, and what a strategy may ask of it."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from enum import IntEnum
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# What is summed to be compared is summed in integers of 2**-40: exact, so the sum does not depend on the order of its
# terms. Two ranks that see the same batch choose the same experts, and so do two kernels.
_UNITS = 2.0**40


class Role(IntEnum):
    """What a row of the batch may do."""

    PADDING = 0
    """Not a token: never votes, never counts, and its slots are left as the host wants them."""
    EXACT = 1
    """A token whose routing must not change; its experts are active in any case, free for other rows."""
    OPEN = 2
    """A token that the strategy may re-route."""


class Phase(IntEnum):
    """What a row is doing."""

    PREFILL = 0
    DECODE = 1


Score = Literal["softmax", "sigmoid", "sqrt_softplus", "softmax_over_chosen"]


@dataclass(frozen=True, slots=True)
class WeightRule:
    """How a router turns logits into combine weights.

    Attributes:
        score: Function from logits to scores. ``softmax_over_chosen`` is a softmax over the chosen logits only,
            which is the same as ``softmax`` with ``renormalise``.
        renormalise: Whether the chosen scores are divided by their sum.
        scale: Constant factor on every weight.
        repick: False where the weight of an expert the router did not choose cannot be derived (sparsemixer
            routers): a row then only keeps or loses its own experts.
    """

    score: Score = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    repick: bool = True


@dataclass(frozen=True, slots=True)
class Slots:
    """What follows from a token's own ``k`` slots alone, worked out once per batch.

    Attributes:
        routed: ``(T, k)`` bool, see :attr:`Routing.routed`.
        ids: ``(T, k)`` int64, see :attr:`Routing.slot_ids`.
        target: ``(T, k)`` int64 to scatter with: one column more than there are experts takes the host's own ids.
        parts: ``(T, k)`` int64: combine weights in units of 2**-40 of the row's largest.
        total: ``(T, 1)`` int64: sum of a row's parts, at least 1.
        mass: ``(T, k)`` float32, see :attr:`Routing.slot_mass`.
        better: ``(T, k, k)`` bool, see :attr:`Routing.slot_better`.
        rank: ``(T, k)`` int64, see :attr:`Routing.slot_rank`.
    """

    routed: Tensor
    ids: Tensor
    target: Tensor
    parts: Tensor
    total: Tensor
    mass: Tensor
    better: Tensor
    rank: Tensor

    @classmethod
    def of(cls, choice: Tensor, host_ids: Tensor, host_weights: Tensor) -> Slots:
        """Work them out from a router's decision."""
        num_experts = choice.shape[-1]
        foreign = (host_ids < 0) | (host_ids >= num_experts)
        routed = ~foreign
        ids = host_ids.long().masked_fill(foreign, 0)
        weights = host_weights.float().masked_fill(foreign, 0.0).clamp_min(0.0)
        largest = weights.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        parts = (weights / largest * _UNITS).long()
        total = parts.sum(-1, keepdim=True).clamp_min(1)
        mass = parts.float() / total.float()
        value = choice.gather(-1, ids)
        mine, other = value.unsqueeze(-1), value.unsqueeze(-2)
        better = (other > mine) | ((other == mine) & (ids.unsqueeze(-2) < ids.unsqueeze(-1)))
        better = (better | foreign.unsqueeze(-1)) & routed.unsqueeze(-2)
        return cls(routed, ids, ids.masked_fill(foreign, num_experts), parts, total, mass, better, better.sum(-1))


class _Once:
    """Holds what follows from the slots once somebody has asked for it; shared by routings of the same decision."""

    __slots__ = ("slots",)

    def __init__(self) -> None:
        self.slots: Slots | None = None


@dataclass(frozen=True, slots=True)
class Routing:
    """The decision of one MoE layer for one batch of ``T`` tokens, ``k`` slots each, over ``E`` experts.

    All tensors live on the model's device and have static shapes. Leading dimensions are independent batches:
    ``(..., T, E)`` stands for many decode steps looked at in one call.

    Attributes:
        choice: ``(T, E)`` float32, what the router ranks experts by, after bias and group masks; ``-inf`` marks a
            forbidden expert.
        logits: ``(T, E)`` float32, unbiased router logits from which combine weights are computed.
        ids: ``(T, k)`` integer, the router's own experts in the host's order. Ids outside ``[0, E)`` belong to the
            host (fused shared or zero experts) and are never touched.
        weights: ``(T, k)``, the router's own combine weights.
        role: ``(T,)`` int8, values of :class:`Role`.
        phase: ``(T,)`` int8, values of :class:`Phase`.
        rule: How weights follow from logits.
        priority: ``(T,)`` float32 vote weights, or None for all 1.
    """

    choice: Tensor
    logits: Tensor
    ids: Tensor
    weights: Tensor
    role: Tensor
    phase: Tensor
    rule: WeightRule
    priority: Tensor | None = None
    known: InitVar[_Once | None] = None
    _once: _Once = field(init=False, repr=False, compare=False)

    def __post_init__(self, known: _Once | None) -> None:
        object.__setattr__(self, "_once", known if known is not None else _Once())

    @classmethod
    def of(
        cls, logits: Tensor, ids: Tensor, weights: Tensor, rule: WeightRule | None = None, choice: Tensor | None = None
    ) -> Routing:
        """Return a router's decision as a router sees it: every row OPEN and in decode, until somebody knows better.

        Args:
            logits: ``(T, E)``.
            ids: ``(T, k)``.
            weights: ``(T, k)``.
            rule: How the weights follow from the logits; softmax, renormalised, without one.
            choice: ``(T, E)`` what experts are ranked by; the logits without one.
        """
        values = logits.float()
        role = torch.full(ids.shape[:-1], int(Role.OPEN), dtype=torch.int8, device=ids.device)
        phase = torch.full_like(role, int(Phase.DECODE))
        ranked = values if choice is None else choice.float()
        return cls(ranked, values, ids, weights, role, phase, rule or WeightRule())

    @property
    def _slots(self) -> Slots:
        # worked out when asked for: the fused kernel never does
        if self._once.slots is None:
            self._once.slots = Slots.of(self.choice, self.ids, self.weights)
        return self._once.slots

    def with_role(self, role: Tensor) -> Routing:
        """Return the same decision with other roles ``(T,)``."""
        return Routing(
            self.choice, self.logits, self.ids, self.weights, role, self.phase, self.rule, self.priority, self._once
        )

    def steps(self) -> list[Routing]:
        """Return the independent batches of leading dimensions one by one, in order."""
        count = self.role[..., 0].numel()

        def split(tensor: Tensor, own: int) -> tuple[Tensor, ...]:
            return tensor.reshape(count, *tensor.shape[-own:]).unbind(0)

        priority = [None] * count if self.priority is None else split(self.priority, 1)
        tensors = [split(tensor, 2) for tensor in (self.choice, self.logits, self.ids, self.weights)]
        rows = [split(tensor, 1) for tensor in (self.role, self.phase)]
        steps = zip(*tensors, *rows, priority, strict=True)
        return [Routing(c, x, i, w, role, phase, self.rule, p) for c, x, i, w, role, phase, p in steps]

    def copied(self) -> Routing:
        """Return an equal decision in memory of its own."""
        return Routing(
            self.choice.clone(),
            self.logits.clone(),
            self.ids.clone(),
            self.weights.clone(),
            self.role.clone(),
            self.phase.clone(),
            self.rule,
            None if self.priority is None else self.priority.clone(),
        )

    @property
    def num_experts(self) -> int:
        """``E``."""
        return self.choice.shape[-1]

    @property
    def top_k(self) -> int:
        """``k``."""
        return self.ids.shape[-1]

    @property
    def open_rows(self) -> Tensor:
        """``(T,)`` bool: the rows that vote and may be re-routed."""
        return self.role == int(Role.OPEN)

    @property
    def open_count(self) -> Tensor:
        """``()`` integer on the device (leading dimensions kept): how many rows are OPEN."""
        return self.open_rows.sum(-1)

    @property
    def routed(self) -> Tensor:
        """``(T, k)`` bool: slots that name one of the ``E`` routed experts."""
        return self._slots.routed

    @property
    def slot_ids(self) -> Tensor:
        """``(T, k)`` int64 ids that are safe to gather with; slots of the host's own kind point at expert 0."""
        return self._slots.ids

    @property
    def slot_mass(self) -> Tensor:
        """``(T, k)`` float32: a token's combine weights divided by their sum; every row sums to 1."""
        return self._slots.mass

    @property
    def slot_before(self) -> Tensor:
        """``(T, k)`` float32: the mass of a token's better own slots, in units in which the row has `slot_total`."""
        return torch.where(self.slot_better, self._slots.parts.unsqueeze(-2), 0).sum(-1).float()

    @property
    def slot_total(self) -> Tensor:
        """``(T, 1)`` float32: the mass of all of a token's own slots, in the units of `slot_before`."""
        return self._slots.total.float()

    @property
    def slot_rank(self) -> Tensor:
        """``(T, k)`` int64: rank of each own expert among the token's own by ``choice``, 0 the best, ties by lowest id.

        Slots of the host's own kind come last.
        """
        return self._slots.rank

    @property
    def slot_better(self) -> Tensor:
        """``(T, k, k)`` bool: whether own slot ``j`` (last) ranks before own slot ``i``."""
        return self._slots.better

    @property
    def own(self) -> Tensor:
        """``(T, E)`` bool: each OPEN token's own top-k; all False for other rows."""
        return self.spread(self.open_rows.unsqueeze(-1).expand(self.ids.shape))

    @property
    def rank(self) -> Tensor:
        """``(T, E)`` int64: rank of an OPEN token's own experts, ``k`` for every other expert and row."""
        shape = (*self.choice.shape[:-1], self.num_experts + 1)
        rank = torch.full(shape, self.top_k, dtype=torch.long, device=self.ids.device)
        return rank.scatter(-1, self._slots.target, self.slot_rank)[..., :-1].masked_fill(~self.own, self.top_k)

    @property
    def mass(self) -> Tensor:
        """``(T, E)`` float32: an OPEN token's normalised mass over its own experts; 0 elsewhere."""
        counted = self.routed & self.open_rows.unsqueeze(-1)
        return torch.zeros_like(self.choice).scatter_add(-1, self.slot_ids, self.slot_mass.masked_fill(~counted, 0.0))

    @property
    def certainty(self) -> Tensor:
        """``(T, 1)`` float32: the share of a token's scores, over all experts open to it, that its own experts hold.

        Near 1 where the router is sure that no other expert would do, lower where others are about as good.
        """
        scores = log_score_of(self.rule, self.logits).masked_fill(self.choice == -torch.inf, -torch.inf)
        # a row in which all are forbidden is certain of nothing
        shares = torch.softmax(scores, dim=-1).nan_to_num(0.0).gather(-1, self.slot_ids)
        return shares.masked_fill(~self.routed, 0.0).sum(-1, keepdim=True)

    @property
    def wanted(self) -> Tensor:
        """``(E,)`` bool: experts in the own top-k of at least one OPEN token (the vanilla active set)."""
        return self.own.any(-2)

    @property
    def woken(self) -> Tensor:
        """``(E,)`` bool: experts that EXACT rows use, active whatever the strategy says."""
        exact = (self.role == int(Role.EXACT)).unsqueeze(-1)
        return self.spread(exact.expand(self.ids.shape)).any(-2)

    def protected(self, protect: int) -> Tensor:
        """``(T, E)`` bool: each OPEN token's best ``protect`` experts."""
        if protect <= 0:
            return torch.zeros_like(self.choice, dtype=torch.bool)
        return self.spread((self.slot_rank < protect) & self.open_rows.unsqueeze(-1))

    def spread(self, slots: Tensor) -> Tensor:
        """Scatter a ``(T, k)`` bool over slots to ``(T, E)`` over experts."""
        wide = torch.zeros((*self.choice.shape[:-1], self.num_experts + 1), dtype=torch.int32, device=slots.device)
        # A count, not an assignment: a host may repeat an id, and which write wins would be undefined.
        return wide.scatter_add(-1, self._slots.target, slots.int())[..., :-1] > 0

    def demand(self, utility: Literal["own-mass", "normalised-own-mass", "count"] = "normalised-own-mass") -> Tensor:
        """Sum the OPEN tokens' wishes for each expert over the batch.

        Args:
            utility: ``own-mass`` sums combine weights as the model scales them, ``normalised-own-mass`` gives every
                token one vote to spread, ``count`` counts the tokens that have the expert in their own top-k.

        Returns:
            ``(E,)`` float32. The sum is exact and so independent of token order.
        """
        if utility == "count":
            votes = torch.ones_like(self.weights, dtype=torch.float32)
        elif utility == "own-mass":
            votes = self.weights.float().clamp_min(0.0)
        else:
            votes = self.slot_mass
        if self.priority is not None:
            votes = votes * self.priority.unsqueeze(-1)
        # Rows that are not OPEN contribute exactly 0, NaN included.
        counted = self.routed & self.open_rows.unsqueeze(-1)
        units = (votes * _UNITS).long().masked_fill(~counted, 0)
        summed = units.new_zeros((*units.shape[:-2], self.num_experts))
        return summed.scatter_add(-1, self.slot_ids.flatten(-2), units.flatten(-2)).float() / _UNITS


def log_score_of(rule: WeightRule, logits: Tensor) -> Tensor:
    """Logarithm of the router's scores ``(T, E)``, up to a constant per token where that cancels."""
    if rule.score == "softmax_over_chosen" or (rule.score == "softmax" and rule.renormalise):
        return logits
    if rule.score == "softmax":
        return F.log_softmax(logits, dim=-1)
    if rule.score == "sigmoid":
        return F.logsigmoid(logits)
    # softplus(x) is exp(x) to float32 precision below -20, and its logarithm x
    return 0.5 * torch.where(logits < -20.0, logits, F.softplus(logits).log())


def sum_votes(votes: Tensor) -> Tensor:
    """Sum votes ``(T, E)`` over tokens to ``(E,)``, exactly and so independently of token order."""
    return in_units(votes).sum(-2).float() / _UNITS


def in_units(votes: Tensor) -> Tensor:
    """Return votes as whole numbers, int64, whose sums are exact in any order."""
    return (votes * _UNITS).long()
