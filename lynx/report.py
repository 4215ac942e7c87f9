"""What selection did: the counters of all layers, as a table, a dict or JSON."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lynx.counters import PhaseCounts
from lynx.routing import Phase
from lynx.strategy import LayerInfo


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """One phase of one layer, or of all layers together.

    Attributes:
        steps: Batches seen; in the total, the most that any layer saw.
        exact_steps: Of those, batches in which no row was open to selection.
        tokens: Rows that are not padding.
        padding_rows: Rows that are not tokens.
        exact_rows: Tokens whose routing must not change.
        open_rows: Tokens that selection may re-route.
        active_before: Mean distinct experts per layer and step, as the model routed.
        active_after: The same after selection.
        open_active_before: The same over OPEN rows alone, as the model routed.
        open_active_after: The same over OPEN rows alone, after selection.
        kept_mass_mean: Mean share of an OPEN token's own weight that was kept; None without OPEN rows.
        kept_mass_worst: The worst token's share; None without OPEN rows.
        answered_mass_mean: Mean share of an OPEN token's own weight that stand-ins answered for; None without such.
        answered_mass_most: The largest such share of any token; None without OPEN rows.
        rows_changed: Tokens that lost at least one expert.
        unsound_rows: Tokens left exact because a score was not finite.
        expert_bytes_before: Mean bytes of the weights of those experts, as the model routed; in the total, of all
            layers together. A host that also runs padding rows, as transformers does for ended sequences, reads more.
        expert_bytes_after: The same after selection.
    """

    steps: int
    exact_steps: int
    tokens: int
    padding_rows: int
    exact_rows: int
    open_rows: int
    active_before: float
    active_after: float
    open_active_before: float
    open_active_after: float
    kept_mass_mean: float | None
    kept_mass_worst: float | None
    answered_mass_mean: float | None
    answered_mass_most: float | None
    rows_changed: int
    unsound_rows: int
    expert_bytes_before: float
    expert_bytes_after: float


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One MoE layer.

    Attributes:
        name: Module path of its router.
        num_experts: ``E``.
        top_k: ``k``.
        failures: Batches in which the strategy raised and the model's own routing was used.
        phases: By phase name, ``prefill`` and ``decode``.
    """

    name: str
    num_experts: int
    top_k: int
    failures: int
    phases: dict[str, PhaseReport]


@dataclass(frozen=True, slots=True)
class Report:
    """What selection did since attach or the last reset.

    Attributes:
        strategy: The strategy with its options.
        experts: Which implementation runs the experts, ``model`` or ``lynx``.
        layers: Per layer, in running order.
        total: Over all layers, by phase name.
    """

    strategy: dict[str, Any]
    experts: str
    layers: tuple[LayerReport, ...]
    total: dict[str, PhaseReport]

    @property
    def failures(self) -> int:
        """Batches, over all layers, in which the strategy raised."""
        return sum(layer.failures for layer in self.layers)

    @property
    def _stood_in(self) -> bool:
        return any(phase.answered_mass_most for phase in self.total.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as in :meth:`to_json`."""
        return {**asdict(self), "failures": self.failures}

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> Table:
        table = Table(title=f"lynx: {_describe(self.strategy)} (experts: {self.experts})", title_justify="left")
        for column in ("layer", "phase"):
            table.add_column(column)
        stood_in = self._stood_in
        mass = ("kept mass", "worst", *(("stood in", "most") if stood_in else ()))
        for column in ("steps", "open", "exact", "padding", "active", "after", *mass, "fallbacks"):
            table.add_column(column, justify="right")
        for layer in self.layers:
            for cells in _rows(layer.phases, layer.failures, stood_in):
                table.add_row(layer.name, *cells)
        if self.total["decode"].steps == 0:
            table.caption = "no decode step was seen: generation without a cache has none"
        table.add_section()
        for cells in _rows(self.total, self.failures, stood_in):
            table.add_row("all layers", *cells, style="bold")
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=142 if self._stood_in else 120, color_system=None)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


def make_report(
    strategy: dict[str, Any], experts: str, layers: list[tuple[LayerInfo, int, dict[Phase, PhaseCounts]]]
) -> Report:
    """Turn counters that were read into a report."""
    rows = tuple(
        LayerReport(
            info.name,
            info.num_experts,
            info.top_k,
            failures,
            {phase.name.lower(): _phase([(info, counts[phase])]) for phase in Phase},
        )
        for info, failures, counts in layers
    )
    total = {phase.name.lower(): _phase([(info, counts[phase]) for info, _, counts in layers]) for phase in Phase}
    return Report(strategy, experts, rows, total)


def _phase(parts: list[tuple[LayerInfo, PhaseCounts]]) -> PhaseReport:
    """Add up layers; rows are counted once, as each layer sees the same ones."""
    counts = [part for _, part in parts]
    layer_steps = max(sum(part.steps for part in counts), 1)
    steps = max(part.steps for part in counts)
    widest = max(counts, key=lambda part: part.exact_rows + part.open_rows)
    open_rows = sum(part.open_rows for part in counts)

    def mean(field: str) -> float:
        return float(sum(getattr(part, field) for part in counts) / layer_steps)

    def read(field: str) -> float:
        return float(sum(info.expert_bytes * getattr(part, field) / max(part.steps, 1) for info, part in parts))

    return PhaseReport(
        steps=steps,
        exact_steps=max(part.exact_steps for part in counts),
        tokens=widest.exact_rows + widest.open_rows,
        padding_rows=widest.padding_rows,
        exact_rows=widest.exact_rows,
        open_rows=widest.open_rows,
        active_before=mean("active_before"),
        active_after=mean("active_after"),
        open_active_before=mean("open_active_before"),
        open_active_after=mean("open_active_after"),
        kept_mass_mean=sum(part.kept_mass for part in counts) / open_rows if open_rows else None,
        kept_mass_worst=min(part.kept_mass_worst for part in counts) if open_rows else None,
        answered_mass_mean=sum(part.answered_mass for part in counts) / open_rows if open_rows else None,
        answered_mass_most=max(part.answered_mass_most for part in counts) if open_rows else None,
        rows_changed=sum(part.rows_changed for part in counts),
        unsound_rows=sum(part.unsound_rows for part in counts),
        expert_bytes_before=read("active_before"),
        expert_bytes_after=read("active_after"),
    )


def _rows(phases: dict[str, PhaseReport], failures: int, stood_in: bool) -> list[list[str]]:
    """Return the cells of every phase that was seen; failures are not counted by phase and stand in the last one."""
    seen = [(name, phase) for name, phase in phases.items() if phase.steps]
    return [_cells(name, phase, failures if name == seen[-1][0] else 0, stood_in) for name, phase in seen]


def _cells(name: str, phase: PhaseReport, failures: int, stood_in: bool) -> list[str]:
    shares = [phase.kept_mass_mean, phase.kept_mass_worst]
    shares += [phase.answered_mass_mean, phase.answered_mass_most] if stood_in else []
    return [
        name,
        str(phase.steps),
        str(phase.open_rows),
        str(phase.exact_rows),
        str(phase.padding_rows),
        f"{phase.active_before:.2f}",
        f"{phase.active_after:.2f}",
        *("-" if share is None else f"{share:.4f}" for share in shares),
        str(phase.unsound_rows + failures),
    ]


def _describe(strategy: dict[str, Any]) -> str:
    """Name a strategy with the options that are on, its own before those that every strategy has."""
    general = ("protect", "refill", "floor")
    keys = [*(key for key in strategy if key not in general), *(key for key in general if key in strategy)]
    keys = [key for key in keys if key != "floor" or strategy[key]]
    options = [f"{key}={strategy[key]}" for key in keys if key != "name" and strategy[key] is not None]
    return f"{strategy['name']}({', '.join(options)})"
