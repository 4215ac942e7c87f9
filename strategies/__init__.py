"""The built-in selection strategies, one a file, registered as a third party's would be."""

from __future__ import annotations

from lynx.hookspecs import hookimpl
from lynx.strategies.affinity_binning import AffinityBinning
from lynx.strategies.batch_union import BatchUnion
from lynx.strategies.by_batch_size import ByBatchSize
from lynx.strategies.coverage import Coverage
from lynx.strategies.exact import Exact
from lynx.strategies.importance_threshold import ImportanceThreshold
from lynx.strategies.per_layer import PerLayer
from lynx.strategies.phase_aware import PhaseAware
from lynx.strategies.pooled_threshold import PooledThreshold
from lynx.strategies.popularity import Popularity
from lynx.strategies.static_top import StaticTop
from lynx.strategies.target_active import TargetActive
from lynx.strategies.top_budget import TopBudget
from lynx.strategy import BaseStrategy

__all__ = [
    "AffinityBinning",
    "BatchUnion",
    "ByBatchSize",
    "Coverage",
    "Exact",
    "ImportanceThreshold",
    "PerLayer",
    "PhaseAware",
    "PooledThreshold",
    "Popularity",
    "StaticTop",
    "TargetActive",
    "TopBudget",
]


@hookimpl
def lynx_strategies() -> list[type[BaseStrategy]]:
    """Return the built-in strategies."""
    return [
        BatchUnion,
        ImportanceThreshold,
        PooledThreshold,
        TopBudget,
        Coverage,
        TargetActive,
        PhaseAware,
        Popularity,
        AffinityBinning,
        Exact,
        StaticTop,
        PerLayer,
        ByBatchSize,
    ]
