"""What the kernels are to reach on an H200-class card under graph replay, looked up in the rows of kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODELS = ("Qwen3-30B-A3B", "OLMoE-1B-7B", "Mixtral-8x7B")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """A limit on one figure.

    Attributes:
        name: What is limited, in words.
        limit: Its largest value.
        contender: Whose time it is.
        value: The figure of a row; None where the row has none.
        counts: Whether the target speaks of a row.
    """

    name: str
    limit: float
    contender: str
    value: Callable[[Row], float | None]
    counts: Callable[[Row], bool]


def _decode(row: Row) -> bool:
    return row["shape"] in MODELS and 8 <= row["T"] <= 64


TARGETS = (
    Target(
        "layer by floor, T = 8 to 64, full active set", 1.15, "layer",
        lambda row: _median(row["layer_by_floor"]),
        lambda row: _decode(row) and row["fraction"] == 1,
    ),
    Target(
        "route, us, T = 16, E = 128", 6.0, "route",
        lambda row: _median(row["contenders"]["route"].get("us")),
        lambda row: row["T"] == 16 and row["E"] == 128,
    ),
    Target(
        "layer by the best peer, full active set", 1.0, "layer",
        lambda row: _median(row["layer_by_best_peer"]),
        lambda row: row["fraction"] == 1 and bool(row["best_peer"]),
    ),
    Target(
        "layer at half the experts by full, T = 8 to 64", 0.58, "layer",
        lambda row: _median(row["layer_by_full"]),
        lambda row: _decode(row) and row["fraction"] == 0.5,
    ),
    Target(
        "stand-ins by layer, T = 16, Qwen3-30B-A3B at half the experts", 0.05, "standins",
        lambda row: _median(row["standins_by_layer"]),
        lambda row: row["T"] == 16 and row["shape"] == "Qwen3-30B-A3B" and row["fraction"] == 0.5,
    ),
)  # fmt: skip


def reached(rows: list[Row]) -> list[dict[str, Any]]:
    """Hold rows that were measured on a GPU to the targets.

    A row in which Lynx did not run, or was not replayed from a graph, has not reached its target; nor is a target
    reached that no row speaks of.
    """
    found = []
    for target in TARGETS:
        values = [(_replayed(target, row), row) for row in rows if target.counts(row)]
        known = [(value, row) for value, row in values if value is not None]
        worst = max(known, key=lambda pair: pair[0], default=None)
        found.append(
            {
                "name": target.name,
                "target": target.limit,
                "rows": len(values),
                "reached": sum(value <= target.limit for value, _ in known),
                "not_replayed": len(values) - len(known),
                "worst": None if worst is None else {"value": worst[0]} | {
                    key: worst[1][key] for key in ("shape", "routing", "T", "fraction")
                },
            }
        )  # fmt: skip
    return found


def _replayed(target: Target, row: Row) -> float | None:
    """The value of a row whose time was taken from a graph."""
    return target.value(row) if row["contenders"][target.contender].get("how") == "graph" else None


def _median(values: dict[str, float] | None) -> float | None:
    return None if values is None else values["median"]
