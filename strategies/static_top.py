"""A control: fewer experts for every token, whatever its neighbours have woken."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lynx.keep import ByRank
from lynx.strategy import BoundStrategy, Knob, LayerInfo, SelectionStrategy


class StaticTop(SelectionStrategy):
    """Give each token only its own best ``top`` experts, with no sharing and nothing in place of the rest.

    Source: a control of this library; top-k reduction as in LExI and other per-token baselines.
    """

    name: Literal["static-top"] = "static-top"
    top: int = Field(2, ge=1, description="experts per token, at most k")
    refill: Literal["re-pick", "none"] = Field("none", description="what lost slots get")

    knob: ClassVar[Knob] = Knob("top", fewest=1, full="k")

    def bind(self, layer: LayerInfo) -> BoundStrategy:
        """Refuse a ``top`` above the layer's ``k``."""
        self.check_at_most("top", "k", layer)
        return self

    def rule(self) -> ByRank:
        """Keep by rank, each token for itself."""
        return ByRank(self.top, share=False)
