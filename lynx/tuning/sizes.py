"""A setting for each batch size: every size is tuned for itself, and what joins them is verified once more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lynx.config import Config, resolve_config
from lynx.errors import ConfigError, MeasureError
from lynx.measuring.evaluate import Protocol
from lynx.measuring.examples import Example, split
from lynx.measuring.subject import Subject
from lynx.standins import StandIns
from lynx.tuning.candidates import answered
from lynx.tuning.goal import Goal, Trial
from lynx.tuning.tune import Effort, Tuned, Verify, figures, tune
from lynx.tuning.tune import rounds as rounds_of_one

Seconds = Callable[[Sequence[float]], float]
Times = Mapping[int, tuple[Seconds, Sequence[float]]]
"""By batch size: what predicts the time per output token, and what an active expert of each layer costs."""

_SAME = 0.01  # of the active experts; another way of running the same rule may break ties otherwise


@dataclass(frozen=True, slots=True)
class TunedSizes:
    """What was chosen for each batch size, and what the whole is worth.

    Attributes:
        goal: What was wanted, at every size.
        parts: What was chosen for each size alone, from the smallest up.
        joined: What the joined setting gave in batches of each size; empty if a part was not found.
    """

    goal: Goal
    parts: dict[int, Tuned]
    joined: dict[int, Trial]

    @property
    def config(self) -> Config:
        """The joined setting with the evidence for it.

        Raises:
            ConfigError: At one of the sizes no setting met the goal.
        """
        for size, part in self.parts.items():
            if part.chosen is None:
                try:
                    _ = part.config
                except ConfigError as error:
                    raise ConfigError(f"batches of {size}: {error} Or leave this size out of --batch.") from None
        missed = [size for size, trial in self.joined.items() if not trial.passed]
        if missed:
            raise ConfigError(
                f"batches of {missed[0]}: their setting met the goal alone, and joined with those of other sizes it "
                f"does not give {self.goal}, as batches that run empty pass through the smaller sizes; give a wider "
                "limit, more questions, or leave a size out of --batch."
            )
        standins = next(iter(self.parts.values())).standins
        return Config.build({**dict(_join(self.parts, standins)), "evidence": self.evidence})

    @property
    def conditions(self) -> dict[str, Any]:
        """What was run on what, as far as it is the same at every size."""
        first, *others = (part.conditions for part in self.parts.values())
        return {key: value for key, value in first.items() if all(other[key] == value for other in others)}

    @property
    def evidence(self) -> dict[str, Any]:
        """What the joined setting rests on at each size, as plain data."""
        common = self.conditions
        of_sizes = {
            str(size): figures(trial) | {k: v for k, v in self.parts[size].conditions.items() if k not in common}
            for size, trial in self.joined.items()
        }
        return {"goal": str(self.goal), "sizes": of_sizes, **common}


def tune_sizes(
    subject: Subject,
    examples: Sequence[Example],
    goal: Goal,
    sizes: Sequence[int],
    protocol: Protocol | None = None,
    effort: Effort | None = None,
    times: Times | None = None,
    keep: Mapping[int, Path] | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> TunedSizes:
    """Choose a setting for every layer and batch size.

    Each size is tuned as :func:`lynx.tuning.tune.tune` does, on the same text and for the same goal. What comes out is
    joined by ``by-batch-size``, and verified once more as it will be attached, in batches of each size.

    Args:
        subject: The model, not attached.
        examples: The user's text.
        goal: What is wanted at every size.
        sizes: Batch sizes, 2 or more each.
        protocol: As for one size; its own batch size does not count.
        effort: As for one size.
        times: By batch size, what predicts times; see :data:`Times`.
        keep: By batch size, where its sensitivities are kept: an interrupted run goes on in the size where it was.
        advance: Called with a few words as the work goes on, :func:`rounds` times at most.

    Raises:
        ConfigError: A size is too small or named twice, or what one size raises.
        MeasureError: The joined setting does not do at one of its sizes what that size's own does.
    """
    protocol, effort = protocol or Protocol(), effort or Effort()
    sizes = ordered(sizes)
    for what, given in (("times", times), ("keep", keep)):
        missing = [size for size in sizes if given is not None and size not in given]
        if missing:
            raise ConfigError(f"`{what}` has nothing for batches of {missing[0]}; give it for every size.")
    rounds(subject, examples, sizes, protocol, effort)  # a size that the text makes no batch of is told before the work
    parts = {}
    for size in sizes:
        seconds, weights = (None, None) if times is None else times[size]
        parts[size] = tune(
            subject,
            examples,
            goal,
            replace(protocol, batch=size),
            effort,
            seconds,
            weights,
            None if keep is None else keep[size],
            _at(size, advance),
        )
    if any(part.chosen is None for part in parts.values()):
        return TunedSizes(goal, parts, {})
    config, joined = _join(parts, effort.standins), {}
    _, second = split(examples, effort.share, effort.seed)
    for size, part in parts.items():
        own = replace(protocol, batch=size)
        seconds = None if times is None else times[size][0]
        batches = own.batches(second, subject.pad_id)
        verify = Verify(subject, second, batches, goal, own, seconds, _at(size, advance), effort.standins)
        assert part.chosen is not None
        joined[size] = verify(part.chosen.allocation, config)
        _hold_against(size, joined[size], part.chosen)
    return TunedSizes(goal, parts, joined)


def ordered(sizes: Sequence[int]) -> list[int]:
    """Sort batch sizes.

    Raises:
        ConfigError: One is below 2, or named twice, or there is none.
    """
    if not sizes or min(sizes) < 2:
        raise ConfigError(
            "--batch takes batch sizes of 2 or more: a sequence alone shares no expert, and batches of fewer than "
            "`min_tokens` sequences are exact in any case."
        )
    twice = next((size for size in sizes if list(sizes).count(size) > 1), None)
    if twice is not None:
        raise ConfigError(f"--batch names {twice} twice; give each batch size once.")
    return sorted(sizes)


def rounds(
    subject: Subject, examples: Sequence[Example], sizes: Sequence[int], protocol: Protocol, effort: Effort
) -> int:
    """How often :func:`tune_sizes` calls ``advance``, at most.

    Raises:
        ConfigError: The examples make no batch of one of the sizes.
    """
    _, second = split(examples, effort.share, effort.seed)
    own = [replace(protocol, batch=size) for size in sizes]
    joined = sum(len(each.batches(second, subject.pad_id)) for each in own)
    return joined + sum(rounds_of_one(subject, examples, each, effort) for each in own)


def _join(parts: Mapping[int, Tuned], standins: StandIns | None) -> Config:
    chosen = {size: part.chosen.allocation.config.strategy for size, part in parts.items() if part.chosen is not None}
    return answered(resolve_config({"name": "by-batch-size", "sizes": chosen}, {}), standins)


def _hold_against(size: int, joined: Trial, alone: Trial) -> None:
    """Raise where the joined setting is another one than the one that was verified for a size."""
    pairs = zip(joined.quality.active(), alone.quality.active(), strict=True)
    if not all(math.isclose(together, by_itself, rel_tol=_SAME) for together, by_itself in pairs):
        raise MeasureError(
            f"in batches of {size} the joined setting leaves {joined.quality.active_mean():.2f} active experts, and "
            f"the one that was verified for them {alone.quality.active_mean():.2f}; these should be the same, so that "
            "nothing is written. Report this, with what `lynx doctor --markdown` prints."
        )


def _at(size: int, advance: Callable[[str], None]) -> Callable[[str], None]:
    return lambda what: advance(f"{size}: {what}")
