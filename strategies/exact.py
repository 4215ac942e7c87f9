"""A control: the model as it is."""

from __future__ import annotations

from typing import ClassVar, Literal

from lynx.keep import ByRatio
from lynx.strategy import SelectionStrategy


class Exact(SelectionStrategy):
    """Keep every expert that the batch wants, so that nothing changes; counts what selection could work on.

    Source: a control of this library.
    """

    name: Literal["exact"] = "exact"
    inert: ClassVar[bool] = True

    def rule(self) -> ByRatio:
        """Keep the union of all own experts, whatever their weight."""
        return ByRatio(0.0)
