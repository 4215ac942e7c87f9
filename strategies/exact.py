"""A control: the model as it is."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lynx.routing import Routing
from lynx.strategy import SelectionStrategy


class Exact(SelectionStrategy):
    """Keep every expert that the batch wants, so that nothing changes; counts what selection could work on.

    Source: a control of this library.
    """

    name: Literal["exact"] = "exact"

    def select(self, routing: Routing) -> Tensor:
        """Keep the union of all own experts."""
        return routing.wanted
