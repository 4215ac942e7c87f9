"""What a layer may be given: settings from mild to strong, of rules that size themselves."""

from __future__ import annotations

from typing import Any

from lynx.config import Config, resolve_config
from lynx.measuring.settings import describe
from lynx.standins import StandIns

Strategy = dict[str, Any]
EXACT: Strategy = {"name": "exact"}

# By rows, all rules of about one strength; by columns, a rule from mild to strong.
_MASSES = (0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4)
_POOLS = (0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.23, 0.26, 0.3, 0.36)
_SURE_POOLS = (0.025, 0.037, 0.05, 0.062, 0.074, 0.087, 0.1, 0.112, 0.124, 0.143, 0.161, 0.186, 0.223)
_SURER_POOLS = (0.017, 0.025, 0.034, 0.042, 0.05, 0.059, 0.067, 0.076, 0.084, 0.097, 0.109, 0.126, 0.151)


def candidates(per_layer: int = 0) -> list[Strategy]:
    """Return candidates for a layer, mild ones first.

    Thresholds: they size themselves to each step, which a fixed budget does not, and one scale serves every layer.

    Args:
        per_layer: At most so many, spread evenly over strengths and over rules; 0 for all.
    """
    alone, together = "importance-threshold", "pooled-threshold"
    rows: list[list[Strategy]] = [
        [
            {"name": together, "least": least},
            {"name": together, "least": sure, "certainty": 1.0},
            {"name": together, "least": surer, "certainty": 2.0},
            {"name": alone, "mass": mass},
        ]
        for mass, least, sure, surer in zip(_MASSES, _POOLS, _SURE_POOLS, _SURER_POOLS, strict=True)
    ]
    rules = len(rows[0])
    if not 0 < per_layer < rules * len(rows):
        return [strategy for row in rows for strategy in row]
    step = (len(rows) - 1) / max(per_layer - 1, 1)
    return [rows[round(place * step)][place % rules] for place in range(per_layer)]


def only_in(layer: int, strategy: Strategy) -> Config:
    """A strategy in one layer, all others exact."""
    return resolve_config({"name": "per-layer", "default": EXACT, "strategies": {layer: strategy}}, {})


def answered(config: Config, standins: StandIns | None) -> Config:
    """A configuration with what answers for lost slots."""
    return config if standins is None else Config.build({**dict(config), "standins": standins})


def in_layers(strategies: list[Strategy]) -> Config:
    """A strategy for each layer; one for all where they are the same."""
    first, *rest = strategies
    if all(other == first for other in rest):
        return resolve_config(first, {})
    return resolve_config({"name": "per-layer", "default": EXACT, "strategies": dict(enumerate(strategies))}, {})


def label(strategy: Strategy) -> str:
    """Name a layer's strategy in one phrase."""
    return describe(resolve_config(dict(strategy), {}))
