"""A strategy for each size of batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from lynx.config import AnyStrategy
from lynx.routing import Role, Routing
from lynx.strategy import BaseStrategy, BoundStrategy, Keep, LayerInfo, Wrapper, place


class ByBatchSize(Wrapper):
    """Choose the strategy by how many rows are open to selection.

    ``sizes`` maps a smallest number of OPEN rows to the strategy used from there on; below the smallest, routing is
    exact. Rows are counted on the device, so one captured graph serves batches of any filling: every strategy is
    computed and one result is used.

    Source: this library; what a batch can share grows with its size.
    """

    name: Literal["by-batch-size"] = "by-batch-size"
    sizes: dict[int, AnyStrategy] = Field(description="strategy by the smallest number of open rows it is used for")

    @model_validator(mode="after")
    def _has_sizes(self) -> Self:
        if not self.sizes:
            raise ValueError("`sizes` is empty")
        if min(self.sizes) < 1:
            raise ValueError("a batch has at least 1 open row")
        self.refuse_phased_children()
        return self

    @classmethod
    def example(cls) -> Self:
        """Return the setting used in examples."""
        return cls.build({"sizes": {2: {"name": "batch-union", "top": 3}, 8: {"name": "batch-union", "top": 2}}})

    def children(self) -> Sequence[BaseStrategy]:
        """Return the strategies from the smallest batch up."""
        return [self.sizes[size] for size in sorted(self.sizes)]

    def bind(self, layer: LayerInfo) -> BoundStrategy:
        """Bind every strategy."""
        sizes = [(size, self.sizes[size].bind(layer)) for size in sorted(self.sizes)]
        return _Bound(sizes, self.remembers())


class _Bound:
    def __init__(self, sizes: list[tuple[int, BoundStrategy]], remembers: bool) -> None:
        self._sizes, self._remembers = sizes, remembers

    def inner(self) -> list[BoundStrategy]:
        return [strategy for _, strategy in self._sizes]

    def place(self, device: torch.device) -> None:
        for _, strategy in self._sizes:
            place(strategy, device)

    def keep(self, routing: Routing) -> Keep:
        rows = routing.open_count.unsqueeze(-1).unsqueeze(-1)
        chosen = Keep(torch.ones_like(routing.choice[..., :1, :], dtype=torch.bool), True)
        for number, (size, strategy) in enumerate(self._sizes):
            candidate = strategy.keep(self._seen_by(number, routing) if self._remembers else routing)
            here = rows >= size
            refill = candidate.refill
            if chosen.refill is not candidate.refill:
                refill = (here & candidate.refill) | (~here & chosen.refill)
            chosen = Keep(torch.where(here, candidate.active, chosen.active), refill)
        return chosen

    def _seen_by(self, number: int, routing: Routing) -> Routing:
        """A batch of another strategy's size has no open row to one that would learn from it."""
        count = routing.open_count.unsqueeze(-1)
        other = count < self._sizes[number][0]
        for size, _ in self._sizes[number + 1 : number + 2]:
            other = other | (count >= size)
        return routing.with_role(routing.role.masked_fill(other & routing.open_rows, int(Role.PADDING)))
