"""``lynx demo``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from lynx.cli.progress import progress_bar
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
    with progress_bar(steps(plan)) as advance:
        results = run(plan, advance)
    paths = table.write(results, out)
    if plot:
        paths += drawing.plot(results, out)
    if as_json:
        print(json.dumps(results.to_dict(), indent=2))
        return
    # wide enough for the table where no terminal sets a width
    console = Console(width=None if sys.stdout.isatty() else 156, highlight=False, markup=False)
    console.print(table.rich_table(results))
    console.print(table.legend(results))
    console.print("Written: " + ", ".join(str(path) for path in paths))
