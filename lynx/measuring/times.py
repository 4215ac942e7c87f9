"""From what rounds gave to figures: a row per contender, a line per layer, and what a verdict is made from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lynx.measuring.clock import Clock
from lynx.measuring.contenders import Contender, Kind, Measured
from lynx.measuring.latency import BatchLatency, fit
from lynx.measuring.observed import Observed
from lynx.measuring.spread import Spread, ratios, spread
from lynx.strategy import LayerInfo

Rounds = Sequence[Sequence[Measured]]
"""By contender, what each round gave."""


@dataclass(frozen=True, slots=True)
class TimedRow:
    """One contender, timed.

    Attributes:
        label: It in one phrase.
        kind: The model ``alone``, ``exact`` routing under Lynx, a ``setting``, or a ``budget`` for the fit.
        setting: Its configuration as plain data; None for the model alone.
        experts: What ran the experts, as ``model: grouped_mm``.
        active_before: Mean active experts per layer as the model routes; None for the model alone.
        active_after: The same under the setting.
        step: Seconds of a decode step: the time per output token of each sequence.
        to_exact: Ratio of that to exact routing with the same experts, round by round; None for the model alone.
        to_alone: Ratio of that to the model alone, the fastest way that was tried.
        layer: Mean seconds of an MoE layer.
        layer_to_exact: Ratio of that to exact routing.
        layers: Median seconds of each layer.
    """

    label: str
    kind: Kind
    setting: dict[str, Any] | None
    experts: str
    active_before: float | None
    active_after: float | None
    step: Spread
    to_exact: Spread | None
    to_alone: Spread
    layer: Spread
    layer_to_exact: Spread | None
    layers: tuple[float, ...]


def timed_rows(contenders: Sequence[Contender], found: Rounds, layers: Sequence[LayerInfo]) -> tuple[TimedRow, ...]:
    """Make a row of each contender."""
    alone = found[fastest_alone(contenders, found)]
    exact = {
        contender.setting.experts: index
        for index, contender in enumerate(contenders)
        if contender.kind == "exact" and contender.setting is not None
    }
    rows = []
    for contender, rounds in zip(contenders, found, strict=True):
        base = None if contender.setting is None else found[exact[contender.setting.experts]]
        before = after = None
        if base is not None:
            before, after = (_active(name, rounds, base, layers).mean().item() for name in ("before", "after"))
        rows.append(
            TimedRow(
                label=contender.label,
                kind=contender.kind,
                setting=None if contender.setting is None else contender.setting.dump(),
                experts=rounds[0].experts,
                active_before=before,
                active_after=after,
                step=spread(_steps(rounds)),
                to_exact=None if base is None else ratios(_steps(rounds), _steps(base)),
                to_alone=ratios(_steps(rounds), _steps(alone)),
                layer=spread(_layer_means(rounds)),
                layer_to_exact=None if base is None else ratios(_layer_means(rounds), _layer_means(base)),
                layers=tuple(map(statistics.median, zip(*(each.time.layers for each in rounds), strict=True))),
            )
        )
    return tuple(rows)


def latency_of(batch: int, contenders: Sequence[Contender], found: Rounds, layers: Sequence[LayerInfo]) -> BatchLatency:
    """Fit a line to each layer, over the budgets: selection is at work in all of them, so that ``c`` holds its time.

    The rest of a step is the median of what the budgets' steps took beyond the lines, so that a predicted step is one
    of median time.
    """
    budgets = [rounds for contender, rounds in zip(contenders, found, strict=True) if contender.kind == "budget"]
    active = torch.stack([_active("after", rounds, rounds, layers) for rounds in budgets], dim=1)
    times = torch.tensor([[each.time.layers for each in rounds] for rounds in budgets]).transpose(0, 1)
    lines = BatchLatency(batch=batch, rest=0.0, layers=fit([layer.name for layer in layers], active, times))
    beyond = [
        each.time.step - lines.predict(awake.tolist())
        for point, rounds in enumerate(budgets)
        for each, awake in zip(rounds, active[:, point], strict=True)
    ]
    return lines.model_copy(update={"rest": statistics.median(beyond)})


def observe(
    batch: int,
    rows: Sequence[TimedRow],
    latency: BatchLatency,
    found: Rounds,
    layers: Sequence[LayerInfo],
    cache_bytes: int,
    clock: Clock,
    random_tokens: bool,
) -> Observed:
    """Gather what a verdict is made from."""
    full = rows[-1]  # the budget of all experts
    exact = next(index for index, row in enumerate(rows) if row.kind == "exact")
    hosts = [each.time.host for each in found[-1] if each.time.host is not None]
    owns = [each.time.own for each in found[-1] if each.time.own is not None and clock == "wall"]
    awake = _active("before", found[exact], found[exact], layers).mean(0).tolist()
    slopes = (layer.per_expert.value * each for layer, each in zip(latency.layers, awake, strict=True))
    return Observed(
        batch=batch,
        num_experts=statistics.mean(layer.num_experts for layer in layers),
        top_k=statistics.mean(layer.top_k for layer in layers),
        active=statistics.mean(awake),
        alone=min(row.step.median for row in rows if row.kind == "alone"),
        attached=full.step.median,
        by_experts=sum(slopes),
        r_squared=latency.r_squared,
        experts=full.experts,
        host=statistics.median(hosts) if hosts else None,
        own=statistics.median(owns) if owns else None,
        silent=len(found[exact][0].silent),
        layers=len(layers),
        expert_bytes=sum(layer.num_experts * layer.expert_bytes for layer in layers),
        cache_bytes=cache_bytes,
        random_tokens=random_tokens,
    )


def fastest_alone(contenders: Sequence[Contender], found: Rounds) -> int:
    """Which contender is the fastest way to run the model alone."""
    alone = [index for index, contender in enumerate(contenders) if contender.kind == "alone"]
    return min(alone, key=lambda index: statistics.median(_steps(found[index])))


def _steps(rounds: Sequence[Measured]) -> list[float]:
    return [each.time.step for each in rounds]


def _layer_means(rounds: Sequence[Measured]) -> list[float]:
    return [statistics.mean(each.time.layers) for each in rounds]


def _active(
    name: str, rounds: Sequence[Measured], exact: Sequence[Measured], layers: Sequence[LayerInfo]
) -> torch.Tensor:
    """``(R, L)`` active experts; layers that a setting leaves alone are as exact routing has them."""
    return torch.tensor(
        [
            [getattr(each, name).get(layer.name, same.before.get(layer.name, 0.0)) for layer in layers]
            for each, same in zip(rounds, exact, strict=True)
        ],
        dtype=torch.float64,
    )
