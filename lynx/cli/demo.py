"""``lynx demo``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lynx.demo import table
from lynx.demo.run import FULL_PLAN, QUICK_PLAN, run, steps
from lynx.errors import ConfigError


def run_demo(quick: bool, plot: bool, out: Path, as_json: bool) -> None:
    """Run, print and write the demo."""
    if plot:
        import lynx.demo.plot as drawing  # a missing matplotlib is told before minutes of work

        drawing.require()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {str(out)!r}: {error}") from error
    plan = QUICK_PLAN if quick else FULL_PLAN
    with Progress(
        TextColumn("{task.description:34}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task("loading", total=steps(plan))
        results = run(plan, lambda what: progress.update(task, advance=1, description=what))
    paths = table.write(results, out)
    if plot:
        paths += drawing.plot(results, out)
    if as_json:
        print(json.dumps(results.to_dict(), indent=2))
        return
    # wide enough for the table where no terminal sets a width
    console = Console(width=None if sys.stdout.isatty() else 144, highlight=False, markup=False)
    console.print(table.rich_table(results))
    console.print(table.legend(results))
    console.print("Written: " + ", ".join(str(path) for path in paths))
