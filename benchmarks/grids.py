"""Settings that `tuned.py` compares: the same one in every layer, of every strategy, from strong to mild."""

from __future__ import annotations

from typing import Any

from lynx.config import Config, resolve_config

_LEAST = (0.4, 0.3, 0.25, 0.2, 0.16, 0.12, 0.09, 0.06)


def uniform(before: float, top_k: int) -> list[list[Config]]:
    """Return a list for each way to spend fewer experts.

    Args:
        before: Active experts of the model, by which budgets are sized.
        top_k: Of the model.
    """
    budgets = _whole(before, (0.46, 0.54, 0.62, 0.75, 0.83))
    return [
        _grid("importance-threshold", "mass", (0.45, 0.55, 0.65, 0.75, 0.82, 0.88, 0.94)),
        _grid("importance-threshold", "ratio", (0.7, 0.5, 0.4, 0.3, 0.2, 0.1)),
        _grid("pooled-threshold", "least", _LEAST),
        _grid("pooled-threshold", "least", [round(0.62 * least, 3) for least in _LEAST], certainty=1.0),
        _grid("pooled-threshold", "least", [round(0.42 * least, 3) for least in _LEAST], certainty=2.0),
        _grid("coverage", "share", (0.7, 0.8, 0.87, 0.92, 0.96)),
        _grid("batch-union", "top", range(1, top_k)),
        _grid("top-budget", "budget", budgets),
        _grid("affinity-binning", "budget", budgets),
        _grid("popularity", "drop", _whole(before, (0.58, 0.45, 0.33, 0.2))),
    ]


def controls(top_k: int) -> list[list[Config]]:
    """Return what shows the worth of sharing, and of re-picking."""
    return [
        _grid("static-top", "top", range(1, top_k)),
        _grid("importance-threshold", "mass", (0.45, 0.65, 0.82, 0.94), refill="none"),
    ]


def _grid(name: str, option: str, values: Any, **others: Any) -> list[Config]:
    return [resolve_config(name, {option: value, **others}) for value in values]


def _whole(before: float, shares: tuple[float, ...]) -> list[int]:
    return list(dict.fromkeys(max(1, round(before * share)) for share in shares))
