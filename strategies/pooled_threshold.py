"""What matters to the tokens of a batch together."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lynx.keep import ByPool
from lynx.strategy import Knob, SelectionStrategy


class PooledThreshold(SelectionStrategy):
    """Keep the experts whose masses, pooled over the batch, reach ``least``.

    A token alone keeps an expert by giving it that much of its own weight; several tokens that give it less keep it
    together. The rule sizes itself like a threshold of each token, and weighs how many tokens lose.

    Source: this library.
    """

    name: Literal["pooled-threshold"] = "pooled-threshold"
    least: float = Field(0.2, ge=0, le=1, description="pooled mass that an expert must reach; 0 keeps all")
    power: int = Field(4, ge=1, le=16, description="1 adds masses up, a large one takes the largest")

    certainty: float = Field(
        0.0, ge=0, le=8, description="how much less a token asks for whose router finds other experts as good; 0 none"
    )

    knob: ClassVar[Knob] = Knob("least", fewest=1.0, full=0.0)

    def rule(self) -> ByPool:
        """Keep by pooled mass."""
        return ByPool(self.least, self.power, self.certainty)
