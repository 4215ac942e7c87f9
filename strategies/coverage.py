"""As many experts as answer most of what the batch wants."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lynx.keep import ByCoverage, Utility
from lynx.strategy import Knob, SelectionStrategy


class Coverage(SelectionStrategy):
    """Keep the fewest experts that cover ``share`` of the batch's demand, protected ones always in.

    A batch whose tokens agree needs few, one of many minds needs many: the number of experts follows the batch.
    Experts woken by rows that must stay exact are free, and what they cover is covered.

    Source: this library; a budget by demand as in XShare (arXiv 2602.07265), sized by the demand itself.
    """

    name: Literal["coverage"] = "coverage"
    share: float = Field(0.8, ge=0, le=1, description="share of the demand that is covered; 1 keeps all")
    utility: Utility = Field(
        "normalised-own-mass",
        description="a token's vote: its weights (`own-mass`), its weights divided by their sum, or 1 each (`count`)",
    )

    knob: ClassVar[Knob] = Knob("share", fewest=0.0, full=1.0)

    def rule(self) -> ByCoverage:
        """Keep by demand until enough of it is covered."""
        return ByCoverage(self.share, self.utility, self.protect)
