"""A threshold that is steered towards a number of active experts."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lynx.keep import ByMass
from lynx.routing import Routing
from lynx.strategy import BoundStrategy, Keep, Knob, LayerInfo, SelectionStrategy

# The threshold moves as the logarithm of its odds. At the upper end, 0.9990, routing is exact.
_HIGHEST = math.log(1023.0)
_FIRST_GAIN = 3.0  # divided by the number of steps seen, while that is more than `gain`
_AVERAGED = 0.1  # weight of the newest step in the mean to which errors are compared


class TargetActive(SelectionStrategy):
    """Keep what matters to each token, by a threshold that holds an average number of active experts.

    The threshold is that of `importance-threshold` by `mass`, one for each layer. After every step it moves: down if
    more experts were kept than the target, up if fewer. The target is ``active`` experts, or the ``share`` of those
    that the batch wants as the model routes it. Give one of the two. The threshold stays between ``floor``, which no
    token ever goes below, and exact routing.

    Source: this library; integral control of the threshold of importance-threshold.
    """

    name: Literal["target-active"] = "target-active"
    active: float | None = Field(None, ge=1, description="experts per layer and step to hold on average, at most E")
    share: float | None = Field(None, ge=0, le=1, description="the same by the experts that the batch wants; 1 is all")
    gain: float = Field(1.5, gt=0, le=2, description="how far a step that is off by all of the target moves the odds")
    floor: float = Field(0.5, ge=0, le=1, description="share of its own weight that each token keeps at least")

    knob: ClassVar[Knob] = Knob("share", fewest=0.0, full=1.0)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.active is None) == (self.share is None):
            raise ValueError("give exactly one of `active` and `share`")
        return self

    @classmethod
    def example(cls) -> Self:
        """Return the setting used in examples."""
        return cls(share=0.6)

    def remembers(self) -> bool:
        """It does: each step moves the threshold of the next."""
        return True

    def rule(self) -> ByMass:
        """Return what the first step keeps."""
        # a share of the experts holds about its root of the mass
        return ByMass(max(self.floor, 0.9 if self.share is None else math.sqrt(self.share)))

    def bind(self, layer: LayerInfo) -> BoundStrategy:
        """Refuse a target above the layer's ``E``; start a threshold of the layer's own."""
        if self.active is not None:
            self.check_at_most("active", "E", layer)
        return _Steered(self)


class _Steered:
    """One layer's threshold and what moves it; all of it is one tensor, which is written and never replaced.

    Attributes:
        state: ``(5,)`` float32: log odds of the threshold, mean of the target, steps seen, the goal, and how far the
            target stands from it towards all that the batch wants; None until it is on a device.
    """

    def __init__(self, strategy: TargetActive) -> None:
        self._strategy = strategy
        self._lowest = _log_odds(strategy.floor)
        self._position = 0.0
        self.state: Tensor | None = None

    def place(self, device: torch.device) -> None:
        """Put the state where the layer is."""
        self._on(device)

    def steer(self, position: float) -> None:
        """Move the target of the steps to come: 0 is the configured one, 1 is exact routing."""
        self._position = position
        if self.state is not None:
            self.state[4].fill_(position)

    def keep(self, routing: Routing) -> Keep:
        """Decide by the threshold as it is, then move it."""
        state = self._on(routing.choice.device)
        odds = state[0]
        reach = torch.where(odds >= _HIGHEST, 2.0, odds.sigmoid())  # as in `ByMass`: beyond all there is
        wants = (routing.slot_before < reach * routing.slot_total) & routing.open_rows.unsqueeze(-1)
        keep = self._strategy.secured(routing, routing.spread(wants).any(-2))
        if routing.choice.ndim == 2:  # many steps at once have no order here
            self._move(state, routing, keep.active.squeeze(-2))
        return keep

    def _on(self, device: torch.device) -> Tensor:
        if self.state is None or self.state.device != device:
            goal = self._strategy.share if self._strategy.share is not None else self._strategy.active
            start = [_log_odds(self._strategy.rule().mass), 0.0, 0.0, goal, self._position]
            # an inference tensor could not be changed in place outside of inference mode
            with torch.inference_mode(False):
                known = torch.tensor(start, dtype=torch.float32) if self.state is None else self.state
                self.state = known.to(device)
        return self.state

    @torch.no_grad()
    def _move(self, state: Tensor, routing: Routing, active: Tensor) -> None:
        wanted = routing.wanted
        before, after = wanted.sum().float(), (wanted & active).sum().float()
        odds, level, seen, goal, position = state.unbind()
        target = goal if self._strategy.share is None else goal * before
        target = target + position * (before - target).clamp_min(0.0)
        level = torch.where(seen > 0, torch.lerp(level, target, _AVERAGED), target)
        # Divided by a mean, not by the step's own target: so steps of all sizes add up to the target.
        error = ((target - after) / level.clamp_min(1.0)).clamp(-1.0, 1.0)
        gain = (_FIRST_GAIN / (seen + 1.0)).clamp_min(self._strategy.gain)
        # Held at the ends: what cannot be reached is not saved up, to be overshot later.
        odds = (odds + gain * error).clamp(self._lowest, _HIGHEST)
        moved = torch.stack([odds, level, (seen + 1.0).clamp_max(1000.0), goal, position])
        state.copy_(torch.where(routing.open_count > 0, moved, state))


def _log_odds(mass: float) -> float:
    lowest = 1.0 / (1.0 + math.exp(_HIGHEST))
    if mass >= 1.0 - lowest:
        return _HIGHEST
    mass = max(mass, lowest)
    return math.log(mass / (1.0 - mass))
