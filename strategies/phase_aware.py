"""A strategy for each phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lynx.config import AnyStrategy
from lynx.routing import Phase, Role, Routing
from lynx.strategy import BaseStrategy, BoundStrategy, Keep, LayerInfo, Wrapper, place


class PhaseAware(Wrapper):
    """Give prefill and decode rows a strategy of their own; a phase without one stays exact.

    In a batch that mixes phases each selects for its own rows, and what is active is the union.

    Source: Lynx (arXiv 2411.08982) found that prefill needs every expert and decode tolerates substitution.
    """

    name: Literal["phase-aware"] = "phase-aware"
    prefill: AnyStrategy | None = Field(None, description="strategy for prefill rows; none leaves them exact")
    decode: AnyStrategy | None = Field(None, description="strategy for decode rows; none leaves them exact")

    @model_validator(mode="after")
    def _acts_somewhere(self) -> Self:
        if self.prefill is None and self.decode is None:
            raise ValueError("give a strategy for `decode`, for `prefill`, or for both")
        self.refuse_phased_children()
        return self

    @classmethod
    def example(cls) -> Self:
        """Return the setting used in examples."""
        return cls.build({"decode": {"name": "batch-union", "top": 2}})

    def children(self) -> Sequence[BaseStrategy]:
        """Return the strategies that were given."""
        return [child for child in (self.prefill, self.decode) if child is not None]

    def acts_on(self, phase: Phase) -> bool:
        """Only on phases that have a strategy."""
        return self._of(phase) is not None

    def bind(self, layer: LayerInfo) -> BoundStrategy:
        """Bind both strategies."""
        children = {phase: self._of(phase) for phase in Phase}
        return _Bound({phase: child.bind(layer) for phase, child in children.items() if child is not None})

    def _of(self, phase: Phase) -> BaseStrategy | None:
        return self.prefill if phase == Phase.PREFILL else self.decode


class _Bound:
    def __init__(self, by_phase: dict[Phase, BoundStrategy]) -> None:
        self._by_phase = by_phase

    @property
    def sole(self) -> BoundStrategy | None:
        """The one strategy that decides, if the other phase is left exact."""
        return next(iter(self._by_phase.values())) if len(self._by_phase) == 1 else None

    def inner(self) -> list[BoundStrategy]:
        # what a step of decode takes says nothing of prefill
        return [strategy for phase, strategy in self._by_phase.items() if phase == Phase.DECODE]

    def place(self, device: torch.device) -> None:
        for strategy in self._by_phase.values():
            place(strategy, device)

    def keep(self, routing: Routing) -> Keep:
        decisions = []
        for phase, strategy in self._by_phase.items():
            # To one phase, the other's open rows are not there: their own strategy says what becomes of them, and an
            # expert is not free because a row that may yet lose it wants it.
            others = routing.phase != int(phase)
            role = routing.role.masked_fill(others & routing.open_rows, int(Role.PADDING))
            decisions.append((others, strategy.keep(routing.with_role(role))))
        if len(decisions) == 1:
            return decisions[0][1]
        (not_first, first), (_, second) = decisions
        rows = ~not_first.unsqueeze(-1)
        active = _for_rows(first, rows) | _for_rows(second, ~rows)
        if first.refill is second.refill:
            return Keep(active, first.refill)
        return Keep(active, (rows & first.refill) | (~rows & second.refill))


def _for_rows(keep: Keep, rows: Tensor) -> Tensor:
    """What one phase activates: for everybody if its batch shares it, for its own rows if not."""
    return keep.active if keep.active.shape[-2] == 1 else keep.active & rows
