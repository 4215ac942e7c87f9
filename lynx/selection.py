"""The hot path of one MoE layer: roles, the strategy's decision, re-routing, counters."""

from __future__ import annotations

import contextlib
import warnings

import torch

from lynx.counters import Counters
from lynx.errors import LynxWarning
from lynx.log import logger
from lynx.rerouting import Rerouted, leave_exact, reroute, unsound_rows
from lynx.routing import Phase, Role, Routing
from lynx.strategy import BaseStrategy, BoundStrategy, Keep, LayerInfo, SelectionStrategy, Wrapper


class LayerSelection:
    """A strategy at work in one layer.

    Args:
        info: The layer.
        strategy: Bound here, once.
        min_tokens: A batch of fewer OPEN rows is left exact.
    """

    def __init__(self, info: LayerInfo, strategy: BaseStrategy, min_tokens: int = 2) -> None:
        self.info = info
        self.min_tokens = min_tokens
        self.counters = Counters()
        _check_protect(strategy, info)
        self.bound: BoundStrategy = strategy.bind(info)
        self.exact_phases = tuple(phase for phase in Phase if not strategy.acts_on(phase))
        self._warned = False

    def __call__(self, routing: Routing) -> Rerouted:
        """Select for one batch and re-route its OPEN rows.

        A strategy that raises leaves the batch as the model routed it; so, row by row, do scores that are not finite.
        Both are counted.
        """
        unsound = unsound_rows(routing) & (routing.role != int(Role.PADDING))
        exact = unsound
        for phase in self.exact_phases:
            exact = exact | (routing.phase == int(phase))
        routing = routing.with_role(leave_exact(routing, exact))
        # Too few rows to share anything: counted on the device, so that a captured graph serves every batch.
        few = routing.open_count < self.min_tokens
        working = routing.with_role(leave_exact(routing, few.unsqueeze(-1)))
        failed = False
        try:
            result = reroute(working, self.bound.keep(working))
        except Exception as error:
            result = reroute(working, Keep(torch.ones_like(routing.choice, dtype=torch.bool), False))
            failed = True
            self._warn(error)
        self.counters.add(working, result, unsound, failed)
        return result

    def observe(self, routing: Routing) -> None:
        """Count a batch that no strategy acts on, such as prefill under a decode strategy."""
        routing = routing.with_role(leave_exact(routing, torch.ones_like(routing.open_rows)))
        self.counters.add(routing, None, unsound_rows(routing) & (routing.role != int(Role.PADDING)), False)

    def _warn(self, error: Exception) -> None:
        """Say once per layer that the strategy failed; the counters tell how often."""
        if self._warned:
            return
        self._warned = True
        fault = f"{type(error).__name__}: {error}"
        logger.error("lynx.strategy_failed", layer=self.info.name, error=fault)
        message = f"the strategy failed in layer {self.info.name!r} and the model's own routing is used there: {fault}"
        # where warnings are errors, generation goes on all the same
        with contextlib.suppress(LynxWarning):
            warnings.warn(message, LynxWarning, stacklevel=2)


def _check_protect(strategy: BaseStrategy, info: LayerInfo) -> None:
    """Raise where a strategy, or one inside it, protects more experts than a token has."""
    if isinstance(strategy, Wrapper):
        for child in strategy.children():
            _check_protect(child, info)
    elif isinstance(strategy, SelectionStrategy):
        strategy.check_at_most("protect", "k", info)
