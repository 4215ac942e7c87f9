"""The ways of running a decode step that decode.py compares: stock under each experts implementation, and Lynx."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models import shell

import lynx

if TYPE_CHECKING:
    from bench import Bench

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
STOCK = "stock"
STRATEGIES = (STOCK, "exact", "importance-threshold", "batch-union", "top-budget")


@dataclass(eq=False, slots=True)
class Setup:
    """One way of running the step.

    Attributes:
        strategy: One of `STRATEGIES`.
        implementation: What runs the experts: one of transformers', or "lynx".
        model: Modules of its own, weights shared.
        handle: Lynx's, None for stock.
        options: The strategy's options.
        refused: Why it does not run; empty if it does.
        rounds: Seconds per step, by round.
        step: Runs one step on the tokens in the bench's buffer.
    """

    strategy: str
    implementation: str
    model: Any
    handle: lynx.Handle | None = None
    options: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    rounds: list[float] = field(default_factory=list)
    step: Callable[[], Any] | None = None

    @property
    def stock(self) -> bool:
        """Whether Lynx is not attached."""
        return self.handle is None

    @property
    def setting(self) -> str:
        """The strategy and its options in words; empty for stock."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return "" if self.stock else f"{self.strategy} {options}".strip()

    @property
    def seconds(self) -> float:
        """Median time of a step."""
        return sorted(self.rounds)[len(self.rounds) // 2]


def make_setups(bench: Bench) -> list[Setup]:
    """List stock under each implementation, Lynx changing nothing, and Lynx under three settings.

    All are attached here, before anything is compiled or captured: attaching makes torch forget compiled code. The
    budget is half of the experts that the batch wakes, which is counted first.
    """
    E, k = bench.facts.E, bench.facts.k
    exact = Setup("exact", "lynx", *bench.attach("exact", {}))
    half = max(1, round(bench.count_active(exact) / 2))
    settings: dict[str, dict[str, Any]] = {
        "importance-threshold": {"ratio": 0.5},
        "batch-union": {"top": max(1, k // 4)},
        "top-budget": {"budget": min(E, half), "protect": 1},
    }
    under_lynx = [Setup(name, "lynx", *bench.attach(name, options), options) for name, options in settings.items()]
    stock = []
    for implementation in IMPLEMENTATIONS:
        own = shell(bench.model)
        own.set_experts_implementation(implementation)
        stock.append(Setup(STOCK, implementation, own, refused=bench.too_large(implementation)))
    return [*stock, exact, *under_lynx]
