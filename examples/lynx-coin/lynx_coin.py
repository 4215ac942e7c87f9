"""A strategy in one file: an expert stays if enough tokens of the batch want it."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

import lynx


class Coin(lynx.SelectionStrategy):
    """Keep the experts that at least ``heads`` tokens have in their own top-k."""

    name: Literal["coin"] = "coin"
    heads: int = Field(2, ge=1, description="tokens that must want an expert")
    knob: ClassVar[lynx.Knob] = lynx.Knob("heads", fewest=16, full=1)

    def select(self, routing: lynx.Routing) -> Tensor:
        """Count the tokens that want each expert."""
        return routing.own.sum(-2) >= self.heads


@lynx.hookimpl
def lynx_strategies() -> list[type[lynx.SelectionStrategy]]:
    """Return what this plugin adds."""
    return [Coin]
