"""A fixed number of experts for the batch."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from lynx.keep import ByDemand, Utility
from lynx.strategy import BoundStrategy, Knob, LayerInfo, SelectionStrategy


class TopBudget(SelectionStrategy):
    """Keep the ``budget`` experts with the most demand over the batch, protected ones always in.

    The budget counts experts from the tokens' own top-k; if more than ``budget`` are protected, all of them stay.
    Experts woken by rows that must stay exact are free and outside the budget.

    Source: XShare (arXiv 2602.07265) for a budget filled by summed scores over protected experts, DES
    (arXiv 2602.00879) for voting only with a token's own top-k.
    """

    name: Literal["top-budget"] = "top-budget"
    budget: int = Field(ge=1, description="experts to keep, at most E")
    utility: Utility = Field(
        "normalised-own-mass",
        description="a token's vote: its weights (`own-mass`), its weights divided by their sum, or 1 each (`count`)",
    )

    knob: ClassVar[Knob] = Knob("budget", fewest=1, full="E")

    @classmethod
    def example(cls) -> Self:
        """Return the setting used in examples."""
        return cls(budget=4)

    def bind(self, layer: LayerInfo) -> BoundStrategy:
        """Refuse a budget above the layer's ``E``."""
        self.check_at_most("budget", "E", layer)
        return self

    def rule(self) -> ByDemand:
        """Keep by demand up to the budget."""
        return ByDemand(budget=self.budget, utility=self.utility, protect=self.protect)
