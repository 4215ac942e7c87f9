"""What is timed beside each other: the model alone, exact routing under Lynx, settings, and budgets to fit a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from lynx.attachment import attach
from lynx.config import Config, load_config, resolve_config
from lynx.measuring.clock import StepClock, StepTime
from lynx.measuring.decode import DecodeSteps
from lynx.measuring.settings import describe

Kind = Literal["alone", "exact", "setting", "budget"]
Experts = Literal["auto", "model", "lynx"]
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Of the experts that exact routing wakes: the budgets that a line is fitted to, beside all experts."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of running a step.

    Attributes:
        label: It in one phrase.
        kind: What it is there for.
        setting: What Lynx is attached with; None for the model alone.
        implementation: What the experts of the model alone are set to; None to leave them.
    """

    label: str
    kind: Kind
    setting: Config | None = None
    implementation: str | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """One step of a contender.

    Attributes:
        time: Its time.
        before: Active experts as the model routes, by layer; empty for the model alone.
        after: The same under the setting.
        experts: What ran the experts.
        silent: Layers whose router did not decide.
    """

    time: StepTime
    before: dict[str, float]
    after: dict[str, float]
    experts: str
    silent: tuple[str, ...] = ()


def interleave(
    items: Sequence[_Item], rounds: int, measure: Callable[[_Item], _Result], after_round: Callable[[], Any]
) -> list[list[_Result]]:
    """Measure all items in each round, each round beginning with another one; the first round warms up.

    Args:
        items: What is measured.
        rounds: How often, beside the round that is not kept.
        measure: Measures one.
        after_round: Called after each round, the first one included.

    Returns:
        By item, what each round gave.
    """
    kept: list[list[_Result]] = [[] for _ in items]
    for turn in range(rounds + 1):
        shift = turn % max(len(items), 1)
        for index in [*range(shift, len(items)), *range(shift)]:
            result = measure(items[index])
            if turn:
                kept[index].append(result)
        after_round()
    return kept


def measure(contender: Contender, model: Any, steps: DecodeSteps, clock: StepClock) -> Measured:
    """Time one step, after the same step has run untimed: what is made at first use is made then."""
    if contender.setting is None:
        with running(model, contender.implementation) as experts, torch.inference_mode():
            steps.prepared()()
            return Measured(clock.time(steps.prepared()), {}, {}, experts)
    with attach(model, contender.setting) as handle, torch.inference_mode():
        steps.prepared()()
        handle.reset()
        time = clock.time(steps.prepared())
        phases = {layer.name: layer.phases["decode"] for layer in handle.report().layers}
        experts = handle.experts_backend if handle.experts == "lynx" else implementation_of(model)
        return Measured(
            time,
            {name: phase.active_before for name, phase in phases.items()},
            {name: phase.active_after for name, phase in phases.items()},
            f"{handle.experts}: {experts}" if experts else handle.experts,
            tuple(name for name, phase in phases.items() if not phase.steps),
        )


def contenders(
    settings: Sequence[Config], experts: Experts, alone: Sequence[str | None], full: int, active: float
) -> list[Contender]:
    """List what is timed.

    Args:
        settings: Those asked for.
        experts: What runs the experts under Lynx; ``auto`` leaves it to each setting.
        alone: Experts implementations of the model alone, from :func:`stock`.
        full: ``E``; where layers differ, of the one with the fewest experts, as a budget must fit all.
        active: Experts that exact routing wakes, mean over layers.
    """
    chosen = [with_experts(setting, experts) for setting in settings]
    found = [Contender(f"alone ({name})" if name else "alone", "alone", None, name) for name in alone]
    for each in dict.fromkeys([experts, *(setting.experts for setting in chosen)]):
        words = "exact" if each == experts else f"exact (experts: {each})"
        found.append(Contender(words, "exact", resolve_config("exact", {"experts": each})))
    found += [Contender(describe(setting), "setting", setting) for setting in chosen]
    for budget in dict.fromkeys([*(min(full, max(1, round(share * active))) for share in SHARES), full]):
        # nothing is protected and no batch is too small: for time alone, and no setting to use
        options = {"budget": budget, "protect": 0, "min_tokens": 1, "experts": experts}
        words = "budget of all experts" if budget == full else f"budget of {budget}"
        found.append(Contender(words, "budget", resolve_config("top-budget", options)))
    return found


def with_experts(setting: Config, experts: Experts) -> Config:
    """Return a setting whose experts are run by what was asked for."""
    return setting if experts == "auto" else load_config({**setting.dump(), "experts": experts})


def stock(model: Any, gathered: int) -> list[str | None]:
    """List the experts implementations of the model alone: its own, and on a GPU also what ``generate`` changes to.

    Args:
        model: The model.
        gathered: Bytes that ``batched_mm`` would gather; it is left out where they do not fit.
    """
    if implementation_of(model) != "grouped_mm" or model.device.type != "cuda":
        return [None]
    return ["grouped_mm", "batched_mm"] if 2 * gathered < torch.cuda.mem_get_info(model.device)[0] else ["grouped_mm"]


def implementation_of(model: Any) -> str:
    """Name the model's own experts implementation, empty where it has none to choose from."""
    return str(getattr(model.config, "_experts_implementation", None) or "")


@contextmanager
def running(model: Any, implementation: str | None) -> Iterator[str]:
    """Let an experts implementation run the model's experts, and its own again afterwards."""
    before = implementation_of(model)
    if implementation is None or implementation == before:
        yield before
        return
    model.set_experts_implementation(implementation)
    try:
        yield implementation
    finally:
        model.set_experts_implementation(before)
