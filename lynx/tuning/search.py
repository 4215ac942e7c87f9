"""Which allocation to verify next: prediction first, then what the verifications so far say of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lynx.tuning.allocation import Allocation
from lynx.tuning.goal import Goal, Trial

_KL_OF_A_DROP = 0.1  # nats per token that go with one more answer lost, to begin with


def search(
    path: Sequence[Allocation],
    goal: Goal,
    spent: Callable[[Allocation], float],
    verify: Callable[[Allocation], Trial],
    rounds: int,
) -> list[Trial]:
    """Verify allocations of a path, from exact to the strongest, until the best one that meets the goal is found.

    For a limit on loss that is the strongest that passes; for a limit on what is spent, the mildest.

    Args:
        path: See :func:`lynx.tuning.allocation.allocations`.
        goal: What is wanted.
        spent: What an allocation is predicted to spend, in the goal's unit; only asked for limits on that.
        verify: Measures one.
        rounds: Most verifications.

    Returns:
        All trials, the best one that passed last; none of them has passed if even the one that should is not there.
    """
    trials: dict[int, Trial] = {}
    low, high = 0, len(path) - 1  # what is looked for lies between them
    correction: float | None = 1.0
    while len(trials) < rounds and low <= high:
        guess = (low + high) // 2 if correction is None else expected(path, goal, spent, correction)
        place = min(max(guess, low), high)
        trial = trials[place] = verify(path[place])
        correction = _miss(goal, trial)
        # a limit on loss is passed by the mild end, a limit on what is spent by the strong one
        if trial.passed == goal.of_loss:
            low = place + 1
        else:
            high = place - 1
    passed = [place for place, trial in trials.items() if trial.passed]
    best = (max(passed) if goal.of_loss else min(passed)) if passed else None
    others = [trial for place, trial in sorted(trials.items()) if place != best]
    return others if best is None else [*others, trials[best]]


def expected(path: Sequence[Allocation], goal: Goal, spent: Callable[[Allocation], float], correction: float) -> int:
    """Return the place on a path that should just meet the goal, if predictions are off by a factor."""
    if goal.of_loss:
        limit = goal.value if goal.kind == "max-kl" else goal.value * _KL_OF_A_DROP
        fits = [place for place, each in enumerate(path) if each.loss * correction <= limit]
        return fits[-1] if fits else 0
    fits = [place for place, each in enumerate(path) if spent(each) * correction <= goal.value]
    return fits[0] if fits else len(path) - 1


def _miss(goal: Goal, trial: Trial) -> float | None:
    """What was measured by what was predicted; None where that says nothing, and halving is what is left."""
    match goal.kind:
        case "max-kl":
            predicted, measured = trial.allocation.loss, trial.kl.high
        case "target-active":
            predicted, measured = trial.allocation.share, trial.quality.share
        case _:
            return None
    return measured / predicted if predicted > 0 and measured > 0 else None
