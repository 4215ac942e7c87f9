"""``lynx bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lynx.cli.evaluate import examples_of, settings_of
from lynx.cli.progress import progress_bar
from lynx.errors import ConfigError
from lynx.measuring.bench import BatchTimes, Benchmark, BenchPlan, bench, rounds
from lynx.measuring.spread import Spread
from lynx.measuring.subject import load_subject
from lynx.measuring.times import TimedRow

COLUMNS = ("setting", "active", "step, ms", "/ exact", "/ alone", "MoE layer, ms", "layer / exact")


def run_bench(
    model: str,
    data: Path | None,
    strategies: list[str],
    ranges: list[str],
    plan: BenchPlan,
    place: tuple[str | None, str],
    fit: Path | None,
    as_json: bool,
    command: str,
) -> None:
    """Time, write the latency model if asked for, and print tables or JSON."""
    settings = settings_of(strategies, ranges) if strategies or ranges else []
    if fit is not None and not fit.resolve().parent.is_dir():
        raise ConfigError(f"cannot write {str(fit)!r}: there is no folder {str(fit.resolve().parent)!r}.")
    device, dtype = place
    has_text = data is not None or model == "reference"
    subject = load_subject(model, has_text, device, dtype)
    examples = examples_of(data, subject) if has_text else None
    with progress_bar(rounds(plan)) as advance:
        result = bench(subject, examples, settings, plan, advance, command)
    if fit is not None:
        result.latency.save(fit)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 144, highlight=False, markup=False)
    for each in result.batches:
        console.print(_table(result, each))
        console.print(_words(each))
        console.print()
    console.print(_legend(result))


def counts_of(text: str) -> tuple[int, ...]:
    """Read whole numbers above 0 with commas between them.

    Raises:
        ConfigError: It is something else.
    """
    try:
        values = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise ConfigError(f"--batch takes whole numbers above 0 with commas between them, as 1,4,16; got {text!r}.")
    return values


def _table(result: Benchmark, times: BatchTimes) -> Table:
    conditions = result.conditions
    text = "random tokens" if conditions["data"] == "random tokens" else f"{conditions['mix']} text"
    experts = times.rows[-1].experts
    title = f"{conditions['model']}: a decode step of {times.batch} ({text}); experts under Lynx by {experts}"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "setting" else "right", no_wrap=name != "setting")
    for row, after in zip(times.rows, [*times.rows[1:], None], strict=True):
        table.add_row(*_cells(row), end_section=after is not None and after.kind != row.kind)
    return table


def _cells(row: TimedRow) -> tuple[str, ...]:
    active = "" if row.active_after is None else f"{row.active_after:.1f} of {row.active_before:.1f}"
    return (
        row.label,
        active,
        _spread(row.step, 1e3),
        _spread(row.to_exact),
        _spread(row.to_alone),
        _spread(row.layer, 1e3),
        _spread(row.layer_to_exact),
    )


def _spread(value: Spread | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    median, low, high = (scale * each for each in (value.median, value.low, value.high))
    digits = 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _words(times: BatchTimes) -> str:
    layers, count = times.latency.layers, len(times.latency.layers)
    constant = sum(layer.constant.value for layer in layers) / count
    slope = sum(layer.per_expert.value for layer in layers) / count
    lines = [
        f"An MoE layer takes {1e3 * constant:.3f} ms and {1e3 * slope:.4f} ms per active expert (mean of {count}): "
        f"{times.latency.statement}. The rest of a step takes {1e3 * times.latency.rest:.2f} ms.",
        f"Batch {times.batch}: {times.verdict.summary}.",
    ]
    lines += [f"- {finding.rule}: {finding.text}" for finding in times.verdict.findings]
    return "\n".join(lines)


def _legend(result: Benchmark) -> str:
    conditions = result.conditions
    versions = ", ".join(f"{name} {conditions[name]}" for name in ("torch", "transformers", "lynx"))
    clock = "time of one CPU thread" if conditions["clock"] == "thread" else f"{conditions['threads']} thread(s)"
    return (
        f"Median [quartiles]. A step is the time per output token of each of its sequences. An MoE layer is "
        f"{conditions['timed_layer']}; mean over {conditions['layers']} layers. Ratios are taken within a round, of "
        f"{conditions['rounds']} in which all contenders took turns. Budgets protect nothing and are there for the "
        f"line that is fitted. What settings cost in quality is measured by `lynx eval`. {conditions['dtype']}, "
        f"{conditions['device']}, {clock}, {versions}."
    )
