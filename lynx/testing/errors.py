"""What the contract raises."""

from __future__ import annotations

from lynx.errors import LynxError


class ContractViolation(AssertionError):
    """A strategy, or the core, broke the contract.

    Attributes:
        invariant: Name of the invariant.
        detail: What was violated, with figures.
    """

    def __init__(self, invariant: str, detail: str, strategy: str = "") -> None:
        super().__init__(f"{strategy}: {invariant}: {detail}" if strategy else f"{invariant}: {detail}")
        self.invariant = invariant
        self.detail = detail


class MissingHypothesisError(LynxError, ImportError):
    """Hypothesis is not installed."""
