"""Lynx as first published: drop the experts that the fewest tokens want."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lynx.keep import ByDemand
from lynx.strategy import Knob, SelectionStrategy


class Popularity(SelectionStrategy):
    """Drop the ``drop`` least popular experts of the batch's union; an expert is as popular as tokens chose it.

    Source: Lynx, arXiv 2411.08982, version 1.
    """

    name: Literal["popularity"] = "popularity"
    drop: int = Field(4, ge=0, description="experts of the union that are dropped, least popular first")

    knob: ClassVar[Knob] = Knob("drop", fewest="E", full=0)

    def rule(self) -> ByDemand:
        """Keep all of the union but its least wanted."""
        return ByDemand(drop=self.drop, utility="count", protect=self.protect)
