"""The union of every token's best few experts."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lynx.keep import ByRank
from lynx.strategy import BoundStrategy, Knob, LayerInfo, SelectionStrategy


class BatchUnion(SelectionStrategy):
    """Keep the union of every token's best ``top`` experts; tokens re-pick their ``k`` inside it.

    A token that loses its lower-ranked experts piggybacks on what its neighbours have woken.

    Source: OEA, "Opportunistic Expert Activation", arXiv 2511.02237 (``top`` is its ``k0``).
    """

    name: Literal["batch-union"] = "batch-union"
    top: int = Field(2, ge=1, description="best experts of each token that are kept, at most k")

    knob: ClassVar[Knob] = Knob("top", fewest=1, full="k")

    def bind(self, layer: LayerInfo) -> BoundStrategy:
        """Refuse a ``top`` above the layer's ``k``."""
        self.check_at_most("top", "k", layer)
        return self

    def rule(self) -> ByRank:
        """Keep by rank, shared by the batch."""
        return ByRank(self.top)
