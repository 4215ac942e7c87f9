"""What a user wants: as few experts as a loss allows, or as little loss as a size or a time allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lynx.measuring.intervals import Estimate
from lynx.measuring.quality import Quality
from lynx.tuning.allocation import Allocation

Kind = Literal["max-kl", "max-drop", "target-active", "target-tpot"]
_WORDS = {
    "max-kl": "KL(exact || policy) of at most {} nats per token",
    "max-drop": "at most {:.2%} fewer questions answered",
    "target-active": "at most {:.0%} of the active experts",
    "target-tpot": "at most {} s per output token",
}


@dataclass(frozen=True, slots=True)
class Goal:
    """What is wanted.

    Attributes:
        kind: Of which figure.
        value: Its limit: nats per token, a share of the questions, a share of the active experts, or seconds.
    """

    kind: Kind
    value: float

    @property
    def of_loss(self) -> bool:
        """Whether the limit is on what is lost, and not on what is spent."""
        return self.kind in ("max-kl", "max-drop")

    def __str__(self) -> str:
        return _WORDS[self.kind].format(self.value)


@dataclass(frozen=True, slots=True)
class Trial:
    """An allocation, verified on text that it was not chosen by.

    Attributes:
        allocation: What was tried, with what was predicted.
        quality: What was measured.
        answers: Share of questions answered, None where none were asked.
        exact_answers: The same of the model alone.
        seconds: Time per output token by the latency model, None without one.
        passed: Whether the goal is met.
    """

    allocation: Allocation
    quality: Quality
    answers: Estimate | None
    exact_answers: Estimate | None
    seconds: float | None
    passed: bool

    @property
    def kl(self) -> Estimate:
        """KL(exact || policy) in nats per token."""
        return self.quality.mean("kl")


def passes(
    goal: Goal, quality: Quality, answers: Estimate | None, exact: Estimate | None, seconds: float | None
) -> bool:
    """Say whether what was verified meets the goal; a limit on KL must hold for the upper end of its interval."""
    match goal.kind:
        case "max-kl":
            return quality.mean("kl").high <= goal.value
        case "max-drop":
            assert answers is not None
            assert exact is not None
            return answers.value >= exact.value - goal.value
        case "target-active":
            return quality.share <= goal.value
        case "target-tpot":
            assert seconds is not None
            return seconds <= goal.value
