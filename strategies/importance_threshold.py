"""What matters to each token, measured against that token itself."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from lynx.keep import ByMass, ByRatio
from lynx.strategy import Knob, SelectionStrategy


class ImportanceThreshold(SelectionStrategy):
    """Keep the experts that at least one token finds important.

    Either by ``ratio``: experts whose weight reaches that share of the token's own best weight; or by ``mass``: the
    token's best experts until their cumulative share of its own weight reaches it. Give one of the two. The rule sizes
    itself: confident tokens ask for few experts, undecided ones for many, whatever the batch size.

    Source: the per-token skipping of NAEE (arXiv 2402.14800), with the union shared by the batch as in Lynx
    (arXiv 2411.08982); ``mass`` is top-p over a token's own top-k.
    """

    name: Literal["importance-threshold"] = "importance-threshold"
    ratio: float | None = Field(
        None, ge=0, le=1, description="share of the token's best weight an expert must reach; 0 keeps all"
    )
    mass: float | None = Field(
        None, gt=0, le=1, description="share of the token's own weight that is covered; 1 keeps all"
    )

    knob: ClassVar[Knob] = Knob("ratio", fewest=1.0, full=0.0)

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if (self.ratio is None) == (self.mass is None):
            raise ValueError("give exactly one of `ratio` and `mass`")
        return self

    @classmethod
    def example(cls) -> Self:
        """Return the setting used in examples."""
        return cls(ratio=0.4)

    def rule(self) -> ByRatio | ByMass:
        """Keep by ratio or by cumulative mass, shared by the batch."""
        if self.ratio is not None:
            return ByRatio(self.ratio)
        assert self.mass is not None
        return ByMass(self.mass)
