"""``lynx eval``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lynx.cli.progress import progress_bar
from lynx.config import Config
from lynx.errors import ConfigError
from lynx.measuring.evaluate import Evaluation, Protocol, Row, evaluate, rounds
from lynx.measuring.examples import Example, read_examples, reference_examples
from lynx.measuring.settings import parse_setting, sweep, with_standins
from lynx.measuring.subject import Subject, load_subject


def examples_of(data: Path | None, subject: Subject) -> list[Example]:
    """Read the user's text, or the reference model's own held-out prompts where none is given for it."""
    if data is not None:
        return read_examples(data, subject)
    if subject.name == "reference":
        return reference_examples()
    raise ConfigError("give --data FILE with text to measure on; only the reference model brings its own.")


def settings_of(strategies: list[str], ranges: list[str], standins: Path | None = None) -> list[Config]:
    """Read the settings of a command line, each also with stand-ins where a file of them is given."""
    if ranges and len(strategies) != 1:
        raise ConfigError(f"--sweep goes through the options of one --strategy; {len(strategies)} are given.")
    settings = sweep(strategies[0], ranges) if ranges else [parse_setting(text) for text in strategies]
    return with_standins(settings, standins)


def run_eval(
    model: str,
    data: Path | None,
    strategies: list[str],
    ranges: list[str],
    standins: Path | None,
    protocol: Protocol,
    place: tuple[str | None, str],
    as_json: bool,
) -> None:
    """Measure, and print the table or JSON."""
    settings = settings_of(strategies, ranges, standins)
    subject = load_subject(model, True, *place)
    examples = examples_of(data, subject)
    with progress_bar(rounds(subject, examples, settings, protocol)) as advance:
        result = evaluate(subject, examples, settings, protocol, advance)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 144, highlight=False, markup=False)
    console.print(_table(result))


def _table(result: Evaluation) -> Table:
    conditions = result.conditions
    title = (
        f"{conditions['model']}: decode batches of {conditions['batch']} ({conditions['mix']}), prompt "
        f"{'under the setting' if conditions['stress'] else 'exact'}; 95 % intervals over sequences"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    stood_in = any(row.answered_mass_most for row in result.rows)
    mass = ("kept mass", "worst", *(["stood in", "most"] if stood_in else []))
    for name in ("setting", "active", *mass, "KL (nats)", "loss rise (nats)", "same top-1", "answers"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for row, after in zip(result.rows, [*result.rows[1:], None], strict=True):
        table.add_row(*_cells(row, stood_in), end_section=after is not None and after.control and not row.control)
    return table


def _cells(row: Row, stood_in: bool) -> tuple[str, ...]:
    answers = (
        "" if row.answers is None else f"{row.answers.value:.1%} ({row.answers.low:.1%} to {row.answers.high:.1%})"
    )
    return (
        row.label,
        f"{row.active_after:.1f} of {row.active_before:.1f} ({row.share:.0%})",
        f"{row.kept_mass_mean:.3f}",
        f"{row.kept_mass_worst:.3f}",
        *([f"{row.answered_mass_mean:.3f}", f"{row.answered_mass_most:.3f}"] if stood_in else []),
        f"{row.kl.value:.2g} ({row.kl.low:.2g} to {row.kl.high:.2g})",
        f"{row.rise.value:.2g} ({row.rise.low:.2g} to {row.rise.high:.2g})",
        f"{row.agreement.value:.1%}",
        answers,
    )
