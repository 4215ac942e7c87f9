"""``lynx eval --tasks``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lynx.cli.evaluate import settings_of
from lynx.cli.progress import progress_bar
from lynx.errors import ConfigError
from lynx.measuring.harness import TaskEvaluation, TaskProtocol, evaluate_tasks, rounds
from lynx.measuring.harness_rows import TaskRow
from lynx.measuring.harness_tasks import load_tasks
from lynx.measuring.subject import load_subject

COLUMNS = ("setting", "score", "change", "active", "rows", "kept mass", "worst")


def run_tasks(
    model: str,
    names: Sequence[str],
    include: Sequence[Path],
    strategies: list[str],
    ranges: list[str],
    standins: Path | None,
    protocol: TaskProtocol,
    place: tuple[str | None, str],
    as_json: bool,
) -> None:
    """Measure on tasks, and print the table or JSON."""
    wanted = [name.strip() for given in names for name in given.split(",") if name.strip()]
    if not wanted:
        raise ConfigError("--tasks names no task; write for instance --tasks gsm8k,mine.yaml.")
    settings = settings_of(strategies, ranges, standins)
    tasks = load_tasks(wanted, include)
    subject = load_subject(model, True, *place)
    with progress_bar(rounds(subject, tasks, settings, protocol)) as advance:
        result = evaluate_tasks(subject, tasks, settings, protocol, advance)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 144, highlight=False, markup=False)
    console.print(_table(result))
    if result.conditions["truncated"]:
        console.print(
            f"{result.conditions['truncated']} prompts were longer than the model reads, and lost their front."
        )


def _table(result: TaskEvaluation) -> Table:
    conditions = result.conditions
    title = (
        f"{conditions['model']}: tasks of lm-evaluation-harness {conditions['lm_eval']}, decode batches of "
        f"{conditions['batch']}, {'scored prompts under the setting, too' if conditions['stress'] else 'prompts exact'}"
        "; 95 % intervals over documents"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "setting" else "right")
    by_task: dict[tuple[str, str], list[TaskRow]] = {}
    for row in result.rows:
        by_task.setdefault((row.task, row.metric), []).append(row)
    for (task, metric), rows in by_task.items():
        direction = {True: " ↑", False: " ↓", None: ""}[rows[0].higher_is_better]
        table.add_row(f"{task}: {metric.removesuffix(',none')}{direction}", style="bold")
        for row in rows:
            table.add_row(*_cells(row))
        table.add_section()
    return table


def _cells(row: TaskRow) -> tuple[str, ...]:
    return (
        row.label,
        _figure(row.score, row.interval, ""),
        _figure(row.change, row.change_interval, "+"),
        f"{row.active_after:.1f} of {row.active_before:.1f} ({row.share:.0%})" if row.steps else "-",
        f"{row.rows:.1f}",
        f"{row.kept_mass_mean:.3f}",
        f"{row.kept_mass_worst:.3f}",
    )


def _figure(value: float, between: tuple[float, float] | None, sign: str) -> str:
    ends = "" if between is None else f" ({between[0]:{sign}.3f} to {between[1]:{sign}.3f})"
    return f"{value:{sign}.3f}{ends}"
