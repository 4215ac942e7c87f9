"""The hot path of one MoE layer: roles, the strategy's decision, re-routing, counters."""

from __future__ import annotations

import contextlib
import warnings

import torch

from lynx.counters import Counters, as_tensors_name
from lynx.errors import ConfigError, LynxWarning
from lynx.fusion import FusedRoute, fuse
from lynx.kernels.backends import requested
from lynx.log import logger
from lynx.rerouting import Rerouted, leave_exact, reroute, stacked, unsound_rows
from lynx.routing import Phase, Role, Routing
from lynx.standins import LayerStandIns
from lynx.strategy import BaseStrategy, BoundStrategy, Keep, LayerInfo, SelectionStrategy, Wrapper, place


class LayerSelection:
    """A strategy at work in one layer.

    Args:
        info: The layer.
        strategy: Bound here, once.
        min_tokens: A batch of fewer OPEN rows is left exact.
        standins: What answers for lost slots; None for re-picking alone.
    """

    def __init__(
        self,
        info: LayerInfo,
        strategy: BaseStrategy,
        min_tokens: int = 2,
        standins: LayerStandIns | None = None,
    ) -> None:
        self.info = info
        self.min_tokens = min_tokens
        self.standins = standins
        self.counters = Counters()
        _check_protect(strategy, info)
        self.bound: BoundStrategy = strategy.bind(info)
        self.inert: bool = getattr(getattr(self.bound, "sole", self.bound), "inert", False)
        self.in_order = strategy.remembers()
        self.exact_phases = tuple(phase for phase in Phase if not strategy.acts_on(phase))
        fused = fuse(strategy.name, self.bound, info, self.exact_phases, min_tokens)
        self.fused: FusedRoute | None = fused if isinstance(fused, FusedRoute) else None
        self.why_not_fused = fused if isinstance(fused, str) else "the layer was not placed on a device yet"
        self._answers_in_torch = False
        self._warned = False

    def place(self, device: torch.device) -> None:
        """Put what the hot path needs on the layer's device, so that nothing is made while a graph is captured.

        Raises:
            ConfigError: ``LYNX_KERNELS`` asks for Triton, which cannot run here.
        """
        self._follow(device)
        place(self.bound, device)
        if self.standins is not None:
            self.standins.place(device)
        if self.fused is not None and self.why_not_fused and requested() == "triton":
            raise ConfigError(f"LYNX_KERNELS=triton, but {self.why_not_fused}.")

    def __call__(self, routing: Routing) -> Rerouted:
        """Select for one batch and re-route its OPEN rows.

        A strategy that raises leaves the batch as the model routed it; so, row by row, do scores that are not finite.
        Both are counted. Of many steps in one call, a strategy that remembers takes one after the other.
        """
        if self.in_order and routing.choice.ndim > 2:
            return stacked([self(step) for step in routing.steps()], routing.choice.shape[:-2])
        fused = self.fused
        if fused is not None and fused.device != routing.choice.device and not torch.compiler.is_compiling():
            self._follow(routing.choice.device)  # the model was moved, or its weights were away
        if fused is not None and fused.takes(routing):
            try:
                done = fused(routing, self.counters)
            except torch.OutOfMemoryError:
                raise  # no fault of the kernel's
            except Exception as error:
                self.fused, self.why_not_fused = None, f"the kernel failed: {error}"
                self._kernel_failed("fused kernel", error)
            else:
                return self.answer(routing, done)
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
            if self._first():
                logger.error("lynx.strategy_failed", layer=self.info.name, error=_named(error))
                what = f"the strategy failed in layer {self.info.name!r} and the model's own routing is used there"
                _warn(what, error)
        result = self.answer(working, result)
        self.counters.add(working, result, unsound, failed)
        return result

    def answer(self, routing: Routing, result: Rerouted) -> Rerouted:
        """Have stand-ins answer for what a batch lost, if there are any, and count it."""
        if self.standins is None:
            return result
        device = routing.ids.device
        if self.standins.known.device != device and not torch.compiler.is_compiling():
            self.standins.place(device)  # the model was moved, or its weights were away
        if not self._answers_in_torch and self.standins.fused(result):
            counted = self.counters.answered_on(device)
            try:
                return self.standins.answer_and_count(routing, result, counted)
            except torch.OutOfMemoryError:
                raise  # no fault of the kernel's
            except Exception as error:
                self._answers_in_torch = True
                self._kernel_failed("kernel of stand-ins", error)
        result = self.standins.answer(routing, result)
        self.counters.add_answered(routing, result)
        return result

    def _follow(self, device: torch.device) -> None:
        self.counters.on(device)
        if self.fused is not None:
            self.why_not_fused = self.fused.place(as_tensors_name(device))

    def observe(self, routing: Routing) -> None:
        """Count a batch that no strategy acts on, such as prefill under a decode strategy."""
        routing = routing.with_role(leave_exact(routing, torch.ones_like(routing.open_rows)))
        self.counters.add(routing, None, unsound_rows(routing) & (routing.role != int(Role.PADDING)), False)

    def _kernel_failed(self, kernel: str, error: Exception) -> None:
        if self._first():
            logger.error("lynx.kernel_failed", layer=self.info.name, error=_named(error))
            _warn(f"the {kernel} failed in layer {self.info.name!r}, which goes on in torch", error, depth=4)

    def _first(self) -> bool:
        """Whether nothing has been said of this layer yet; the counters tell how often a strategy failed."""
        first, self._warned = not self._warned, True
        return first


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _warn(what: str, error: Exception, depth: int = 3) -> None:
    # where warnings are errors, generation goes on all the same
    with contextlib.suppress(LynxWarning):
        warnings.warn(f"{what}: {_named(error)}", LynxWarning, stacklevel=depth)


def _check_protect(strategy: BaseStrategy, info: LayerInfo) -> None:
    """Raise where a strategy, or one inside it, protects more experts than a token has."""
    if isinstance(strategy, Wrapper):
        for child in strategy.children():
            _check_protect(child, info)
    elif isinstance(strategy, SelectionStrategy):
        strategy.check_at_most("protect", "k", info)
