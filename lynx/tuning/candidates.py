"""What a layer may be given: settings from mild to strong, of rules that size themselves."""

from __future__ import annotations

from typing import Any

from lynx.config import Config, resolve_config
from lynx.measuring.settings import describe

Strategy = dict[str, Any]
EXACT: Strategy = {"name": "exact"}

_MASSES = (0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4)
_RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95)
_POOLS = (0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.23, 0.26, 0.3, 0.36)


def candidates(per_layer: int = 0) -> list[Strategy]:
    """Return candidates for a layer, mild ones first.

    Thresholds: they size themselves to each step, which a fixed budget does not, and one scale serves every layer.

    Args:
        per_layer: At most so many, spread evenly; 0 for all.
    """
    alone, together = "importance-threshold", "pooled-threshold"
    every = [
        strategy
        for mass, ratio, least in zip(_MASSES, _RATIOS, _POOLS, strict=True)
        for strategy in (
            {"name": alone, "mass": mass},
            {"name": alone, "ratio": ratio},
            {"name": together, "least": least},
        )
    ]
    if not 0 < per_layer < len(every):
        return every
    return [every[round(place * (len(every) - 1) / max(per_layer - 1, 1))] for place in range(per_layer)]


def only_in(layer: int, strategy: Strategy) -> Config:
    """A strategy in one layer, all others exact."""
    return resolve_config({"name": "per-layer", "default": EXACT, "strategies": {layer: strategy}}, {})


def in_layers(strategies: list[Strategy]) -> Config:
    """A strategy for each layer; one for all where they are the same."""
    first, *rest = strategies
    if all(other == first for other in rest):
        return resolve_config(first, {})
    return resolve_config({"name": "per-layer", "default": EXACT, "strategies": dict(enumerate(strategies))}, {})


def label(strategy: Strategy) -> str:
    """Name a layer's strategy in one phrase."""
    return describe(resolve_config(dict(strategy), {}))
