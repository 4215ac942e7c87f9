"""What is made of the times of decode steps: rows, and the fastest stock setup that all others are held to."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from machine import quartiles
from record import Row
from rich.console import Console
from rich.table import Table
from setups import Setup


def make_rows(setups: list[Setup], about: dict[str, Any]) -> list[Row]:
    """Work out the rows of one mode."""
    stock = [setup for setup in setups if setup.stock and setup.rounds and not setup.refused]
    fastest = min(stock, key=lambda setup: setup.seconds, default=None)
    rows = []
    for setup in setups:
        row = about | {
            "strategy": setup.strategy,
            "experts": setup.implementation,
            "setting": setup.setting,
            "options": setup.options,
            "timed": bool(setup.rounds),
            "refused": setup.refused,
        }
        if setup.rounds:
            row |= {"rounds": len(setup.rounds), "ms": quartiles([1e3 * seconds for seconds in setup.rounds])}
            row["ratio_same_mode"] = ratio(setup, fastest)
            row["counts"] = asdict(setup.handle.report().total["decode"]) if setup.handle is not None else None
        rows.append(row)
    return rows


def ratio(ours: Setup, theirs: Setup | None) -> dict[str, float] | None:
    """Divide round by round; None where there is nothing to divide by."""
    if theirs is None:
        return None
    return quartiles([one / other for one, other in zip(ours.rounds, theirs.rounds, strict=False)])


def compare(rows: list[Row]) -> None:
    """Mark the fastest stock setup of each model and batch, of whatever mode, and hold the others to it."""
    for model, T in dict.fromkeys((row["model"], row["T"]) for row in rows):
        fastest = min(stock_rows(rows, model, T), key=median, default=None)
        for row in (row for row in rows if (row["model"], row["T"]) == (model, T)):
            row["fastest_stock"], row["ratio"] = row is fastest, None
            if row["timed"] and fastest is not None:
                same = row["mode"] == fastest["mode"]  # other modes are timed before or after
                row["ratio"] = row["ratio_same_mode"] if same else {"median": median(row) / median(fastest)}


def stock_rows(rows: list[Row], model: str, T: int) -> list[Row]:
    """The stock rows of a model and batch that were timed to the end."""
    these = (row for row in rows if (row["model"], row["T"]) == (model, T))
    return [row for row in these if not row["setting"] and row["timed"] and not row["refused"]]


def median(row: Row) -> float:
    """Median time of a step in milliseconds."""
    return float(row["ms"]["median"])


def show(rows: list[Row]) -> None:
    """Print a table for each model and batch."""
    console = Console(width=150, highlight=False)
    for model, T in dict.fromkeys((row["model"], row["T"]) for row in rows):
        these = [row for row in rows if (row["model"], row["T"]) == (model, T)]
        title = f"{model}, {these[0]['layers']} layers, batch {T}: one decode step; the fastest stock setup is bold"
        table = Table("experts run by", "setting", "mode", title=title, title_justify="left")
        for column in ("active", "step ms", "quartiles", "to fastest", "to fastest of mode"):
            table.add_column(column, justify="right")
        for row in these:
            cells = ["-", row["refused"][:40], "", "", ""]
            if row["timed"]:
                counts, ms = row["counts"], row["ms"]
                active = f"{counts['active_after']:.1f} of {counts['active_before']:.1f}" if counts else ""
                cells = [active, f"{ms['median']:.2f}", f"{ms['q1']:.2f}-{ms['q3']:.2f}"]
                cells += [f"{row[name]['median']:.2f}" if row[name] else "-" for name in ("ratio", "ratio_same_mode")]
            style = "bold" if row["fastest_stock"] else None
            table.add_row(row["experts"], row["setting"] or "stock", row["mode"], *cells, style=style)
        console.print(table)
