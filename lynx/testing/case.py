"""One example of the contract: a strategy at work on a routing, and both read row by row."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from lynx.errors import ConfigError, LynxWarning
from lynx.rerouting import Rerouted
from lynx.routing import Phase, Role, Routing
from lynx.selection import LayerSelection
from lynx.strategy import BaseStrategy, Keep, LayerInfo, SelectionStrategy, Wrapper
from lynx.testing.errors import ContractViolation
from lynx.testing.routings import RoutingSpec


@dataclass(frozen=True, slots=True)
class Row:
    """One token before and after, as plain Python."""

    index: int
    role: Role
    choice: list[float]
    logits: list[float]
    ids: list[int]
    weights: list[float]
    new_ids: list[int]
    new_weights: list[float]
    active: set[int]
    refill: bool

    @property
    def ranked(self) -> list[int]:
        """The row's own experts, best first."""
        return sorted(self.ids, key=lambda e: (-self.choice[e], e))

    @property
    def empty(self) -> list[bool]:
        """Which slots hold no expert of their own: one that other slots hold already."""
        seen = {new for old, new in zip(self.ids, self.new_ids, strict=True) if old == new}
        empty = []
        for old, new in zip(self.ids, self.new_ids, strict=True):
            empty.append(old != new and new in seen)
            seen.add(new)
        return empty

    @property
    def used(self) -> set[int]:
        """The experts with non-zero weight after re-routing."""
        return {e for e, w in zip(self.new_ids, self.new_weights, strict=True) if w != 0.0}

    @property
    def spare(self) -> list[int]:
        """The active experts that the row could re-pick, best first."""
        fit = [e for e in self.active if e not in self.ids and self.choice[e] > -math.inf]
        return sorted(fit, key=lambda e: (-self.choice[e], e)) if self.refill else []


@dataclass(frozen=True)
class Case:
    """A strategy, and the layer and routing it is tried on."""

    strategy: BaseStrategy
    layer: LayerInfo
    spec: RoutingSpec

    @cached_property
    def routing(self) -> Routing:
        """The routing as the model made it."""
        return self.spec.build()

    @cached_property
    def effective(self) -> Routing:
        """The routing with the rows of phases that the strategy does not act on made EXACT."""
        role = self.routing.role.clone()
        for phase in Phase:
            if not self.strategy.acts_on(phase):
                role[(self.routing.phase == phase) & (role == Role.OPEN)] = int(Role.EXACT)
        return self.routing.with_role(role)

    @cached_property
    def selection(self) -> LayerSelection:
        """The strategy bound to the layer."""
        return self.bind(self.strategy)

    @cached_property
    def result(self) -> Rerouted:
        """What came out."""
        return self.run(self.routing)

    @cached_property
    def decision(self) -> Keep:
        """What the strategy said stays active."""
        return self._as_it_is(self.selection).bound.keep(self.effective)

    @cached_property
    def woken(self) -> set[int]:
        """Experts of EXACT rows."""
        ids = self.effective.ids[self.effective.role == Role.EXACT]
        return set(ids.flatten().tolist())

    @cached_property
    def rows(self) -> list[Row]:
        """The batch, row by row."""
        before, after, keep = self.effective, self.result, self.decision
        active = keep.active.expand(before.choice.shape).tolist()
        refill = torch.as_tensor(keep.refill).expand(before.role.unsqueeze(-1).shape).flatten().tolist()
        columns: Iterable[tuple[list[float], list[float], list[int], list[float], list[int], list[float]]] = zip(
            before.choice.tolist(),
            before.logits.tolist(),
            before.ids.tolist(),
            before.weights.tolist(),
            after.ids.tolist(),
            after.weights.tolist(),
            strict=True,
        )
        return [
            Row(
                t,
                Role(int(before.role[t])),
                *column,
                {e for e, on in enumerate(active[t]) if on} | self.woken,
                bool(refill[t]) and before.rule.repick,
            )
            for t, column in enumerate(columns)
        ]

    @property
    def open_rows(self) -> list[Row]:
        """The rows that the strategy may re-route."""
        return [row for row in self.rows if row.role == Role.OPEN]

    @property
    def protect(self) -> int:
        """How many of its best experts each token is promised."""
        return int(_least(self.strategy, "protect"))

    @property
    def floor(self) -> float:
        """The share of its own weight that each token is promised."""
        return _least(self.strategy, "floor")

    def bind(self, strategy: BaseStrategy) -> LayerSelection:
        """Put a strategy to work on the layer."""
        try:
            return LayerSelection(self.layer, strategy, min_tokens=1)
        except ConfigError as error:
            raise ContractViolation("binds", str(error)) from error

    def run(self, routing: Routing, selection: LayerSelection | None = None) -> Rerouted:
        """Select and re-route; a strategy that raises breaks the contract."""
        selection = self._as_it_is(selection or self.selection)
        failures = selection.counters.failures
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LynxWarning)
            result = selection(routing)
        if selection.counters.failures > failures:
            try:
                selection.bound.keep(routing)
            except Exception as error:
                raise ContractViolation("runs", f"select() failed: {type(error).__name__}: {error}") from error
            raise ContractViolation("runs", "select() failed once and did not when it was asked again")
        return result

    def _as_it_is(self, selection: LayerSelection) -> LayerSelection:
        """A copy for a strategy that remembers, so that every question is its first."""
        return copy.deepcopy(selection) if self.strategy.remembers() else selection

    def with_option(self, option: str, value: float) -> BaseStrategy:
        """Return the strategy with another value of one of its options."""
        options = {name: getattr(self.strategy, name) for name in type(self.strategy).model_fields}
        try:
            return type(self.strategy)(**{**options, option: value})
        except ConfigError as error:
            raise ContractViolation("knob", f"its value {option}={value} is refused: {error}") from error


def _least(strategy: BaseStrategy, option: str) -> float:
    if isinstance(strategy, SelectionStrategy):
        return float(getattr(strategy, option))
    children = strategy.children() if isinstance(strategy, Wrapper) else ()
    return min((_least(child, option) for child in children), default=0)
