"""Lynx as later published: votes in bins of confidence."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from lynx.keep import most_wanted
from lynx.routing import Routing, sum_votes
from lynx.strategy import BoundStrategy, Knob, LayerInfo, SelectionStrategy


class AffinityBinning(SelectionStrategy):
    """Keep the ``budget`` experts with the highest binned affinity.

    A token's vote for one of its own experts falls into the bin
    ``clamp(floor(alpha * (logit - best logit)), -beta, 0)`` and is worth ``B ** bin``, with ``B`` the number of open
    rows: one confident token outvotes all others one bin lower.

    Source: Lynx, arXiv 2411.08982, versions 2 and 3 (AffinityBinning). Its exact constants and its cut are not public;
    they are options here: ``alpha``, ``beta``, and the cut as a budget.
    """

    name: Literal["affinity-binning"] = "affinity-binning"
    alpha: float = Field(1.0, gt=0, allow_inf_nan=False, description="bins per unit of logit below the token's best")
    beta: int = Field(4, ge=1, description="lowest bin")
    budget: int = Field(ge=1, description="the cut: experts to keep, at most E")

    knob: ClassVar[Knob] = Knob("budget", fewest=1, full="E")

    @classmethod
    def example(cls) -> Self:
        """Return the setting used in examples."""
        return cls(budget=4)

    def bind(self, layer: LayerInfo) -> BoundStrategy:
        """Refuse a budget above the layer's ``E``."""
        self.check_at_most("budget", "E", layer)
        return self

    def select(self, routing: Routing) -> Tensor:
        """Score by bins, then cut."""
        own = routing.own
        logits = routing.logits.masked_fill(~own, -torch.inf)
        gap = torch.where(own, routing.logits - logits.amax(-1, keepdim=True), 0.0)
        depth = -(self.alpha * gap).floor().clamp(-self.beta, 0)
        base = routing.open_count.clamp_min(1).float().unsqueeze(-1)
        score = torch.zeros_like(routing.logits[..., 0, :])
        vote = torch.ones_like(gap) if routing.priority is None else routing.priority.unsqueeze(-1).expand_as(gap)
        # Votes are summed exactly per bin and added from the smallest bin up, so the sum has one order for any batch.
        for bin_depth in range(self.beta, -1, -1):
            votes = sum_votes(vote.masked_fill(~own | (depth != bin_depth), 0.0))
            score = score + votes * base.pow(-bin_depth)
        return most_wanted(routing, score, budget=self.budget, protect=self.protect)
