"""Holding a time per output token: targets that are moved by what steps take, on the host, between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from lynx.errors import ConfigError
from lynx.log import logger
from lynx.strategy import Steered

# Of the way, for a step that is off by all of the target. The thresholds behind the targets take about ten steps to
# follow, and what moves those must be slower.
_GAIN = 0.15
_MOST = 0.5  # of the target; one step that waited for something else says little
_AVERAGED = 0.1  # weight of the newest step in the mean that is shown
_SMALLEST, _EVERY = 0.01, 4  # of the way, and steps: a write to every layer must be worth it
_PATIENCE = 50  # steps at an end before it is said that the time is not reached
_TOLERANCE = 1.05


class TpotControl:
    """Moves targets between those configured and exact routing, so that a time per output token is held.

    Integral control: after each decode step the position goes up by a share of the time that was left, or down by what
    was missing, and stays between 0, the configured targets, and 1, exact routing. At either end nothing is saved up.
    It starts at 0, and stays there as long as no step is timed. Steps of fewer than ``min_tokens`` rows, which are
    exact in any case, move nothing.

    What a position means is a number on the device of every layer, which is written between steps and without waiting:
    nothing is compiled or captured again.

    Steps are timed from one to the next by the host's clock, which is honest where each step's tokens are read before
    the next begins. The hooks of transformers do so by themselves, and so does vLLM's. Where a forward is compiled as
    a whole or replayed from a graph they do not run: pass this object to ``generate`` as its ``streamer``, or call
    :meth:`took` after each step. From then on the hooks' own clock is not used.

    Attributes:
        position: From 0, the configured targets, to 1, exact routing.
        measured: Running mean of the seconds per output token, None before the first step.
        steps: How many steps were timed.

    Example:
        >>> import lynx
        >>> reference = lynx.load_reference_model()
        >>> batch = reference.encode(["one = ", "two = ", "three = ", "four = "])
        >>> with lynx.attach(reference.model, "target-active", share=0.5, tpot_ms=1000) as handle:
        ...     tokens = reference.model.generate(**batch, max_new_tokens=12, do_sample=False)
        >>> handle.tpot.limit  # nothing takes a second here: there was no need to leave an expert out
        'exact'
    """

    def __init__(
        self,
        target: float,
        steered: Iterable[Steered],
        min_tokens: int = 2,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.target = target
        self.position = 0.0
        self.measured: float | None = None
        self.steps = 0
        self._steered, self._min_tokens, self._clock = list(steered), min_tokens, clock
        self._written = 0.0
        self._began: tuple[float, int | None] | None = None
        self._told = False
        self._missed, self._said = 0, False

    @property
    def target(self) -> float:
        """Seconds per output token to hold; may be set at any time."""
        return self._target

    @target.setter
    def target(self, seconds: float) -> None:
        if not (math.isfinite(seconds) and seconds > 0):
            raise ConfigError(f"a target is a number of seconds above 0; got {seconds!r}.")
        self._target = seconds

    @property
    def limit(self) -> Literal["targets", "exact"] | None:
        """At which end it stands: ``targets`` as configured, or ``exact`` routing; None between them."""
        return "targets" if self.position <= 0.0 else "exact" if self.position >= 1.0 else None

    @property
    def reached(self) -> bool:
        """Whether steps take no more than the target, with 5 % of tolerance; so before the first one, too."""
        return self.measured is None or self.measured <= _TOLERANCE * self.target

    def took(self, seconds: float, rows: int | None = None) -> None:
        """Say what the last decode step took, from its tokens being given to the next ones being read.

        Args:
            seconds: Of the whole step, sampling included.
            rows: Sequences in it, if there may be fewer than ``min_tokens``.

        Raises:
            ConfigError: It is no time.
        """
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ConfigError(f"a step took a number of seconds, 0 or more; got {seconds!r}.")
        self._told = True
        self._learn(seconds, rows)

    def put(self, value: Any) -> None:
        """Take the tokens of a step from ``generate``, whose first call holds the prompt."""
        self._told = True
        if value.ndim > 1:
            self._began = None
        else:
            self._tick(len(value))

    def end(self) -> None:
        """Take the end of a generation."""
        self._began = None

    def begins(self, rows: int | None) -> None:
        """Note that a step of one new token for each sequence begins; called by hooks, before it.

        Args:
            rows: Sequences in it.
        """
        if not self._told:
            self._tick(rows)

    def breaks(self) -> None:
        """Note that something else begins, such as a prefill; called by hooks."""
        if not self._told:
            self._began = None

    def _tick(self, rows: int | None) -> None:
        now = self._clock()
        if self._began is not None:
            began, of = self._began
            self._learn(now - began, of)
        self._began = (now, rows)

    def _learn(self, seconds: float, rows: int | None) -> None:
        if rows is not None and rows < self._min_tokens:
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return  # what is written now would be written again at every replay
        self.steps += 1
        before = seconds if self.measured is None else self.measured
        self.measured = before + _AVERAGED * (seconds - before)
        error = max(-_MOST, min((self.target - seconds) / self.target, _MOST))
        self.position = max(0.0, min(self.position + _GAIN * error, 1.0))
        moved = abs(self.position - self._written) >= _SMALLEST or self.limit is not None
        if self.steps % _EVERY == 0 and moved and self.position != self._written:
            self._written = self.position
            for each in self._steered:
                each.steer(self.position)
        self._missed = 0 if self.position > 0.0 or self.reached else self._missed + 1
        if self._missed >= _PATIENCE and not self._said:
            self._said = True
            logger.warning(
                "lynx.tpot_not_reached",
                target_ms=round(1e3 * self.target, 3),
                measured_ms=round(1e3 * self.measured, 3),
            )

    def __repr__(self) -> str:
        measured = "nothing measured" if self.measured is None else f"{1e3 * self.measured:.3g} ms measured"
        return f"<lynx.TpotControl {1e3 * self.target:.3g} ms, {measured}, position {self.position:.2f}>"
