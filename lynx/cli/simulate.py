"""``lynx simulate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lynx.cli.evaluate import settings_of
from lynx.cli.progress import progress_bar
from lynx.errors import ConfigError
from lynx.measuring.simulate import Simulation, Traffic, rounds, simulate
from lynx.measuring.trace import Trace, open_trace
from lynx.report import PhaseReport


def sizes_of(text: str) -> tuple[int, ...]:
    """Read batch sizes as a command line lists them, ``4,8,16``."""
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--batch {text!r} is no list of batch sizes; write for instance --batch 4,8,16.")
    return sizes


def run_simulate(
    path: Path, strategies: list[str], ranges: list[str], traffic: Traffic, by_layer: bool, as_json: bool
) -> None:
    """Simulate, and print the table or JSON."""
    settings = settings_of(strategies, ranges)
    trace = open_trace(path)
    with progress_bar(rounds(trace, traffic)) as advance:
        result = simulate(trace, settings, traffic, advance)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 144, highlight=False, markup=False)
    console.print(_table(trace, result, traffic, by_layer))


def _table(trace: Trace, result: Simulation, traffic: Traffic, by_layer: bool) -> Table:
    title = (
        f"{trace.conditions['model']}: {traffic.mix} decode batches of {len(trace.sequences)} recorded sequences, "
        f"prompt {'under the setting' if traffic.stress else 'exact'}"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    names = ["setting", "batch", *(["layer"] if by_layer else []), "active", "kept mass", "worst", "rows changed"]
    for name in names:
        table.add_column(name, justify="left" if name in ("setting", "layer") else "right")
    for row in result.rows:
        layers = [(layer.name, layer.phases["decode"]) for layer in row.report.layers] if by_layer else []
        for place, (name, phase) in enumerate([*layers, ("all", row.report.total["decode"])]):
            front = ("", "") if place else (row.label, str(row.batch))
            changed = row.rows_changed if name == "all" else phase.rows_changed / phase.tokens
            table.add_row(*front, *([name] if by_layer else []), *_cells(phase, changed))
        if by_layer:
            table.add_section()
    return table


def _cells(phase: PhaseReport, changed: float) -> tuple[str, ...]:
    mean, worst = phase.kept_mass_mean, phase.kept_mass_worst
    return (
        f"{phase.active_after:.1f} of {phase.active_before:.1f} ({phase.active_after / phase.active_before:.0%})",
        "-" if mean is None else f"{mean:.3f}",
        "-" if worst is None else f"{worst:.3f}",
        f"{changed:.0%}",
    )
